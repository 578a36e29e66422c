"""The study's parts: what is asked for, what the measures say of it, the table."""

import json
from pathlib import Path

import pytest
import torch
from studies import steered as study
from studies.steered_clips import action_channels

from fewstep.embedded.moving_digits.judges import load_judges
from fewstep.embedded.moving_digits.steering import SteeringResult


def result_of(obeyed: float) -> SteeringResult:
    return SteeringResult(2, 25, 0.6, obeyed, 0.5, 0.9, 1.0, (0.9, 0.8, 0.7), (1.0, 0.9, 0.6))


def test_asked_clips_are_whole_latent_frames_of_held_out_digits() -> None:
    clips = study.asked_clips(3, 70)
    assert clips.pixels.shape == (3, 3, 277, 32, 32)
    assert action_channels(clips.actions).shape == (3, 4, 70)
    # A longer request is another clip of the same digit; the actions of its beginning are the same.
    assert torch.equal(study.asked_clips(3, 7).actions, clips.actions[:, :25])


def test_a_clip_that_obeys_is_the_upper_bound() -> None:
    row = study.judge_real(40, 7, load_judges(study.JUDGES))
    assert (row.system, row.latent_frames, row.result.samples) == ("real clips", 7, 40)
    assert row.result.obeyed > 0.99
    assert row.result.speed == pytest.approx(1.0, abs=0.03)


def test_the_table_has_medians_over_seeds(tmp_path: Path) -> None:
    rows = [study.SteeredRow("tf_dcm", seed, "[4, 2]", 7, result_of(0.5 + 0.2 * seed)) for seed in (0, 1, 2)]
    study.write_table(rows, tmp_path, command=["study.py", "--seeds", "0"])
    lines = (tmp_path / "README.md").read_text(encoding="ascii").splitlines()
    assert lines[6].startswith("| tf_dcm | [4, 2] | 7 | 0.700 [0.500, 0.900] | 0.500 [0.500, 0.500] | 0.900")
    assert lines[6].endswith("| 0.700 [0.700, 0.700] | 0.600 [0.600, 0.600] | 3 |")
    assert len(json.loads((tmp_path / "results.json").read_text(encoding="ascii"))["rows"]) == 3
