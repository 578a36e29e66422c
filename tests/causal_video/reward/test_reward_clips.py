"""Scorers of clips of moving digits: closed forms, real clips, and names that do not fit."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.dmd.reward.config import RewardSettings, ScorerConfig
from fewstep.dmd.reward.scorers import SCORERS, load_scorers
from fewstep.dmd.reward.scores import RewardModel
from fewstep.embedded.digits.scorers import Slant
from fewstep.embedded.moving_digits.clips import MovingDigits, moving_digits
from fewstep.embedded.moving_digits.judges import load_judges
from fewstep.embedded.moving_digits.scorers import ClipLight, ClipMotion, ClipMotionError, pieces
from fewstep.evaluation.scorers.scorer import score

SHIPPED = Path(__file__).resolve().parents[3] / "assets" / "digits_video" / "judges"
CPU = torch.device("cpu")
JUDGED = tuple(name for name, row in SCORERS.items() if row.judges_clips and row.has_weights)
OTHER = {"left": "right", "right": "left", "up": "down", "down": "up"}


@pytest.fixture(scope="module")
def clips() -> MovingDigits:
    """Windows as they come from the middle of streams: 28 frames."""
    return moving_digits("test", seed=3, indices=range(24), frames=28)


def judged(name: str, clips: MovingDigits, prompts: list[str]) -> Tensor:
    (scorer,) = load_scorers([ScorerConfig(name=name, weights=str(SHIPPED))], device=CPU, videos=True)
    return score(scorer, clips.pixels, prompts)


def exchanged(prompts: tuple[str, ...], words: dict[str, str]) -> list[str]:
    return [" ".join(words.get(word, word) for word in prompt.split()) for prompt in prompts]


@pytest.mark.parametrize(("frames", "starts"), [(25, [0]), (28, [0, 3]), (50, [0, 25]), (51, [0, 25, 26])])
def test_pieces_cover_a_clip(frames: int, starts: list[int]) -> None:
    assert pieces(frames) == starts
    assert sorted({start + frame for start in starts for frame in range(25)}) == list(range(frames))


def test_judges_prefer_what_was_asked_for(clips: MovingDigits) -> None:
    asked = list(clips.captions)
    wrong = {
        "clip_digit": exchanged(clips.captions, {"seven": "one", "one": "eight", "eight": "zero", "zero": "seven"}),
        "clip_direction": exchanged(clips.captions, OTHER),
        "clip_axis": exchanged(clips.captions, {"left": "up", "right": "down", "up": "left", "down": "right"}),
        "clip_speed": exchanged(clips.captions, {"slowly": "quickly", "quickly": "slowly"}),
    }
    assert tuple(wrong) == JUDGED
    for name, others in wrong.items():
        changed = torch.tensor([left != right for left, right in zip(asked, others, strict=True)])
        right, other = judged(name, clips, asked), judged(name, clips, others)
        assert int(changed.sum()) > 4
        assert float((right > other)[changed].float().mean()) > 0.8, name
        assert torch.equal(right[~changed], other[~changed])
        assert float(right.max()) <= 0.0
        assert float(right.median()) > -0.5


def test_an_axis_does_not_know_left_from_right(clips: MovingDigits) -> None:
    asked, mirrored = list(clips.captions), exchanged(clips.captions, OTHER)
    turned = exchanged(clips.captions, {"left": "up", "right": "down", "up": "left", "down": "right"})
    assert torch.equal(judged("clip_axis", clips, asked), judged("clip_axis", clips, mirrored))
    first = moving_digits("test", seed=3, indices=range(24))
    total = judged("clip_axis", first, asked).double().exp() + judged("clip_axis", first, turned).double().exp()
    assert float((total - 1).abs().max()) < 1e-5
    asked_for = [exchanged(clips.captions, dict.fromkeys(OTHER, word)) for word in OTHER]
    each = torch.stack([judged("clip_direction", first, prompts) for prompts in asked_for])
    directions = each.double().exp().sum(dim=0)
    assert float((directions - 1).abs().max()) < 1e-5


def test_the_direction_is_that_of_the_first_frames(clips: MovingDigits) -> None:
    first = moving_digits("test", seed=3, indices=range(24))
    prompts = list(clips.captions)
    assert torch.equal(judged("clip_direction", clips, prompts), judged("clip_direction", first, prompts))
    assert not torch.equal(judged("clip_speed", clips, prompts), judged("clip_speed", first, prompts))


def test_motion_is_measured_against_the_speed_of_the_prompt(clips: MovingDigits) -> None:
    swapped = exchanged(clips.captions, {"slowly": "quickly", "quickly": "slowly"})
    right = ClipMotionError()(clips.pixels, list(clips.captions))
    wrong = ClipMotionError()(clips.pixels, swapped)
    # Speeds are 0.5 and 1; only the frames in which a digit turns differ.
    assert float(right.max()) < 0.1
    assert float((wrong - 0.5).abs().max()) < 0.1
    dark = torch.zeros(2, 3, 5, 32, 32)
    assert ClipMotionError()(dark, ["a one moving up slowly", "a one moving up quickly"]).tolist() == [0.5, 1.0]


def test_light_counts_frames(clips: MovingDigits) -> None:
    pixels = clips.pixels[:2].clone()
    pixels[1, :, :7] = 0.0
    assert ClipLight()(pixels, ["", ""]).tolist() == [1.0, 0.75]


def test_scorers_of_pictures_are_lifted(clips: MovingDigits) -> None:
    entries = [
        ScorerConfig(name="stroke_weight"),
        ScorerConfig(name="stroke_weight", frames=0.25),
        ScorerConfig(name="clip_light"),
    ]
    every, best, light = load_scorers(entries, device=CPU, videos=True)
    assert [s.card.name for s in (every, best, light)] == [
        "stroke_weight_frames",
        "stroke_weight_best_0.25",
        "clip_light",
    ]
    ink = clips.pixels.mean(dim=(1, 3, 4))
    assert float((score(every, clips.pixels, list(clips.captions)) - ink.mean(dim=1)).abs().max()) < 1e-6
    top = ink.sort(dim=1, descending=True).values[:, :7].mean(dim=1)
    assert float((score(best, clips.pixels, list(clips.captions)) - top).abs().max()) < 1e-6


def test_scorers_that_do_not_fit_are_named(clips: MovingDigits) -> None:
    for entry, message in (
        (ScorerConfig(name="clip_digit"), "clip_digit takes a folder of judges as weights"),
        (ScorerConfig(name="clip_light", weights="x"), "clip_light takes no weights"),
        (ScorerConfig(name="clip_light", frames=0.5), "no share of frames"),
        (ScorerConfig(name="clip_taste"), "scorer is 'clip_taste'; use one of stroke_weight"),
        (ScorerConfig(name="clip_speed", weights="nowhere"), "no weights of judges at nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            load_scorers([entry], device=CPU, videos=True)
    with pytest.raises(
        ValueError, match=r"clip_speed judges 25 frames, and the clips have 24: make astrolabe\.chunks larger"
    ):
        ClipMotion(load_judges(SHIPPED), "speed")(clips.pixels[:, :, :24], list(clips.captions))
    settings = RewardSettings(scorers=(ScorerConfig(name="slant"),))
    with pytest.raises(ValueError, match="a scorer of videos cannot judge pictures"):
        RewardModel((ClipLight(),), settings, gradient=False)
    with pytest.raises(ValueError, match="a scorer of pictures cannot judge videos"):
        RewardModel((Slant(),), settings, gradient=False, videos=True)
