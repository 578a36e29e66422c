"""Self-forcing rollouts: calls, gradients, contexts, and the gradient chunk by chunk."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.causal_video.cache.rolling import RollingCache
from fewstep.causal_video.denoise import ChunkNoise, VideoCondition, denoise_chunk
from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.policy import CachePolicy
from fewstep.causal_video.rollout import Rollout, replayed_backward, rollout
from fewstep.causal_video.schedule import StepSchedule, random_exit
from fewstep.causal_video.settings import CausalSettings
from fewstep.core.paths import add_noise, x0_from_velocity
from tests.causal_video.tiny_causal import SIZE, build_student, largest, latents, noise, text

LAYOUT = ChunkLayout((1, 2, 2, 2))
CLEAN = CausalSettings(LAYOUT, CachePolicy(4, 1, "static"), StepSchedule.steps([4, 2]))
NOISY = CausalSettings(LAYOUT, CachePolicy(4, noisy_from=1), StepSchedule.steps([4, 2]))
AVERAGED = CausalSettings(ChunkLayout.uniform(7, 1), CachePolicy(2, 1, "ema", ema_decay=0.5), StepSchedule.steps([2]))
QUANTISED = CausalSettings(LAYOUT, CachePolicy(4, quantise="int8"), StepSchedule.steps([2, 1]))
WEIGHTS = latents(seed=11)


@dataclass
class CallLog:
    """Whether gradients were on, for each call of a network."""

    grads: list[bool]


def logged(student: CausalWan) -> CallLog:
    """A log that every call of the student is written to."""
    log = CallLog([])
    student.transformer.patch_embedding.register_forward_hook(
        lambda *_: log.grads.append(torch.is_grad_enabled())  # pyright: ignore[reportArgumentType]
    )
    return log


def roll(student: CausalWan, settings: CausalSettings, exit_step: int, **options: Any) -> Rollout:
    """A whole video from the shared noise and text."""
    exits = settings.schedule.exits(exit_step, settings.layout.chunks)
    return rollout(student, VideoCondition(text()), noise(), settings, exits=exits, **options)


def gradients(student: CausalWan) -> list[Tensor]:
    """Gradients of all parameters that have one."""
    return [p.grad for p in student.parameters() if p.grad is not None]


@pytest.mark.parametrize(("settings", "exit_step"), [(CLEAN, 0), (CLEAN, 1), (CLEAN, 3), (NOISY, 1), (NOISY, 3)])
def test_one_call_per_chunk_has_gradients(settings: CausalSettings, exit_step: int) -> None:
    student = build_student()
    log = logged(student)
    result = roll(student, settings, exit_step)
    exits = settings.schedule.exits(exit_step, 4)
    calls = [settings.policy.is_noisy(c) and e == len(settings.schedule.of(c)) - 1 for c, e in enumerate(exits)]
    assert sum(log.grads) == 4
    assert len(log.grads) == sum(e + 1 for e in exits) + calls.count(False)
    assert result.video.shape == (2, 4, 7, 4, 4)
    assert result.cache.next_chunk == 4
    assert result.video.requires_grad


def test_a_rollout_is_the_algorithm_written_out() -> None:
    student = build_student()
    result = roll(student, CLEAN, 1)
    cache, draws = RollingCache.empty(LAYOUT, CLEAN.policy), noise()
    with torch.no_grad():
        for chunk in range(4):
            frames, times = LAYOUT.length(chunk), CLEAN.schedule.of(chunk)
            t = [torch.full((2,), time, dtype=torch.float64) for time in times]
            x = draws.draw(chunk, 0, frames, text())
            x0 = x0_from_velocity(x, student.readonly(x, t[0], text(), cache.read()), t[0])
            x = add_noise(x0, draws.draw(chunk, 1, frames, text()), t[1])
            x0 = x0_from_velocity(x, student.readonly(x, t[1], text(), cache.read()), t[1])
            part = result.video[:, :, LAYOUT.start(chunk) : LAYOUT.end(chunk)]
            assert largest(part, x0) < 1e-13
            output = student.append(x0, torch.zeros_like(t[0]), text(), cache.read())
            assert output.keys_values is not None
            cache = cache.commit(output.keys_values)


def test_no_gradient_leaks_from_chunk_to_chunk() -> None:
    student = build_student()
    seen: list[Tensor] = []
    student.transformer.proj_out.register_forward_hook(
        lambda *arguments: seen.append(arguments[2]) if arguments[2].requires_grad else None
    )
    for tensor in roll(student, CLEAN, 1).exits:
        assert not tensor.x.requires_grad
        assert not any(part.layer(0)[0].requires_grad for part in tensor.prefix.parts)
    seen.clear()
    video = roll(student, CLEAN, 1).video
    assert len(seen) == 4
    found = torch.autograd.grad(video[:, :, LAYOUT.start(2) : LAYOUT.end(2)].sum(), seen, allow_unused=True)
    assert [g is not None and float(g.abs().max()) > 0 for g in found] == [False, False, True, False]


def test_parameters_get_gradients_text_projections_too() -> None:
    student = build_student()
    (roll(student, CLEAN, 3).video * WEIGHTS).sum().backward()
    without = [name for name, p in student.named_parameters() if p.grad is None]
    assert without == []
    for block in student.blocks:
        for layer in (block.attn2.to_k, block.attn2.to_v):
            assert layer.weight.grad is not None
            assert float(layer.weight.grad.abs().max()) > 1e-8


@pytest.mark.parametrize("settings", [CLEAN, NOISY, AVERAGED, QUANTISED])
def test_replayed_gradients_are_those_of_the_single_graph(settings: CausalSettings) -> None:
    student = build_student()
    result = roll(student, settings, 1)
    loss = (result.video.tanh() * WEIGHTS).sum()
    loss.backward()
    expected = [g.clone() for g in gradients(student)]
    student.zero_grad()
    with torch.no_grad():
        again = roll(student, settings, 1)
    assert torch.equal(again.video, result.video)
    leaf = again.video.detach().requires_grad_()
    (leaf.tanh() * WEIGHTS).sum().backward()
    assert leaf.grad is not None
    replayed_backward(student, again.exits, text(), leaf.grad)
    found = gradients(student)
    assert len(found) == len(expected)
    scale = max(float(g.abs().max()) for g in expected)
    assert max(largest(a, b) for a, b in zip(found, expected, strict=True)) < 1e-12 * max(1, scale)
    with pytest.raises(ValueError, match="7 frames, the gradient 6"):
        replayed_backward(student, again.exits, text(), leaf.grad[:, :, :6])


def test_checkpointing_changes_no_gradient_with_evictions() -> None:
    found: list[list[Tensor]] = []
    for recompute in (False, True):
        student = build_student()
        if recompute:
            student.transformer.enable_gradient_checkpointing()
        (roll(student, AVERAGED, 1).video * WEIGHTS).sum().backward()
        found.append(gradients(student))
    assert len(found[0]) == len(found[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_noisy_context_is_the_exit_call_or_the_prediction_noised_again() -> None:
    student = build_student()
    times = NOISY.schedule.of(1)
    for exit_step in (0, 1):
        result = roll(student, NOISY, exit_step)
        step = result.exits[1]
        if exit_step == 1:
            expected = student.append(step.x, step.t, text(), step.prefix).keys_values
        else:
            x0 = result.video[:, :, 1:3].detach()
            t = torch.full((2,), times[-1], dtype=torch.float64)
            x = add_noise(x0, noise().draw(1, len(times), 2, x0), t)
            expected = student.append(x, t, text(), step.prefix).keys_values
        assert expected is not None
        # Chunk 2 sees chunk 1 last.
        stored = result.exits[2].prefix.parts[-1].layer(2)[0]
        assert largest(stored, expected.keys[2]) < 1e-12
    # Chunk 0 comes before `noisy_from`: its context is clean.
    clean = student.append(
        result.video[:, :, :1].detach(), torch.zeros(2, dtype=torch.float64), text(), result.exits[0].prefix
    ).keys_values
    assert clean is not None
    assert largest(result.exits[1].prefix.parts[0].layer(2)[0], clean.keys[2]) < 1e-12


def test_noise_depends_on_sample_chunk_and_step_alone() -> None:
    student = build_student().requires_grad_(False)
    whole = roll(student, CLEAN, 3)
    exits = CLEAN.schedule.exits(3, 2)
    part = rollout(student, VideoCondition(text()), noise(), CLEAN, exits=exits)
    assert torch.equal(part.video, whole.video[:, :, :3])
    rest = rollout(
        student, VideoCondition(text()), noise(), CLEAN, exits=CLEAN.schedule.exits(3, 2, first=2), cache=part.cache
    )
    assert torch.equal(rest.video, whole.video[:, :, 3:])
    one = rollout(student, VideoCondition(text()[1:]), ChunkNoise(0, (1,), SIZE), CLEAN, exits=exits)
    assert largest(one.video, part.video[1:]) < 1e-12
    draws = {(c, s): noise().draw(c, s, 1, text()) for c in range(3) for s in range(3)}
    keys = list(draws)
    assert all(largest(draws[a], draws[b]) > 0.1 for a in keys for b in keys if a < b)
    assert largest(noise(iteration=1).draw(0, 0, 1, text()), draws[0, 0]) > 0.1
    assert noise().draw(0, 0, 1, text().bfloat16()).dtype == torch.float32


def test_two_processes_draw_other_noise_and_the_same_exits() -> None:
    ranks = [ChunkNoise(3, (2 * rank, 2 * rank + 1), SIZE, iteration=5) for rank in range(2)]
    assert largest(ranks[0].draw(0, 0, 2, text()), ranks[1].draw(0, 0, 2, text())) > 0.1
    exits = [CLEAN.schedule.exits(random_exit(CLEAN.schedule, 3, 5), 4) for _ in ranks]
    assert exits[0] == exits[1]
    assert len(exits[0]) == 4


def test_a_given_first_frame_stays_and_is_seen() -> None:
    student = build_student()
    settings = CausalSettings(ChunkLayout.uniform(6, 3), schedule=StepSchedule.steps([2]))
    image = latents(1, seed=4)
    condition = VideoCondition(text(), image)
    video = rollout(student, condition, noise(), settings, exits=(1, 1)).video
    assert torch.equal(video[:, :, :1], image)
    plain = rollout(student, VideoCondition(text()), noise(), settings, exits=(1, 1)).video
    assert largest(video[:, :, 1:3], plain[:, :, 1:3]) > 1e-3
    assert largest(video[:, :, 3:], plain[:, :, 3:]) > 1e-3
    assert largest(video[:, :, 3:4], image) > 1e-3
    video[:, :, 1:3].sum().backward()
    assert len(gradients(student)) > 0
    early = rollout(student, VideoCondition(text()), noise(), settings, exits=(1,))
    with pytest.raises(ValueError, match="at chunk 1"):
        rollout(student, condition, noise(), settings, exits=(1,), cache=early.cache)


def test_a_given_first_frame_stays_clean_in_noisy_context() -> None:
    student = build_student().requires_grad_(False)
    settings = CausalSettings(ChunkLayout.uniform(6, 3), CachePolicy(noisy_from=0), StepSchedule.steps([2]))
    image = latents(1, seed=4)
    result = rollout(student, VideoCondition(text(), image), noise(), settings, exits=(0, 0))
    x0, last = result.video[:, :, :3], settings.schedule.of(0)[-1]
    t = torch.tensor([[0.0, last, last]] * 2, dtype=torch.float64)
    x = add_noise(x0, noise().draw(0, 2, 3, x0), t)
    expected = student.append(x, t, text(), result.exits[0].prefix).keys_values
    assert expected is not None
    assert torch.equal(x[:, :, :1], image)
    assert largest(result.exits[1].prefix.parts[0].layer(2)[0], expected.keys[2]) < 1e-12


def test_actions_are_cut_into_chunks() -> None:
    student = build_student(extra=2).requires_grad_(False)
    extra = latents(seed=7, channels=2)
    exits = CLEAN.schedule.exits(1, 4)
    video = rollout(student, VideoCondition(text(), extra=extra), noise(), CLEAN, exits=exits).video
    later = extra.clone()
    later[:, :, LAYOUT.start(2) :] += 1
    changed = rollout(student, VideoCondition(text(), extra=later), noise(), CLEAN, exits=exits).video
    assert torch.equal(video[:, :, :3], changed[:, :, :3])
    assert largest(video[:, :, 3:5], changed[:, :, 3:5]) > 1e-3
    # A rollout that goes on takes the channels of its own frames.
    begun = rollout(student, VideoCondition(text(), extra=extra[:, :, :3]), noise(), CLEAN, exits=exits[:2])
    rest = VideoCondition(text(), extra=extra[:, :, 3:])
    gone_on = rollout(student, rest, noise(), CLEAN, exits=exits[2:], cache=begun.cache)
    assert torch.equal(gone_on.video, video[:, :, 3:])
    with pytest.raises(ValueError, match="are missing"):
        rollout(student, VideoCondition(text(), extra=extra[:, :, :6]), noise(), CLEAN, exits=exits)


def test_an_exit_network_takes_the_place_at_exits_alone() -> None:
    student = build_student()
    wrapper = torch.nn.Sequential(student)
    log = logged(student)
    with torch.no_grad():
        plain = roll(student, CLEAN, 1).video
    log.grads.clear()
    calls: list[int] = []
    wrapper.register_forward_hook(lambda *_: calls.append(1))  # pyright: ignore[reportArgumentType]
    video = roll(student, CLEAN, 1, exit_network=wrapper).video
    assert len(calls) == 4 == sum(log.grads)
    assert torch.equal(video.detach(), plain)


def test_rollouts_that_cannot_be_are_refused() -> None:
    student = build_student()
    condition = VideoCondition(text())
    with pytest.raises(ValueError, match="exits is empty"):
        rollout(student, condition, noise(), CLEAN, exits=())
    with pytest.raises(ValueError, match="chunk 1 has steps 0 to 1, got the exit 2"):
        rollout(student, condition, noise(), CLEAN, exits=(0, 2))
    other = RollingCache.empty(LAYOUT, CachePolicy())
    with pytest.raises(ValueError, match="another layout or policy"):
        rollout(student, condition, noise(), CLEAN, exits=(0,), cache=other)
    with pytest.raises(ValueError, match="2 calls need as many noise"):
        denoise_chunk(student, [latents(1)], [1.0, 0.5], condition, other.read())


@pytest.mark.parametrize("settings", [CLEAN, NOISY, AVERAGED, QUANTISED])
def test_a_rollout_without_a_replay_holds_no_keys_beside_the_cache(settings: CausalSettings) -> None:
    """The same numbers; keys and values that the cache has forgotten can go while the rollout is held."""
    student, chunks = build_student(), 9
    exits = settings.schedule.exits(settings.schedule.longest - 1, chunks)
    with torch.no_grad():
        kept = rollout(student, VideoCondition(text()), noise(), settings, exits=exits)
        lean = rollout(student, VideoCondition(text()), noise(), settings, exits=exits, replayable=False)
    assert torch.equal(lean.video, kept.video)
    assert lean.cache.bytes() == kept.cache.bytes()
    assert max(len(step.prefix.parts) for step in kept.exits) > 0
    assert [len(step.prefix.parts) for step in lean.exits] == [0] * chunks
