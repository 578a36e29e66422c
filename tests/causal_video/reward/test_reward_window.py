"""A window of a stream: its place, its shared past, the calls on it, and the loss there."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fewstep.causal_video.cache.quantised import stored
from fewstep.causal_video.cache.rolling import RollingCache
from fewstep.causal_video.denoise import ChunkNoise
from fewstep.causal_video.model.prefix import KeysValues
from fewstep.causal_video.policy import CachePolicy
from fewstep.causal_video.reward.config import CausalRewardConfig
from fewstep.causal_video.reward.setup import CausalRewardSetup
from fewstep.causal_video.reward.window import (
    Candidates,
    ChunkStep,
    StreamPoint,
    WindowPlan,
    branched,
    chunk_loss,
    draw_candidates,
    full_rollout,
    plan_window,
    prepare,
    stream_to,
)
from fewstep.causal_video.settings import CausalSettings
from fewstep.causal_video.vae_stream import decode_stream
from fewstep.core.config import ConfigError, load_config, save_resolved
from fewstep.dmd.reward.config import DecayConfig
from fewstep.dmd.reward.inputs import reference_penalty
from fewstep.dmd.reward.methods.nft import nft_loss
from tests.causal_video import tiny_causal
from tests.causal_video.reward.tiny_reward import reward_settings, started
from tests.causal_video.tiny_causal_run import VideoInputs

INDICES = list(range(8))
PLAN = WindowPlan(3, 2)
NFT_BETA = 0.5


@pytest.fixture(scope="module")
def parts(
    inputs: VideoInputs, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[CausalRewardConfig, CausalRewardSetup]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        config = reward_settings(inputs, tmp_path_factory.mktemp("window") / "run")
        with started(config) as (setup, _):
            yield config, setup


@pytest.fixture(scope="module")
def drawn(parts: tuple[CausalRewardConfig, CausalRewardSetup]) -> Candidates:
    return draw_candidates(*parts, INDICES, PLAN)


def window_loss(setup: CausalRewardSetup, candidates: Candidates, steps: tuple[ChunkStep, ...]) -> Tensor:
    """The loss of the student on all chunks, and of the penalty on every second candidate."""
    probability = torch.linspace(0, 1, len(candidates.prompts))
    risky = torch.arange(len(candidates.prompts)) % 2 == 0
    total = torch.zeros(())
    for step in steps:
        prediction = step.call.predict(setup.causal.student, candidates.window.tokens).x0
        found = chunk_loss(step, prediction, probability, risky, nft_beta=NFT_BETA)
        total = total + found.policy + found.penalty
    return total


@given(seed=st.integers(0, 2**31), step=st.integers(0, 10**6), chunks=st.integers(1, 6), more=st.integers(0, 20))
def test_a_window_lies_in_the_stream(seed: int, step: int, chunks: int, more: int) -> None:
    config = reward_settings(
        VideoInputs(*[Path("x")] * 4),
        Path("x"),
        {"run.seed": seed, "astrolabe.chunks": chunks, "astrolabe.longest_chunks": chunks + more},
    )
    plan = plan_window(config, step)
    assert plan.chunks == chunks
    assert 0 <= plan.start <= more
    assert plan == plan_window(config, step)


def test_all_places_are_visited(parts: tuple[CausalRewardConfig, CausalRewardSetup]) -> None:
    starts = [plan_window(parts[0], step).start for step in range(200)]
    counts = [starts.count(place) for place in range(5)]
    assert min(counts[:4]) > 30
    assert counts[4] == 0


def test_candidates_of_a_prompt_share_what_came_before_bit_for_bit(drawn: Candidates) -> None:
    first, second = drawn.window.calls
    # Window of two chunks, one the own, and a sink of one chunk.
    assert [len(call.prefix.parts) for call in drawn.window.calls] == [2, 2]
    for part in first.prefix.parts:
        for layer in range(3):
            for tensor in part.layer(layer):
                groups = tensor.unflatten(0, (2, 4))
                assert all(torch.equal(groups[:, 0], groups[:, member]) for member in range(1, 4))
                assert not torch.equal(groups[0, 0], groups[1, 0])
    # The second chunk sees the candidate's own first one, and no other's.
    own = second.prefix.parts[-1].layer(0)[0].unflatten(0, (2, 4))
    assert not torch.equal(own[:, 0], own[:, 1])
    assert drawn.prompts[0] == drawn.prompts[3] != drawn.prompts[4] == drawn.prompts[7]
    latents = drawn.window.latents
    assert tuple(latents.shape) == (8, 4, 2, 8, 8)
    assert min(float((latents[i] - latents[j]).abs().max()) for i in range(8) for j in range(i)) > 1e-3


def test_pixels_are_those_of_the_whole_stream(
    parts: tuple[CausalRewardConfig, CausalRewardSetup], drawn: Candidates
) -> None:
    """Decoding goes on from the prefix: 4 frames of each latent frame, since the window is not the beginning."""
    config, setup = parts
    causal, row = setup.causal, 5
    tokens = causal.prompts.rows(drawn.groups.rows[4:5]).text
    noise = ChunkNoise(config.run.seed, (1,), (4, 8, 8), stream="reward before")
    begun = full_rollout(
        setup.old,
        setup.old.prompt(tokens),
        noise,
        causal.settings,
        cache=RollingCache.empty(causal.settings.layout, causal.settings.policy),
        chunks=3,
    )
    whole = torch.cat([begun.video, drawn.window.latents[row : row + 1]], dim=2)
    expected = decode_stream(setup.vae, whole)[0][:, :, 9:]
    assert tuple(drawn.window.pixels.shape) == (8, 3, 8, 32, 32)
    assert float((drawn.window.pixels[row : row + 1] - expected).abs().max()) < 1e-4
    alone = decode_stream(setup.vae, drawn.window.latents[row : row + 1])[0]
    assert alone.shape[2] == 5
    first = draw_candidates(config, setup, INDICES, WindowPlan(0, 2))
    assert first.window.pixels.shape[2] == 5


def test_the_loss_is_the_same_when_the_past_is_made_again(
    parts: tuple[CausalRewardConfig, CausalRewardSetup], drawn: Candidates
) -> None:
    config, setup = parts
    again = draw_candidates(config, setup, INDICES, PLAN)
    with torch.no_grad():
        before, after = (window_loss(setup, c, prepare(setup, c)) for c in (drawn, again))
    assert float(before) > 0.1
    assert torch.equal(before, after)


def test_what_comes_after_the_window_changes_nothing(
    parts: tuple[CausalRewardConfig, CausalRewardSetup], drawn: Candidates
) -> None:
    """Streams that go on write to caches of their own, and a chunk's loss does not see later chunks of the window."""
    _, setup = parts
    steps = prepare(setup, drawn)
    with torch.no_grad():
        before = window_loss(setup, drawn, steps)
        noise = ChunkNoise(77, tuple(INDICES), (4, 8, 8))
        text, after = setup.old.prompt(drawn.window.tokens), drawn.window.after
        full_rollout(setup.old, text, noise, setup.causal.settings, cache=after.cache, chunks=3)
        assert torch.equal(window_loss(setup, drawn, steps), before)
        other = drawn.window.latents.clone()
        other[:, :, 1:] += 1.0
        changed = dataclasses.replace(drawn, window=dataclasses.replace(drawn.window, latents=other))
        moved = prepare(setup, changed)
        first, second = ([window_loss(setup, drawn, (step,)) for step in all_] for all_ in (steps, moved))
    assert torch.equal(first[0], second[0])
    assert float((first[1] - second[1]).abs()) > 1e-3


def test_no_gradient_enters_what_came_before(
    parts: tuple[CausalRewardConfig, CausalRewardSetup], drawn: Candidates
) -> None:
    _, setup = parts
    steps = prepare(setup, drawn)
    window_loss(setup, drawn, steps).backward()
    grads = [p.grad for p in setup.causal.student.parameters()]
    assert all(grad is not None for grad in grads)
    assert max(float(grad.abs().max()) for grad in grads if grad is not None) > 1e-3
    stored_tensors = [
        tensor
        for call in drawn.window.calls
        for part in call.prefix.parts
        if isinstance(part, KeysValues)
        for tensor in (part.keys, part.values)
    ]
    assert len(stored_tensors) == 8
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in stored_tensors)
    for network in (setup.old, setup.reference, setup.vae, setup.causal.teacher.denoiser):
        assert network is not None
        assert all(parameter.grad is None for parameter in network.parameters())
    setup.causal.student.zero_grad(set_to_none=True)


def test_at_the_old_policy_loss_and_gradient_have_closed_forms(
    parts: tuple[CausalRewardConfig, CausalRewardSetup], drawn: Candidates
) -> None:
    """Student = old = reference: both branches are old, the loss |old - x0|^2 whatever r is, the penalty 0."""
    _, setup = parts
    steps, probability = prepare(setup, drawn), torch.linspace(0, 1, 8)
    policy = penalty = 0.0
    for step in steps:
        prediction = step.call.predict(setup.causal.student, drawn.window.tokens).x0
        assert step.reference_x0 is not None
        assert torch.equal(step.old_x0, step.reference_x0)
        # Text is embedded in the call, not before it: the same numbers up to rounding.
        assert float((prediction - step.old_x0).detach().abs().max()) < 1e-4
        leaf = step.old_x0.clone().requires_grad_()
        found = chunk_loss(step, leaf, probability, torch.ones(8, dtype=torch.bool), nft_beta=NFT_BETA)
        (grad,) = torch.autograd.grad(found.policy, leaf)
        expected = 2 * NFT_BETA * (2 * probability - 1).view(-1, 1, 1, 1, 1) * (step.old_x0 - step.x0)
        # A mean over 8 candidates and the numbers of both chunks.
        assert float((grad * 8 * 2 * leaf[0].numel() - expected).abs().max()) < 1e-4
        policy, penalty = policy + float(found.policy.detach()), penalty + float(found.penalty.detach())
    old = torch.cat([step.old_x0 for step in steps], dim=2)
    assert policy == pytest.approx(float((old - drawn.window.latents).square().mean()), rel=1e-5)
    assert penalty == 0.0


def test_chunks_add_up_to_the_window() -> None:
    """In float64, chunks of one and of two frames."""
    draw = [tiny_causal.latents(3, batch=4, seed=seed) for seed in range(4)]
    student, old, reference, x0 = draw
    probability, risky = torch.linspace(0, 1, 4).double(), torch.tensor([True, False, True, True])
    call: Any = None
    total = [0.0, 0.0]
    for part in (slice(0, 1), slice(1, 3)):
        step = ChunkStep(call, x0[:, :, part], old[:, :, part], reference[:, :, part], (part.stop - part.start) / 3)
        found = chunk_loss(step, student[:, :, part], probability, risky, nft_beta=0.3)
        total = [total[0] + float(found.policy), total[1] + float(found.penalty)]
    assert total[0] == pytest.approx(float(nft_loss(student, old, x0, probability, nft_beta=0.3)), rel=1e-12)
    assert total[1] == pytest.approx(float(reference_penalty(student, reference)[risky].mean()), rel=1e-12)


def test_times_are_those_of_the_schedule(parts: tuple[CausalRewardConfig, CausalRewardSetup]) -> None:
    """Schedule [3, 2] at shift 5: each candidate has one place in it, the first chunk its own times."""
    config, setup = parts
    many = list(range(64))
    first, second = prepare(setup, draw_candidates(config, setup, many, WindowPlan(0, 2)))
    found = first.call.t[:, 0].tolist(), second.call.t[:, 0].tolist()
    assert sorted(set(found[0])) == pytest.approx([5 / 7, 10 / 11, 1.0])
    assert sorted(set(found[1])) == pytest.approx([5 / 6, 1.0])
    assert min(found[0].count(value) for value in set(found[0])) > 10
    assert min(found[1].count(value) for value in set(found[1])) > 20
    # Times fall along the schedule, so the first half of the places is noisier in both.
    assert all(b == 1.0 for a, b in zip(*found, strict=True) if a == 1.0)
    t = first.call.t[:, :1, None, None, None]
    noise = (first.call.x - (1 - t) * first.x0) / t
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.05)
    assert float(noise.std()) == pytest.approx(1.0, abs=0.05)


def test_memory_does_not_grow_with_the_stream(parts: tuple[CausalRewardConfig, CausalRewardSetup]) -> None:
    _, setup = parts
    sizes = []
    for chunks in (4, 9):
        tokens = setup.causal.prompts.rows([0]).text
        noise = ChunkNoise(0, (0,), (4, 8, 8))
        point = stream_to(setup.old, setup.vae, tokens, noise, setup.causal.settings, chunks=chunks)
        features = sum(value.numel() for value in point.decoder.features if isinstance(value, Tensor))
        sizes.append((point.cache.bytes(), features))
        assert (point.cache.next_chunk, point.decoder.frames) == (chunks, chunks)
    assert sizes[0] == sizes[1]
    assert sizes[0][0] > 0


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_branches_are_copies_row_by_row(kind: Any) -> None:
    student, layout = tiny_causal.shared_student(), tiny_causal.ChunkLayout((1, 2, 2, 2))
    settings = CausalSettings(layout, CachePolicy(4, quantise=kind))
    x, t, tokens = tiny_causal.latents(), tiny_causal.chunk_times(layout), tiny_causal.text()
    cache = tiny_causal.fill(student, x, t, tokens, layout, settings.policy)[1]
    many = branched(StreamPoint(cache), 3)
    assert many.cache.bytes() == 3 * cache.bytes()
    assert many.cache.next_chunk == cache.next_chunk
    for before, after in zip(cache.entries, many.cache.entries, strict=True):
        for left, right in zip(before.content.layer(1), after.content.layer(1), strict=True):
            assert torch.equal(right, left[[0, 0, 0, 1, 1, 1]])
            assert right.data_ptr() != left.data_ptr()
    exact = KeysValues(torch.ones(1, 2, 1, 3, 4), torch.ones(1, 2, 1, 3, 4))
    assert stored(exact, kind).bytes() > 0


def refused(match: str, **changes: Any) -> None:
    with pytest.raises(ValueError, match=match):
        reward_settings(
            VideoInputs(*[Path("x")] * 4),
            Path("x"),
            {key.replace("__", ".", 1): value for key, value in changes.items()},
        )


def test_settings_that_do_not_fit_are_named() -> None:
    refused(r"student\.init is empty", student__init=None)
    refused(r"policy: window_frames=3", student__layout=(2, 2), student__policy=CachePolicy(3))
    refused(r"astrolabe\.chunks is 6; it must be from 1 to the 5 chunks", astrolabe__chunks=6)
    refused(
        r"astrolabe\.chunks is 4; it must be from 1 to the 3 chunks",
        astrolabe__chunks=4,
        astrolabe__longest_chunks=None,
    )
    refused("or the cache grows with the stream", student__policy=CachePolicy())
    refused(r"reward\.group_size 4 does not divide run\.batch_size 6", run__batch_size=6)
    refused(r"batch_size 8 cut into 4 slices", run__gradient_accumulation=4)
    refused(r"nft_beta is 0", astrolabe__nft_beta=0.0)
    refused(r"share is 0\.5; it must lie in \[0\.02, 0\.2\]", penalty__share=0.5)
    refused(r"auxiliary is empty", penalty__auxiliary=())
    refused(r"auxiliary \['taste'\] must be different entries", penalty__auxiliary=("taste",))
    refused("must be different entries", penalty__primary="slant")
    refused("max_penalty must be positive", penalty__max_penalty=0.0)
    refused("leave the section out for no penalty", penalty__weight=0.0)
    with pytest.raises(ValueError, match=r"start=0\.9.* 0 <= start <= ceiling <= 1"):
        DecayConfig(start=0.9, ceiling=0.5)


def test_what_streams_of_prompts_do_not_read_is_no_setting(repository: Path) -> None:
    file = ("--config", str(repository / "configs" / "digits_video" / "astrolabe.yaml"))
    for key in ("data.image_share", "data.latents", "data.controls", "self_forcing.exit", "fake_score.lora_rank"):
        with pytest.raises(ConfigError, match=f"unknown key {key} on the command line"):
            load_config(CausalRewardConfig, [*file, f"--{key}", "1"], prog="x", description="x")
    with pytest.raises(ValueError, match="no method is given: add one of the sections astrolabe"):
        dataclasses.replace(load_config(CausalRewardConfig, file, prog="x", description="x")[0], astrolabe=None)


def test_settings_are_read_as_they_were_written(inputs: VideoInputs, tmp_path: Path) -> None:
    config = reward_settings(inputs, tmp_path)
    save_resolved(tmp_path / "config.yaml", config)
    again, _ = load_config(CausalRewardConfig, ["--config", str(tmp_path / "config.yaml")], prog="x", description="x")
    assert again == config
    root = Path(__file__).resolve().parents[3]
    shipped = ["--config", str(root / "configs" / "digits_video" / "astrolabe.yaml")]
    digits, _ = load_config(CausalRewardConfig, shipped, prog="x", description="x")
    assert digits.method == "astrolabe"
    assert digits.section.penalty is not None
    assert (digits.longest_chunks, digits.section.chunks) == (14, 7)
    assert digits.section.penalty.auxiliary == ("clip_digit",)
    # A section that is not given keeps the paper's average.
    content = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    del content["astrolabe"]["old"], content["astrolabe"]["penalty"]
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    short, _ = load_config(CausalRewardConfig, ["--config", str(tmp_path / "short.yaml")], prog="x", description="x")
    assert short.section.old == DecayConfig(start=0.9, slope=0.0, ceiling=0.9)
    assert short.section.penalty is None
