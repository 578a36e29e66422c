"""Students in diffusers' own causal pipeline: equal where it can express them, refused where it cannot."""

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import AnyFlowFARPipeline, FlowMapEulerDiscreteScheduler

from fewstep.causal_video.export.far import check_far, export_far, far_video, streamed
from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.model.far import far_transformer
from fewstep.causal_video.model.masks import block_causal
from fewstep.causal_video.policy import KEEP_ALL, CachePolicy
from fewstep.causal_video.schedule import StepSchedule
from fewstep.causal_video.settings import CausalSettings, StreamDefaults
from fewstep.causal_video.stream.pipeline import CausalVideoPipeline
from tests.causal_video.tiny_causal import largest
from tests.causal_video.tiny_streams import NAMES, build_stream_pipeline

# diffusers calls flex attention without compiling it.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

ONE = StepSchedule.steps([1])


def student(layout: tuple[int, ...], side: int = 64) -> CausalVideoPipeline:
    """One call per chunk; a frame of 64 x 64 pixels has 64 tokens."""
    pipe = build_stream_pipeline(settings=CausalSettings(ChunkLayout(layout), KEEP_ALL, ONE))
    return CausalVideoPipeline(pipe.stock, pipe.settings, StreamDefaults(side, side))


def test_the_network_is_the_block_causal_student() -> None:
    pipe = student((1, 2))
    assert pipe.stock.transformer is not None
    network = far_transformer(pipe.stock.transformer, pipe.settings.layout)
    x, t = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([[0.3, 0.8, 0.8]])
    text = pipe.encode(["a red cat"])
    mask = block_causal(pipe.settings.layout, 16, KEEP_ALL, device=x.device)
    with torch.no_grad():
        ours = pipe.network.causal(x, t, text, mask=mask)
        frames_first = x.transpose(1, 2)
        theirs = network(frames_first, 1000 * t, 1000 * t, text, chunk_partition=[1, 2], return_dict=False)[0]
    assert largest(theirs.transpose(1, 2), ours) < 1e-5
    assert float(ours.abs().max()) > 0.1


def test_the_pipeline_makes_the_same_video(tmp_path: Path) -> None:
    assert export_far(student((2, 2, 2)), tmp_path / "anyflow") < 1e-5
    with pytest.raises(ValueError, match="exists"):
        export_far(student((2, 2, 2)), tmp_path / "anyflow")


def test_chunks_that_are_filled_up_with_zeros_are_another_video(tmp_path: Path) -> None:
    pipe = student((1, 1))
    with pytest.raises(ValueError, match=r"chunks of \[1\] latent frames have 64 tokens each"):
        export_far(pipe, tmp_path / "odd")
    stock = pipe.stock
    assert stock.transformer is not None
    odd = AnyFlowFARPipeline(
        tokenizer=stock.tokenizer,
        text_encoder=stock.text_encoder,
        transformer=far_transformer(stock.transformer, pipe.settings.layout),
        vae=stock.vae,
        scheduler=FlowMapEulerDiscreteScheduler(),
    )
    # Fails when diffusers masks its padding, and the refusal above can go.
    assert largest(far_video(odd, pipe, "a cat", 0), streamed(pipe, "a cat", 0)) > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": CachePolicy(2)}, "has a window"),
        ({"policy": CachePolicy(noisy_from=0)}, "clean context in full precision"),
        ({"policy": CachePolicy(quantise="int8")}, "clean context in full precision"),
        ({"schedule": StepSchedule.steps([2, 1])}, "agrees with it for one call"),
    ],
)
def test_what_cannot_be_expressed_is_refused(changes: dict[str, CachePolicy | StepSchedule], message: str) -> None:
    pipe = student((2, 2, 2))
    settings = dataclasses.replace(pipe.settings, **changes)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=message):
        check_far(CausalVideoPipeline(pipe.stock, settings, pipe.defaults))
    steered = build_stream_pipeline(actions=NAMES)
    assert steered.stock.transformer is not None
    with pytest.raises(ValueError, match="latents and text alone"):
        far_transformer(steered.stock.transformer, settings.layout)
