"""Decoding beside generation: the same frames, prompts that come in time, and errors that come through."""

import dataclasses
import threading

import pytest
import torch
from torch import Tensor, nn

from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.policy import CachePolicy
from fewstep.causal_video.schedule import StepSchedule
from fewstep.causal_video.settings import CausalSettings
from fewstep.causal_video.stream.session import StreamSession
from fewstep.causal_video.stream.state import PromptMode
from tests.causal_video.tiny_causal import build_student, build_vae, noise, shared_student, text
from tests.causal_video.tiny_streams import frames_of, latents_of

SETTINGS = CausalSettings(ChunkLayout((1, 2)), CachePolicy(4, 1, "static"), StepSchedule.steps([3, 2]))


def opened(network: nn.Module | None = None) -> StreamSession:
    """A session that decodes."""
    student = shared_student() if network is None else network
    return StreamSession(student, text(), noise(), SETTINGS, vae=build_vae())  # pyright: ignore[reportArgumentType]


def test_frames_are_the_same() -> None:
    plain, beside = opened(), opened()
    one = list(plain.stream(5))
    two = list(beside.stream(5, pipelined=True))
    assert [output.chunk for output in two] == [0, 1, 2, 3, 4]
    assert torch.equal(latents_of(one), latents_of(two))
    assert torch.equal(frames_of(one), frames_of(two))
    assert frames_of(two).shape[2] == 33
    assert torch.equal(plain.step().latents, beside.step().latents)


def test_generation_runs_in_another_thread() -> None:
    student = build_student()
    seen: list[int] = []
    student.register_forward_hook(lambda *_: seen.append(threading.get_ident()))
    list(opened(student).stream(3, pipelined=True))
    assert len(seen) == 3 + 2 + 2 + 2
    assert set(seen) != {threading.get_ident()}
    assert len(set(seen)) == 1


@pytest.mark.parametrize("mode", ["recache", "cross_only", "hard"])
def test_a_prompt_between_chunks_holds_from_the_next_one_on(mode: PromptMode) -> None:
    results: list[Tensor] = []
    for pipelined in (False, True):
        session, outputs = opened(), []
        for output in session.stream(5, pipelined=pipelined):
            outputs.append(output)
            if output.chunk == 1:
                session.set_prompt(text(seed=5), mode)
        results.append(frames_of(outputs))
    assert torch.equal(results[0], results[1])


def test_the_state_is_that_of_the_chunk_that_was_shown() -> None:
    session, plain = opened(), list(opened().stream(4))
    taken = []
    for output in session.stream(4, pipelined=True):
        taken.append(output)
        if output.chunk == 1:
            break
    assert session.snapshot().chunk == 2
    taken += [session.step(), session.step()]
    assert torch.equal(frames_of(taken), frames_of(plain))
    session = opened()
    stream = session.stream(3, pipelined=True)
    next(stream)
    saved = session.snapshot()
    next(stream)
    session.restore(saved)
    assert torch.equal(next(stream).latents, plain[1].latents)


def test_errors_of_the_thread_come_through_and_the_session_goes_on() -> None:
    student = build_student()
    plain = list(opened(student).stream(4))
    calls: list[int] = []

    def fail_once(*_: object) -> None:
        calls.append(1)
        if len(calls) == 8:
            raise RuntimeError("out of memory")

    for pipelined in (False, True):
        calls.clear()
        session, taken = opened(student), []
        handle = student.register_forward_pre_hook(fail_once)
        stream = session.stream(4, pipelined=pipelined)
        # Call 8 is the first of chunk 2, after the context calls of chunks 0 and 1.
        taken += [next(stream), next(stream)]
        with pytest.raises(RuntimeError, match="out of memory"):
            next(stream)
        handle.remove()
        assert session.snapshot().chunk == 2
        taken += list(session.stream(4 - len(taken), pipelined=pipelined))
        assert torch.equal(frames_of(taken), frames_of(plain))


def test_a_chunk_that_is_not_finite_is_an_error_and_not_shown() -> None:
    session = opened()
    session.step()
    sound = session.snapshot()
    prompt = sound.prompt
    # Values, because attention on the CPU takes a key that is NaN for one that is not there.
    broken = dataclasses.replace(prompt, values=tuple(value * float("nan") for value in prompt.values))
    session.restore(dataclasses.replace(sound, condition=dataclasses.replace(sound.condition, text=broken)))
    with pytest.raises(ValueError, match="chunk 1 is not finite"):
        session.step()
    assert session.snapshot().chunk == 1
    session.restore(sound)
    assert bool(session.step().latents.isfinite().all())
