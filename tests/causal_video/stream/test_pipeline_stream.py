"""The pipeline of a causal student: directories, prompts, beginnings, and mistakes that leave sessions as they were."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, WanTransformer3DModel
from hypothesis import given
from hypothesis import strategies as st

from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.policy import CachePolicy
from fewstep.causal_video.settings import FILE_NAME, CausalSettings, StreamDefaults, load_defaults
from fewstep.causal_video.stream.pipeline import CausalVideoPipeline
from fewstep.causal_video.stream.video import chunks_of_clip
from fewstep.causal_video.vae_stream import decode_stream, encode_stream
from tests.causal_video.tiny_causal import largest, layouts
from tests.causal_video.tiny_streams import (
    SETTINGS,
    action_pipeline,
    build_stream_pipeline,
    frames_of,
    latents_of,
    text_pipeline,
)
from tests.tiny_networks import draw
from tests.tiny_videos import build_video_pipeline


def clip(frames: int, seed: int = 7) -> torch.Tensor:
    """[3, frames, 32, 32] in [0, 1]."""
    return draw((3, frames, 32, 32), seed, torch.float32).sigmoid()


def test_a_directory_is_an_ordinary_wan_pipeline(tmp_path: Path) -> None:
    pipe = text_pipeline()
    pipe.save_pretrained(tmp_path)
    loaded = CausalVideoPipeline.from_pretrained(tmp_path)
    assert (loaded.settings, loaded.defaults) == (pipe.settings, pipe.defaults)
    assert load_defaults(tmp_path) == StreamDefaults(32, 32, 16)
    assert not list(tmp_path.rglob("*.bin"))
    one, two = (list(p.stream("a red cat", chunks=3, seed=1)) for p in (pipe, loaded))
    assert torch.equal(frames_of(one), frames_of(two))
    narrow = CausalVideoPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    rounded = narrow("a red cat", chunks=1, seed=1)
    assert rounded.latents.dtype == torch.float32
    assert largest(rounded.latents, one[0].latents) < 0.1 * float(one[0].latents.abs().max())
    stock: Any = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock).__name__ == "WanPipeline"
    assert isinstance(stock.transformer, WanTransformer3DModel)
    x, t, text = latents_of(one), torch.tensor([0.4]), pipe.encode(["a red cat"])
    with torch.no_grad():
        called = stock.transformer(x, 1000 * t, text, return_dict=False)[0]
        assert largest(called, pipe.network.bidirectional(x, t, text)) < 1e-5
    size = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 8}
    assert stock("a cat", num_inference_steps=1, output_type="latent", **size).frames.shape == (1, 4, 2, 8, 8)


def test_a_call_is_the_stream_put_together() -> None:
    pipe = text_pipeline()
    outputs = list(pipe.stream(["a red cat", "two dogs"], chunks=3, seed=2))
    whole = pipe(["a red cat", "two dogs"], chunks=3, seed=2)
    assert torch.equal(whole.latents, latents_of(outputs))
    assert whole.frames is not None
    assert whole.frames.shape == (2, 3, 17, 32, 32)
    images = outputs[1].images(1)
    assert images.shape == (8, 32, 32, 3)
    assert images.dtype == "uint8"
    assert int(images[3, 5, 6, 2]) == round(255 * float(whole.frames[1, 2, 4, 5, 6]))
    assert (whole.images(1)[1:9] == images).all()
    # A row of a batch is the video of its prompt alone with its own number.
    alone = pipe("a red cat", chunks=3, seed=2)
    assert largest(alone.latents, whole.latents[:1]) < 1e-5
    latents = pipe("a red cat", chunks=2, decode=False)
    assert latents.frames is None
    with pytest.raises(ValueError, match="decode=True"):
        latents.images()


def test_a_picture_is_the_first_frame() -> None:
    pipe, picture = text_pipeline(), clip(1)[:, 0]
    latent, _ = encode_stream(pipe.stock.vae, picture[None, :, None])
    session = pipe.open("a red cat", image=picture)
    first, second = session.stream(2)
    assert torch.equal(first.latents, latent)
    shown, _ = decode_stream(pipe.stock.vae, latent)
    assert first.frames is not None
    assert torch.equal(first.frames, shown)
    plain = pipe("a red cat", chunks=2).latents
    assert largest(second.latents, plain[:, :, 1:]) > 1e-3
    # With a longer first chunk the picture is held in its first frame.
    long = build_stream_pipeline(settings=CausalSettings(ChunkLayout((2,)), CachePolicy(), SETTINGS.schedule))
    made = long.open("a red cat", image=picture).step()
    assert made.latents.shape[2] == 2
    assert torch.equal(made.latents[:, :, :1], latent)


def test_a_clip_is_continued() -> None:
    pipe, given = text_pipeline(), clip(9)
    latents, _ = encode_stream(pipe.stock.vae, given[None])
    session = pipe.open("a red cat", video=given, seed=3)
    assert session.chunk == 2
    state = session.snapshot()
    assert torch.equal(torch.cat([state.kept[0].shown, latents[:, :, 1:]], dim=2), latents)
    made = session.step()
    assert made.chunk == 2
    assert made.frames is not None
    assert made.frames.shape[2] == 8
    # The decoder goes on from the clip's own frames.
    whole, _ = decode_stream(pipe.stock.vae, torch.cat([latents, made.latents], dim=2))
    assert torch.equal(made.frames, whole[:, :, 9:])
    with pytest.raises(ValueError, match="beginning of a video, and this one is at chunk 3"):
        session.feed(given)


@given(layout=layouts(), frames=st.integers(1, 60))
def test_a_clip_is_whole_chunks_or_refused(layout: ChunkLayout, frames: int) -> None:
    ends = [4 * (layout.end(chunk) - 1) + 1 for chunk in range(20)]
    if frames in ends:
        lengths = chunks_of_clip(layout, frames)
        assert sum(lengths) == (frames + 3) // 4
        assert lengths == tuple(layout.length(chunk) for chunk in range(ends.index(frames) + 1))
    else:
        with pytest.raises(ValueError, match="do not fit the layout"):
            chunks_of_clip(layout, frames)


def test_clips_must_end_with_a_chunk() -> None:
    layout = ChunkLayout((1, 2))
    assert chunks_of_clip(layout, 1) == (1,)
    assert chunks_of_clip(layout, 17) == (1, 2, 2)
    for frames in (0, 5, 8, 13):
        with pytest.raises(ValueError, match="do not fit the layout"):
            chunks_of_clip(layout, frames)
    with pytest.raises(ValueError, match="have 1, 9, 17 frames"):
        text_pipeline().open("a red cat", video=clip(5))


def test_prompts_switch_at_a_chunk_that_is_named() -> None:
    pipe = text_pipeline()
    plain = pipe("a red cat", chunks=5).latents
    session = pipe.open("a red cat")
    session.set_prompt("two dogs", at_chunk=3)
    session.set_prompt("blue 7", "cross_only", at_chunk=4)
    outputs = list(session.stream(3))
    assert (session.prompt, session.chunk) == ("a red cat", 3)
    outputs += list(session.stream(2))
    assert session.prompt == "blue 7"
    switched = latents_of(outputs)
    assert torch.equal(switched[:, :, :5], plain[:, :, :5])
    assert largest(switched[:, :, 5:], plain[:, :, 5:]) > 1e-3
    by_hand = pipe.open("a red cat")
    list(by_hand.stream(3))
    by_hand.set_prompt("two dogs")
    assert torch.equal(by_hand.step().latents, switched[:, :, 5:7])


def test_mistakes_leave_the_session_as_it_was(tmp_path: Path) -> None:
    pipe = text_pipeline()
    plain = pipe("a red cat", chunks=4).latents
    session = pipe.open("a red cat")
    outputs = list(session.stream(2))
    before = session.snapshot()
    other = build_stream_pipeline(seed=1).open("a red cat")
    other.step()
    file = other.save(tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    mistakes = (
        (lambda: session.set_prompt("two dogs", at_chunk=1), "chunk 1 is past: chunks up to 1 were shown"),
        (lambda: session.set_prompt(["a", "b"]), "has 1 samples, got 2 prompts"),
        (lambda: session.set_prompt("two dogs", "soft"), "mode must be"),  # pyright: ignore[reportArgumentType]
        (lambda: session.restore(other.snapshot()), "another model"),
        (lambda: session.restore(file), "another model"),
        (lambda: session.restore(tmp_path / "broken.safetensors"), "cannot be read as a snapshot"),
        (lambda: session.restore(tmp_path / "none.safetensors"), "cannot be read as a snapshot"),
        (lambda: session.step("left"), "knows no actions by name"),
        (lambda: session.step(torch.zeros(1, 2, 2, 8, 8)), "takes 0 conditioning channels"),
        (lambda: list(session.stream(2, ["left"])), "as many actions"),
        (lambda: session.feed(clip(9)), "beginning of a video"),
    )
    for mistake, message in mistakes:
        with pytest.raises(ValueError, match=message):
            mistake()
        assert session.snapshot() is before
    outputs += list(session.stream(2))
    assert torch.equal(latents_of(outputs), plain)


def test_what_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    pipe = text_pipeline()
    for options, message in (
        ({"image": clip(1)[:, 0], "video": clip(1)}, "not both"),
        ({"image": clip(1)[:, 0, :16]}, "32 x 32 pixels, got"),
        ({"image": clip(1)}, r"must be \[3, H, W\]"),
        ({"video": clip(9)[:, :, :, :16]}, "32 x 32 pixels, got"),
        ({"height": 40, "width": 32}, "multiple"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.open("a red cat", **options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="no prompt"):
        pipe.open([])
    with pytest.raises(ValueError, match="at least 1 chunk"):
        pipe("a red cat", chunks=0)
    with pytest.raises(ValueError, match="steered by actions"):
        action_pipeline().stream("a red cat", chunks=2)
    with pytest.raises(ValueError, match="is no directory"):
        CausalVideoPipeline.from_pretrained(tmp_path / "none")
    build_video_pipeline(text_tokens=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no causal video student"):
        CausalVideoPipeline.from_pretrained(tmp_path)
    defaults = StreamDefaults(32, 32, 16, ("left",))
    with pytest.raises(ValueError, match="0 conditioning channels, and 1 actions"):
        CausalVideoPipeline(build_video_pipeline(text_tokens=8), SETTINGS, defaults)
    with pytest.raises(ValueError, match="height and width, or neither"):
        StreamDefaults(height=32)
    SETTINGS.save(tmp_path, StreamDefaults(32, 32))
    content = json.loads((tmp_path / FILE_NAME).read_text())
    (tmp_path / FILE_NAME).write_text(json.dumps({**content, "stream": {"height": 32}}))
    with pytest.raises(ValueError, match="no file of format 1"):
        load_defaults(tmp_path)


@pytest.mark.parametrize(
    ("layout", "policy", "message"),
    [
        ((3,), CachePolicy(2), "window_frames=2 is no multiple of the longest chunk, 3"),
        ((1, 2), CachePolicy(4, 3, "static"), "sink_frames=3 is longer than the first chunk, 1"),
        ((2, 2), CachePolicy(4, 1, "static"), "does not end with a chunk"),
    ],
)
def test_settings_of_a_stream_must_fit_its_layout(layout: tuple[int, ...], policy: CachePolicy, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CausalSettings(ChunkLayout(layout), policy, SETTINGS.schedule)
    with pytest.raises(ValueError, match="5 frames do not divide into chunks of 2"):
        ChunkLayout.uniform(5, 2)
