"""Streaming sessions: the same video however it is asked for, prompts, actions, and snapshots."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.causal_video.denoise import VideoCondition
from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.policy import CachePolicy
from fewstep.causal_video.rollout import rollout, switched_rollout
from fewstep.causal_video.schedule import StepSchedule
from fewstep.causal_video.settings import CausalSettings
from fewstep.causal_video.stream.session import StreamSession
from fewstep.causal_video.stream.state import MODES, PromptMode, PromptSwitch
from fewstep.causal_video.vae_stream import decode_stream
from fewstep.core.paths import add_noise
from tests.causal_video.tiny_causal import build_student, build_vae, largest, latents, noise, shared_student, text

LAYOUT = ChunkLayout((1, 2))
SCHEDULE = StepSchedule.steps([3, 2])
CLEAN = CausalSettings(LAYOUT, CachePolicy(4, 1, "static"), SCHEDULE)
NOISY = CausalSettings(LAYOUT, CachePolicy(4, noisy_from=1, quantise="int8"), SCHEDULE)
AVERAGED = CausalSettings(ChunkLayout.uniform(2, 2), CachePolicy(4, 2, "ema"), SCHEDULE)


def opened(settings: CausalSettings = CLEAN, **options: object) -> StreamSession:
    """A session of the shared student, text and noise."""
    return StreamSession(shared_student(), text(), noise(), settings, **options)  # pyright: ignore[reportArgumentType]


def video(session: StreamSession, chunks: int) -> Tensor:
    """Latents of the next chunks."""
    return torch.cat([output.latents for output in session.stream(chunks)], dim=2)


@pytest.mark.parametrize("settings", [CLEAN, NOISY, AVERAGED])
def test_a_stream_is_the_rollout_of_training(settings: CausalSettings) -> None:
    exits = settings.schedule.exits(2, 6)
    with torch.no_grad():
        rolled = rollout(shared_student(), VideoCondition(text()), noise(), settings, exits=exits)
    session = opened(settings)
    assert torch.equal(video(session, 6), rolled.video)
    assert session.snapshot().chunk == 6
    # The context of the last chunk is not computed before it is needed.
    assert session.snapshot().cache.next_chunk == 5


def test_the_first_chunks_do_not_depend_on_how_many_are_asked_for() -> None:
    long = video(opened(), 6)
    session = opened()
    assert torch.equal(torch.cat([video(session, 1), video(session, 2)], dim=2), long[:, :, :5])
    assert torch.equal(opened().step().latents, long[:, :, :1])


@pytest.mark.parametrize("settings", [CLEAN, NOISY, AVERAGED])
def test_snapshots_resume_to_the_last_bit(settings: CausalSettings) -> None:
    session = opened(settings, vae=build_vae())
    list(session.stream(3))
    saved = session.snapshot()
    first = [session.step() for _ in range(3)]
    session.set_prompt(text(seed=5))
    session.step()
    session.restore(saved)
    again = [session.step() for _ in range(3)]
    assert [output.chunk for output in again] == [3, 4, 5]
    for a, b in zip(first, again, strict=True):
        assert a.frames is not None
        assert b.frames is not None
        assert torch.equal(a.latents, b.latents)
        assert torch.equal(a.frames, b.frames)


def test_frames_are_those_of_one_decode() -> None:
    vae = build_vae()
    outputs = list(opened(vae=vae).stream(3))
    frames = [output.frames for output in outputs if output.frames is not None]
    assert [f.shape[2] for f in frames] == [1, 8, 8]
    whole, _ = decode_stream(vae, torch.cat([output.latents for output in outputs], dim=2))
    assert torch.equal(torch.cat(frames, dim=2), whole)
    assert all(output.seconds.denoise > 0 and output.seconds.decode > 0 for output in outputs)
    assert opened().step().frames is None


@pytest.mark.parametrize("settings", [CLEAN, CausalSettings(LAYOUT, CachePolicy(4, noisy_from=0), SCHEDULE), AVERAGED])
def test_a_given_first_frame_is_that_of_the_rollout(settings: CausalSettings) -> None:
    image = latents(1, seed=4)
    condition = VideoCondition(text(), image)
    with torch.no_grad():
        rolled = rollout(shared_student(), condition, noise(), settings, exits=settings.schedule.exits(2, 3))
    streamed = video(opened(settings, image=image), 3)
    assert torch.equal(streamed[:, :, :1], image)
    assert largest(streamed, rolled.video) < 1e-12
    with pytest.raises(ValueError, match=r"latent of an image must be \[2, 4, 1, 4, 4\]"):
        opened(settings, image=latents(2))


@pytest.mark.parametrize("mode", MODES)
def test_a_new_prompt_changes_what_comes_after_it(mode: PromptMode) -> None:
    plain, session = video(opened(), 6), opened()
    before = video(session, 3)
    session.set_prompt(text(seed=5), mode)
    after = video(session, 3)
    assert torch.equal(before, plain[:, :, :5])
    if mode == "hard":
        # A cut is a new video: the short first chunk and its schedule come again.
        assert after.shape[2] == 5
        assert largest(after[:, :, :1], plain[:, :, 5:6]) > 1e-3
    else:
        assert after.shape[2] == 6
        assert largest(after[:, :, :2], plain[:, :, 5:7]) > 1e-3


def test_a_cut_starts_the_decoder_anew_and_goes_on_with_the_noise() -> None:
    session = opened(vae=build_vae())
    shown = list(session.stream(2))
    session.set_prompt(text(), "hard")
    shown += list(session.stream(2))
    assert [output.chunk for output in shown] == [0, 1, 2, 3]
    assert [output.frames.shape[2] for output in shown if output.frames is not None] == [1, 8, 1, 8]
    # The same prompt, and another video.
    assert largest(shown[2].latents, shown[0].latents) > 1e-3


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("noisy_from", [None, 0, 1, 2])
def test_recache_under_the_same_prompt_changes_nothing_while_nothing_was_evicted(
    noisy_from: int | None, image: bool
) -> None:
    """Under noisy context, too: chunks are shown again at the time at which the policy shows them."""
    settings = CausalSettings(LAYOUT, CachePolicy(noisy_from=noisy_from), SCHEDULE)
    given = latents(1, seed=4) if image else None
    plain, session = video(opened(settings, image=given), 5), opened(settings, image=given)
    video(session, 3)
    session.set_prompt(text(), "recache")
    assert largest(video(session, 2), plain[:, :, 5:]) < 1e-12
    modes = {}
    for mode in MODES[:2]:
        session = opened(settings)
        video(session, 3)
        session.set_prompt(text(seed=5), mode)
        modes[mode] = video(session, 1)
    assert largest(modes["recache"], modes["cross_only"]) > 1e-3


def test_a_prompt_that_is_set_before_the_first_chunk_keeps_the_image() -> None:
    image = latents(1, seed=4)
    session = opened(image=image)
    session.set_prompt(text(seed=5))
    assert torch.equal(session.step().latents, image)
    direct = StreamSession(shared_student(), text(seed=5), noise(), CLEAN, image=image)
    direct.step()
    assert torch.equal(session.step().latents, direct.step().latents)


@pytest.mark.parametrize("settings", [CLEAN, NOISY, AVERAGED])
@pytest.mark.parametrize("mode", ["recache", "cross_only"])
def test_a_rollout_changes_its_prompt_as_a_stream_does(settings: CausalSettings, mode: PromptMode) -> None:
    """At every chunk, with and without a given first frame: training and deployment are the same calls."""
    chunks, after = 5, text(seed=5)
    exits = settings.schedule.exits(settings.schedule.longest - 1, chunks)
    for at_chunk, image in ((1, None), (3, None), (4, latents(1, seed=4)), (chunks, None)):
        session = StreamSession(shared_student(), text(), noise(), settings, image=image)
        session.set_prompt(after, mode, at_chunk=at_chunk)
        condition, recached = VideoCondition(text(), image), mode == "recache"
        rolled = switched_rollout(
            shared_student(), condition, after, noise(), settings, exits=exits, at_chunk=at_chunk, recached=recached
        )
        assert largest(video(session, chunks), rolled.video) < 1e-12
        assert len(rolled.exits) == chunks
        # The chunk after it sees the same cache.
        more = rollout(shared_student(), VideoCondition(after), noise(), settings, exits=exits[-1:], cache=rolled.cache)
        assert largest(session.step().latents, more.video.detach()) < 1e-12
    with pytest.raises(ValueError, match="at_chunk is 6; the text can change at chunk 1 to 5"):
        switched_rollout(shared_student(), VideoCondition(text()), after, noise(), settings, exits=exits, at_chunk=6)


def test_actions_steer_from_their_chunk_on() -> None:
    student = build_student(extra=2).requires_grad_(False)
    actions = [latents(LAYOUT.length(c), seed=20 + c, channels=2) for c in range(4)]

    def played(last: float) -> Tensor:
        session = StreamSession(student, text(), noise(), CLEAN)
        outputs = list(session.stream(4, [*actions[:3], actions[3] + last]))
        return torch.cat([output.latents for output in outputs], dim=2)

    plain, steered = played(0), played(1)
    assert torch.equal(plain[:, :, :5], steered[:, :, :5])
    assert largest(plain[:, :, 5:], steered[:, :, 5:]) > 1e-3
    session = StreamSession(student, text(), noise(), CLEAN)
    list(session.stream(2, actions[:2]))
    session.set_prompt(text(seed=5))
    assert session.step(actions[2]).latents.shape == (2, 4, 2, 4, 4)
    with pytest.raises(ValueError, match="takes 2 conditioning channels"):
        session.step()
    with pytest.raises(ValueError, match="as many actions"):
        list(session.stream(2, actions))


def test_a_given_beginning_is_context() -> None:
    plain = video(opened(), 4)
    session = opened()
    fed = [session.feed(plain[:, :, :1]), session.feed(plain[:, :, 1:3])]
    assert torch.equal(torch.cat([output.latents for output in fed], dim=2), plain[:, :, :3])
    # The prediction of a chunk is what its context is computed from, so the stream goes on as if it had made it.
    assert largest(video(session, 2), plain[:, :, 3:]) < 1e-12
    noisy = opened(CausalSettings(LAYOUT, CachePolicy(4, noisy_from=1), SCHEDULE))
    for part in (plain[:, :, :1], plain[:, :, 1:3]):
        noisy.feed(part)
    seen = noisy.snapshot().pending
    noisy.step()
    assert seen is not None
    # What was given has no last call: it is noised to the time of one.
    t = torch.full((2,), SCHEDULE.of(1)[-1], dtype=torch.float64)
    x = add_noise(plain[:, :, 1:3], noise().draw(1, 2, 2, plain), t)
    expected = shared_student().append(x, t, text(), seen.result.exit.prefix).keys_values
    assert expected is not None
    assert largest(noisy.snapshot().cache.entries[-1].content.layer(2)[0], expected.keys[2]) < 1e-12
    with pytest.raises(ValueError, match="has 2 latent frames, got 3"):
        session.feed(latents(3))


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, 9), max_size=3))
def test_planned_cuts_are_counted_from(cuts: list[int]) -> None:
    state = replace(opened().snapshot(), switches=())
    planned = tuple(PromptSwitch(cut, state.prompt, "hard", "") for cut in sorted(cuts))
    soft = PromptSwitch(4, state.prompt, "recache", "")
    state = replace(state, switches=tuple(sorted((*planned, soft), key=lambda switch: switch.chunk)))
    expected, local = [], -1
    for chunk in range(10):
        local = 0 if chunk in cuts else local + 1
        expected.append(local)
    assert [state.local_chunk(chunk) for chunk in range(10)] == expected


def test_texts_and_chunks_of_other_shapes_are_refused() -> None:
    session = opened()
    session.step()
    before = session.snapshot()
    for shape in ((2, 5, 15), (1, 5, 16), (5, 16)):
        with pytest.raises(ValueError, match=r"text must be embeddings \[2, N, 16\]"):
            session.set_prompt(torch.zeros(shape))
    with pytest.raises(ValueError, match="cut the video as the layout does"):
        session.feed(latents(2, batch=1))
    with pytest.raises(ValueError, match="takes 0 conditioning channels"):
        session.feed(latents(2), latents(2, channels=2))
    with pytest.raises(ValueError, match="chunk 0 is past"):
        session.set_prompt(text(), at_chunk=0)
    assert session.snapshot() is before


def test_other_modes_and_snapshots_of_other_settings_are_refused() -> None:
    session = opened()
    with pytest.raises(ValueError, match="mode must be"):
        session.set_prompt(text(), "soft")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="another layout, policy or schedule"):
        session.restore(opened(NOISY).snapshot())
