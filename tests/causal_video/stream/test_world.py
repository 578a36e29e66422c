"""Actions as conditioning channels, and worlds that are steered by actions or by their prompt."""

import io

import pytest
import torch
from PIL import Image

from fewstep.causal_video.model.prefix import KeysValues
from fewstep.causal_video.stream.play import MOST_SNAPSHOTS, World
from fewstep.causal_video.stream.state import state_bytes
from fewstep.causal_video.stream.world import ActionSpace, latent_actions, spread
from tests.causal_video.tiny_causal import largest
from tests.causal_video.tiny_streams import NAMES, action_pipeline, latents_of, text_pipeline

SPACE = ActionSpace(NAMES)


def test_an_action_enters_with_the_share_of_its_frames() -> None:
    names = ["none", "left", "left", "left", "up", "none", "none", "right", "right"]
    channels = SPACE.channels(names, (2, 3, 4, 5), is_start=True)
    assert channels.shape == (2, 4, 3, 4, 5)
    expected = torch.tensor([[0, 0.75, 0], [0, 0, 0.5], [0, 0.25, 0], [0, 0, 0]])
    assert torch.equal(channels[1, :, :, 3, 2], expected)
    assert torch.equal(channels, channels[:1, :, :, :1, :1].expand_as(channels))
    held = SPACE.channels("down", (1, 2, 1, 1), is_start=False)
    assert held[0, :, :, 0, 0].tolist() == [[0, 0], [0, 0], [0, 0], [1, 1]]
    assert SPACE.channels("none", (1, 1, 1, 1), is_start=True).tolist() == [[[[[0]]]] * 4]


def test_actions_in_pieces_are_those_of_the_whole() -> None:
    actions = torch.rand(2, 17, 3, generator=torch.Generator().manual_seed(0))
    whole = latent_actions(actions)
    assert whole.shape == (2, 3, 5)
    pieces = [latent_actions(actions[:, :5]), latent_actions(actions[:, 5:], is_start=False)]
    assert torch.equal(torch.cat(pieces, dim=2), whole)
    assert torch.equal(whole[:, :, 0], actions[:, 0])
    assert torch.allclose(whole[:, :, 4], actions[:, 13:].mean(dim=1))
    assert spread(whole, 2, 3).shape == (2, 3, 5, 2, 3)


def test_actions_that_do_not_fit_are_refused() -> None:
    for names in ((), ("left", "left"), ("none", "left")):
        with pytest.raises(ValueError, match="distinct names"):
            ActionSpace(names)
    with pytest.raises(ValueError, match=r"unknown actions \['jump'\]"):
        SPACE.channels("jump", (1, 1, 1, 1), is_start=True)
    with pytest.raises(ValueError, match="8 pixel frames here, got 9"):
        SPACE.channels(["left"] * 9, (1, 2, 1, 1), is_start=False)
    with pytest.raises(ValueError, match=r"T = 1 \+ 4 k pixel frames at the start"):
        latent_actions(torch.zeros(1, 4, 2))
    with pytest.raises(ValueError, match="T = 4 k pixel frames after the start"):
        latent_actions(torch.zeros(1, 5, 2), is_start=False)


def test_words_steer_as_their_channels_do() -> None:
    pipe = action_pipeline()
    session, by_hand = pipe.open("a red cat"), pipe.open("a red cat")
    words = [session.step("left"), session.step(["up"] * 4 + ["down"] * 4), session.step("none")]
    channels = [torch.zeros(1, 4, n, 8, 8) for n in (1, 2, 2)]
    channels[0][:, 0] = 1
    channels[1][:, 2, 0] = 1
    channels[1][:, 3, 1] = 1
    assert torch.equal(latents_of(words), latents_of(list(by_hand.stream(3, channels))))
    other = pipe.open("a red cat")
    other.step("left")
    assert largest(other.step("right").latents, words[1].latents) > 1e-3
    state = session.snapshot()
    with pytest.raises(ValueError, match="takes 4 conditioning channels"):
        session.step()
    assert session.snapshot() is state
    for pipelined in (False, True):
        again = pipe.open("a red cat").stream(2, ["left", ["up"] * 4 + ["down"] * 4], pipelined=pipelined)
        assert torch.equal(latents_of(list(again)), latents_of(words[:2]))


def test_a_clip_is_continued_with_its_actions() -> None:
    pipe = action_pipeline()
    clip = torch.rand(3, 9, 32, 32, generator=torch.Generator().manual_seed(3))
    held = ["none", *["left"] * 4, *["up"] * 4]
    made = []
    channels = SPACE.channels(held, (1, 3, 8, 8), is_start=True)
    for action in (held, channels):
        session = pipe.open("a red cat")
        session.feed(clip, action)
        assert session.chunk == 2
        made.append(session.step("right").latents)
    assert torch.equal(made[0], made[1])
    session = pipe.open("a red cat")
    before = session.snapshot()
    for action, message in (
        (None, "takes 4 conditioning channels"),
        (held[:5], "9 pixel frames here, got 5"),
        (channels[:, :2], "takes 4 conditioning channels"),
    ):
        with pytest.raises(ValueError, match=message):
            session.feed(clip, action)
        assert session.snapshot() is before
    session.feed(clip, "left")
    assert largest(session.step("right").latents, made[0]) > 1e-4


@pytest.mark.parametrize("pipelined", [False, True])
def test_actions_count_from_a_cut(pipelined: bool) -> None:
    session = action_pipeline().open("a red cat")
    session.set_prompt("two dogs", "hard", at_chunk=2)
    outputs = list(session.stream(4, ["left", ["up"] * 8, ["down"], ["right"] * 8], pipelined=pipelined))
    assert [len(output.images()) for output in outputs] == [1, 8, 1, 8]
    session.set_prompt("two dogs", "hard")
    with pytest.raises(ValueError, match="1 pixel frames here, got 8"):
        session.step(["up"] * 8)
    assert len(session.step(["up"]).images()) == 1


def test_a_world_of_actions() -> None:
    world = World(action_pipeline(), "a red cat", seed=2)
    first, second = world.step("left"), world.step("up")
    assert [len(chunk.pictures) for chunk in (first, second)] == [1, 8]
    session = action_pipeline().open("a red cat", seed=2)
    for chunk, action in ((first, "left"), (second, "up")):
        expected = session.step(action).images()
        for picture, image in zip(chunk.pictures, expected, strict=True):
            assert Image.open(io.BytesIO(picture)).tobytes() == image.tobytes()
    status = world.status()
    assert (status.chunk, status.steering, status.actions, status.size) == (2, "actions", NAMES, (32, 32))
    with pytest.raises(ValueError, match="unknown action 'jump'"):
        world.step("jump")
    with pytest.raises(ValueError, match="takes actions themselves: leave"):
        world.set_prompt("a cat moving {action}")
    number = world.save()
    after = world.step("down")
    world.restore(number)
    assert world.step("down").pictures == after.pictures
    world.reset(2)
    assert world.step("left").pictures == first.pictures
    with pytest.raises(ValueError, match="there is no snapshot 9"):
        world.restore(9)
    for _ in range(MOST_SNAPSHOTS):
        world.save()
    assert world.status().snapshots == tuple(range(2, MOST_SNAPSHOTS + 2))


def test_snapshots_keep_to_a_budget_of_bytes() -> None:
    """What snapshots share counts once; the oldest go first; one that is larger than all may be is refused."""
    session = action_pipeline().open("a red cat", seed=2)
    states = [session.snapshot()]
    for _ in range(4):
        session.step("left")
        states.append(session.snapshot())
    sizes = [state_bytes([state]) for state in states]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    whole = state_bytes(states)
    assert sizes[-1] < whole < sum(sizes)
    assert state_bytes([states[-1], states[-1]]) == sizes[-1]
    # A cache entry of keys and values alone, by hand: layers x heads x tokens x width numbers of each.
    entry = states[-1].cache.entries[0].content
    assert isinstance(entry, KeysValues)
    assert sizes[-1] > 4 * (entry.keys.numel() + entry.values.numel())

    world = World(action_pipeline(), "a red cat", seed=2, snapshot_bytes=2 * sizes[-1])
    numbers = []
    for _ in range(6):
        world.step("left")
        numbers.append(world.save())
    kept = world.status().snapshots
    assert kept == tuple(numbers[-len(kept) :])
    assert 1 <= len(kept) < 6
    assert state_bytes([world.snapshot(number) for number in kept]) <= 2 * sizes[-1]
    small = World(action_pipeline(), "a red cat", snapshot_bytes=sizes[0] // 2)
    with pytest.raises(ValueError, match=r"a snapshot holds .* MB and .* MB are allowed: give --snapshot_gb more"):
        small.save()
    assert small.status().snapshots == ()
    with pytest.raises(ValueError, match="snapshot_bytes is 0"):
        World(action_pipeline(), "a red cat", snapshot_bytes=0)


def test_a_world_that_is_steered_by_its_prompt() -> None:
    pipe = text_pipeline()
    world = World(pipe, "cat {action}", actions=("left", "up"), mode="cross_only")
    assert world.status().steering == "prompt"
    made = [world.step("none"), world.step("up"), world.step("none"), world.step("left")]
    session = pipe.open("cat left")
    expected = [session.step()]
    session.set_prompt("cat up", "cross_only")
    expected += [session.step(), session.step()]
    session.set_prompt("cat left", "cross_only")
    expected += [session.step()]
    sizes = [len(chunk.pictures) for chunk in made]
    assert sizes == [1, 8, 8, 8]
    for chunk, output in zip(made, expected, strict=True):
        assert Image.open(io.BytesIO(chunk.pictures[-1])).tobytes() == output.images()[-1].tobytes()
    world.set_prompt("dog", "hard")
    assert world.status().steering == "none"
    assert world.status().actions == ()
    assert len(world.step("up").pictures) == 1
    with pytest.raises(ValueError, match="mode must be"):
        World(pipe, "cat", mode="soft")  # pyright: ignore[reportArgumentType]
