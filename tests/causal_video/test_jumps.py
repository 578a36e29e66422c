"""Students of two times jump along their flow map: streams, rollouts, early exits and their gradients, in float64."""

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.causal_video.cache.rolling import RollingCache
from fewstep.causal_video.denoise import VideoCondition
from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.model.calls import Call, chunk_call, packed_call
from fewstep.causal_video.model.masks import teacher_forcing
from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.policy import KEEP_ALL, CachePolicy
from fewstep.causal_video.rollout import replayed_backward, rollout, steps_to_exit
from fewstep.causal_video.schedule import StepSchedule
from fewstep.causal_video.settings import CausalSettings
from fewstep.causal_video.stream.files import load_state, save_state
from fewstep.causal_video.stream.session import StreamSession
from fewstep.core.two_time import add_second_time, second_time_of
from tests.causal_video.tiny_causal import FRAME_TOKENS, build_student, largest, latents, noise, text

LAYOUT = ChunkLayout((1, 2, 2, 2))
SETTINGS = CausalSettings(LAYOUT, CachePolicy(4, 1, "static"), StepSchedule.steps([4, 3]), "gate")


def build_map() -> CausalWan:
    """A random student that depends on where its steps end."""
    student = build_student()
    add_second_time(student.transformer, "gate")
    layers = second_time_of(student.transformer)
    assert layers is not None
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        for parameter in layers.second.parameters():
            parameter.add_(torch.randn_like(parameter))
    student.double()
    return student


def velocity(student: CausalWan, x: Tensor, t: float, r: float, cache: RollingCache) -> Tensor:
    ends = [torch.full((len(x),), time, dtype=x.dtype) for time in (t, r)]
    return student(chunk_call(x, ends[0], text(), cache.read(), r=ends[1])).velocity


def by_hand(student: CausalWan, chain: list[list[tuple[float, float]]]) -> Tensor:
    """Jump by jump: for each chunk where each jump starts and ends; clean context."""
    cache, chunks = RollingCache.empty(LAYOUT, SETTINGS.policy), []
    for chunk, jumps in enumerate(chain):
        x = noise().draw(chunk, 0, LAYOUT.length(chunk), text())
        for t, r in jumps:
            x = x - (t - r) * velocity(student, x, t, r, cache)
        chunks.append(x)
        kept = student.append(x.detach(), torch.zeros(2, dtype=x.dtype), text(), cache.read()).keys_values
        assert kept is not None
        cache = cache.commit(kept)
    return torch.cat(chunks, dim=2)


def jumps_of(chunk: int) -> list[tuple[float, float]]:
    times = (*SETTINGS.schedule.of(chunk), 0.0)
    return list(pairwise(times))


def test_a_stream_makes_the_jumps_of_its_schedule() -> None:
    student = build_map().requires_grad_(False)
    expected = by_hand(student, [jumps_of(chunk) for chunk in range(4)])
    session = StreamSession(student, text(), noise(), SETTINGS)
    streamed = torch.cat([session.step().latents for _ in range(4)], dim=2)
    assert largest(streamed, expected) < 1e-12
    rolled = rollout(student, VideoCondition(text()), noise(), SETTINGS, exits=SETTINGS.schedule.exits(3, 4))
    assert torch.equal(rolled.video, streamed)
    # With the end of each step untold it is another video.
    for layers in [second_time_of(student.transformer)]:
        assert layers is not None
        layers.second.load_state_dict(layers.first.state_dict())
    assert largest(by_hand(student, [jumps_of(chunk) for chunk in range(4)]), expected) > 1e-3


@pytest.mark.parametrize("exit_step", [0, 1, 2, 3])
def test_an_early_exit_is_reached_by_one_jump_and_left_by_another(exit_step: int) -> None:
    student, chain = build_map(), []
    for chunk in range(4):
        times = (*SETTINGS.schedule.of(chunk), 0.0)
        place = min(exit_step, len(times) - 2)
        if place == len(times) - 2:
            chain.append(jumps_of(chunk))
        else:
            start = [] if place == 0 else [(1.0, times[place])]
            chain.append([*start, (times[place], times[place + 1]), (times[place + 1], 0.0)])
    exits = SETTINGS.schedule.exits(exit_step, 4)
    with torch.no_grad():
        expected = by_hand(student, chain)
    done = rollout(student, VideoCondition(text()), noise(), SETTINGS, exits=exits)
    assert largest(done.video, expected) < 1e-12
    weights = latents(seed=11)
    (weights * done.video).sum().backward()
    grads = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    assert len(grads) == len(list(student.parameters()))
    student.zero_grad()
    # The same chunk by chunk, with a graph of one chunk at a time.
    with torch.no_grad():
        again = rollout(student, VideoCondition(text()), noise(), SETTINGS, exits=exits)
    assert torch.equal(again.video, done.video)
    replayed_backward(student, again.exits, text(), weights)
    replayed = [p.grad for p in student.parameters() if p.grad is not None]
    scale = max(float(grad.abs().max()) for grad in grads)
    assert max(largest(a, b) for a, b in zip(grads, replayed, strict=True)) < 1e-12 * scale


def test_times_up_to_an_exit() -> None:
    times = (1.0, 0.9, 0.6, 0.3)
    assert steps_to_exit(times, 2, jumps=False) == ((1.0, 0.9, 0.6), 0.0)
    assert steps_to_exit(times, 2, jumps=True) == ((1.0, 0.6), 0.3)
    assert steps_to_exit(times, 0, jumps=True) == ((1.0,), 0.9)
    assert steps_to_exit(times, 3, jumps=True) == (times, 0.0)


def test_a_chunk_over_the_cache_is_one_of_the_packed_call() -> None:
    """What training sees, one packed call on clean context, is what a stream calls, with any end of the step."""
    student = build_map().requires_grad_(False)
    clean, noisy = latents(seed=1), latents(seed=2)
    t = torch.tensor([0.7, 0.4], dtype=torch.float64)
    mask = teacher_forcing(LAYOUT, FRAME_TOKENS)
    packed = student(packed_call(clean, noisy, t, text(), mask=mask, r=t / 3)).velocity
    cache = RollingCache.empty(LAYOUT, KEEP_ALL)
    for chunk in range(4):
        part = slice(LAYOUT.start(chunk), LAYOUT.end(chunk))
        called = student(chunk_call(noisy[:, :, part], t, text(), cache.read(), r=t / 3)).velocity
        assert largest(called, packed[:, :, part]) < 1e-12
        kept = student.append(clean[:, :, part], torch.zeros_like(t), text(), cache.read()).keys_values
        assert kept is not None
        cache = cache.commit(kept)


def test_a_given_first_frame_stands_still() -> None:
    student, image = build_map().requires_grad_(False), latents(1, seed=9)
    layout = ChunkLayout((2, 2))
    settings = CausalSettings(layout, CachePolicy(), StepSchedule.steps([3]), "gate")
    session = StreamSession(student, text(), noise(), settings, image=image)
    shown = session.step().latents
    assert largest(shown[:, :, :1], image) < 1e-12
    assert float(shown[:, :, 1:].std()) > 0.1
    rolled = rollout(student, VideoCondition(text(), image), noise(), settings, exits=(1, 1))
    assert largest(rolled.video[:, :, :1], image) < 1e-12


def test_a_stream_goes_on_from_its_file(tmp_path: Path) -> None:
    student = build_map().requires_grad_(False)
    session = StreamSession(student, text(), noise(), SETTINGS)
    session.step()
    save_state(session.snapshot(), tmp_path / "state.safetensors")
    other = StreamSession(student, text(), noise(), SETTINGS)
    other.restore(load_state(tmp_path / "state.safetensors", student))
    assert torch.equal(other.step().latents, session.step().latents)
    assert other.settings.second_time == "gate"


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has one time and is given r: set second_time"):
        build_student()(dataclasses.replace(packed(), r=packed().t))
    with pytest.raises(ValueError, match="leave noisy_from out"):
        CausalSettings(LAYOUT, CachePolicy(noisy_from=0), second_time="sum")
    with pytest.raises(ValueError, match="second_time is 'both'; choose of none, gate, sum"):
        CausalSettings(LAYOUT, second_time="both")  # pyright: ignore[reportArgumentType]


def packed() -> Call:
    """A call of the network."""
    t = torch.tensor([0.7, 0.4], dtype=torch.float64)
    return packed_call(latents(), latents(), t, text(), mask=teacher_forcing(LAYOUT, FRAME_TOKENS))
