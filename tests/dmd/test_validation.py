"""Measures while a run goes on: what they are, that they change nothing, and the weights that are kept by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from fewstep.consistency.train import train_consistency
from fewstep.core.config import load_config, save_resolved
from fewstep.core.export.run import export_run, load_run_student
from fewstep.core.randomness import sample_noise
from fewstep.core.run_settings import read_settings
from fewstep.core.training.best import best_checkpoint, save_best
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from fewstep.core.training.run_directory import read_metrics
from fewstep.dmd.config import DmdConfig
from fewstep.dmd.reward.train import train_reward
from fewstep.dmd.train import train_dmd
from fewstep.embedded.digits.scorers import StrokeWeight
from fewstep.evaluation.scorers.settings import ScorerConfig
from fewstep.evaluation.validation import ValidationConfig
from tests.consistency.tiny_consistency_run import tiny_consistency
from tests.dmd.reward.reward_run import reward_config
from tests.dmd.run_server import SCRIPT
from tests.dmd.tiny_run import PROMPTS, TinyInputs, assert_same_checkpoint, changed, tiny_config
from tests.two_processes import launch_two

# 21 samples do not come out even over two processes, and prompts come more than once.
BY_STROKES = ValidationConfig(every=2, scorers=(ScorerConfig(name="stroke_weight"),), samples=21, batch_size=8)
CHANGES: dict[str, Any] = {"student.steps": 2, "run.steps": 6, "run.checkpoint_every": 2, "validation": BY_STROKES}
KEY = "validation_stroke_weight"


def figures(run: Path) -> dict[int, float]:
    """The validations of a run by step."""
    return {record["step"]: record[KEY] for record in read_metrics(run / "metrics.jsonl") if KEY in record}


def losses(run: Path) -> list[float]:
    return [one["student_loss"] for one in read_metrics(run / "metrics.jsonl") if "student_loss" in one]


@pytest.fixture(scope="module")
def validated(inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps with a validation at the start and after every second."""
    folder = tmp_path_factory.mktemp("validated") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert train_dmd(tiny_config(inputs, folder, CHANGES)) == 0
    return folder


def test_a_figure_is_that_of_the_average_at_its_step(validated: Path) -> None:
    """Sampled again from the checkpoint of that step, from the same noise and prompts, and scored."""
    found = figures(validated)
    assert list(found) == [0, 2, 4, 6]
    loaded = load_run_student(validated, read_settings(validated), checkpoint="checkpoint-4")
    shape = loaded.teacher.latent_shape()
    noise, renoise = (sample_noise(1, range(21), shape, stream=f"validation_{name}") for name in ("noise", "renoise_0"))
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(21)]
    with torch.no_grad():
        latents = loaded.student.sample(noise, loaded.teacher.encode(prompts), [renoise])
        pixels = loaded.teacher.decode(latents).clamp(0, 1)
        score = StrokeWeight()((pixels * 255).round() / 255, prompts).mean().item()
    assert found[4] == pytest.approx(score, rel=1e-4)
    assert len(set(found.values())) == 4


def test_the_best_is_kept_and_exported(validated: Path, tmp_path: Path) -> None:
    found = figures(validated)
    best = max(found, key=lambda step: found[step])
    kept = best_checkpoint(validated)
    assert kept is not None
    assert kept.name == f"checkpoint-{best}"
    stored = load_checkpoint(kept)
    assert stored.state == {"figure": "stroke_weight", "value": pytest.approx(found[best])}
    assert set(stored.tensors) == {"student_ema"}
    if best:
        same = load_checkpoint(validated / f"checkpoint-{best}").tensors["student_ema"]
        assert all(torch.equal(tensor, same[name]) for name, tensor in stored.tensors["student_ema"].items())
    _, record = export_run(validated, checkpoint="best", output=tmp_path / "export")
    assert record.training_step == best
    with pytest.raises(ValueError, match=r"has no student\.safetensors, only student_ema"):
        export_run(validated, checkpoint="best", weights="live", output=tmp_path / "live")


def test_a_validation_changes_no_step(inputs: TinyInputs, validated: Path, tmp_path: Path) -> None:
    without = tmp_path / "run"
    assert train_dmd(tiny_config(inputs, without, {**CHANGES, "validation": None})) == 0
    assert losses(validated) == losses(without)
    left, right = (load_checkpoint(run / "checkpoint-6").tensors for run in (validated, without))
    assert all(torch.equal(tensor, right["student"][name]) for name, tensor in left["student"].items())
    with pytest.raises(ValueError, match="holds no best weights: a run with the section validation keeps them"):
        export_run(without, checkpoint="best", output=tmp_path / "export")


@pytest.mark.parametrize("back_to", [2, 4])
def test_a_resume_is_exact(inputs: TinyInputs, validated: Path, tmp_path: Path, back_to: int) -> None:
    """A run that goes on from an older checkpoint ends with the same figures and the same best weights."""
    run = tmp_path / "run"
    assert train_dmd(tiny_config(inputs, run, CHANGES)) == 0
    again = tiny_config(inputs, run, {**CHANGES, "run.resume": str(run / f"checkpoint-{back_to}")})
    assert train_dmd(again) == 0
    assert figures(run) == figures(validated)
    assert_same_checkpoint(load_checkpoint(run / "checkpoint-6"), load_checkpoint(validated / "checkpoint-6"))
    best, expected = best_checkpoint(run), best_checkpoint(validated)
    assert best is not None
    assert expected is not None
    assert_same_checkpoint(load_checkpoint(best), load_checkpoint(expected))


def test_a_run_begins_without_the_best_of_another(inputs: TinyInputs, validated: Path, tmp_path: Path) -> None:
    """A folder in which a run was killed before its first checkpoint; and a resume without the section."""
    run = tmp_path / "run"
    save_best(run, 400, {"w": torch.ones(2)}, figure="kid", value=0.0)
    assert train_dmd(tiny_config(inputs, run, CHANGES)) == 0
    kept, expected = best_checkpoint(run), best_checkpoint(validated)
    assert kept is not None
    assert expected is not None
    assert kept.name == expected.name
    # Nothing of what was left is kept beside it.
    assert [path.name for path in (run / "best").iterdir()] == [kept.name]
    step = int(kept.name.rpartition("-")[2])
    back = max(number for number in (2, 4) if number < step) if step > 2 else 2
    without = {**CHANGES, "validation": None, "run.resume": str(run / f"checkpoint-{back}"), "run.steps": back + 1}
    assert train_dmd(tiny_config(inputs, run, without)) == 0
    assert best_checkpoint(run) is None or step <= back


def test_figures_of_other_kinds_are_not_compared(inputs: TinyInputs, tmp_path: Path) -> None:
    """Another measure, other samples, or another folder: the best begins anew, and the run says so."""
    run = tmp_path / "run"
    assert train_dmd(tiny_config(inputs, run, {**CHANGES, "run.steps": 2})) == 0
    slant = ValidationConfig(every=2, scorers=(ScorerConfig(name="slant"),), samples=20)
    changes = {**CHANGES, "run.steps": 4, "validation": slant, "run.resume": "latest"}
    assert train_dmd(tiny_config(inputs, run, changes)) == 0
    kept = best_checkpoint(run)
    assert kept is not None
    assert (kept.name, load_checkpoint(kept).state["figure"]) == ("checkpoint-4", "slant")
    notes = [one["note"] for one in read_metrics(run / "metrics.jsonl") if "note" in one]
    assert any(
        "were chosen by other settings of the validation: the next figure is the first to beat" in one for one in notes
    )
    elsewhere = tmp_path / "elsewhere"
    changes = {**changes, "run.steps": 6, "run.resume": str(run / "checkpoint-4")}
    assert train_dmd(tiny_config(inputs, elsewhere, changes)) == 0
    kept = best_checkpoint(elsewhere)
    assert kept is not None
    assert kept.name == "checkpoint-6"
    notes = [one["note"] for one in read_metrics(elsewhere / "metrics.jsonl") if "note" in one]
    assert any("are not in this run's folder" in one for one in notes)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_measure_what_one_does(inputs: TinyInputs, validated: Path, tmp_path: Path) -> None:
    save_resolved(tmp_path / "config.yaml", tiny_config(inputs, tmp_path / "run", CHANGES))
    launch_two(str(SCRIPT), "--config", str(tmp_path / "config.yaml"))
    found, expected = figures(tmp_path / "run"), figures(validated)
    assert found.keys() == expected.keys()
    assert all(found[step] == pytest.approx(value, rel=1e-5) for step, value in expected.items())


def test_distances_to_real_pictures(inputs: TinyInputs, tmp_path: Path) -> None:
    """FD-DINOv2 of a consistency student, against a folder of pictures."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(12):
        colour = tuple(int(20 * number * share) % 256 for share in (1, 2, 3))
        Image.new("RGB", (20, 20), colour).save(photos / f"{number}.png")
    size: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**size, image_size=28, patch_size=14)).save_pretrained(tmp_path / "dinov2")
    weights: dict[str, Any] = {"reference": str(photos), "dinov2": str(tmp_path / "dinov2")}
    section = ValidationConfig(every=2, measures=("fd_dinov2",), samples=20, **weights)
    run = tmp_path / "consistency"
    config = changed(tiny_consistency(inputs, run, "dcm", {"steps": 2}), {"validation": section})
    assert train_consistency(config) == 0
    records = [one for one in read_metrics(run / "metrics.jsonl") if "validation_fd_dinov2" in one]
    assert [one["step"] for one in records] == [0, 2]
    assert all(one["validation_fd_dinov2"] > 0 for one in records)
    kept = best_checkpoint(run)
    assert kept is not None
    assert json.loads((kept / "state.json").read_text("utf-8"))["record"]["state"]["figure"] == "fd_dinov2"


def test_a_dry_run_tries_a_batch(inputs: TinyInputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_dmd(tiny_config(inputs, tmp_path / "run", {**CHANGES, "run.dry_run": True})) == 0
    told = capsys.readouterr()
    assert "validation: 8 samples were drawn and measured; a run does so with 21" in told.out + told.err
    assert not (tmp_path / "run").exists()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no weights": (
        {"measures": ("kid",), "reference": "."},
        "validation: measures .* need inception: weights-inception",
    ),
    "no reference": ({"measures": ("fd_dinov2",), "dinov2": "."}, "distances need real pictures"),
    "nothing compared": ({"scorers": (ScorerConfig(name="stroke_weight"),), "reference": "."}, "nothing else does"),
    "unknown": ({"measures": ("fvd",)}, "metric 'fvd' is unknown; known are fid, kid"),
    "clips": ({"scorers": (ScorerConfig(name="clip_light"),)}, "scorer clip_light judges clips"),
    "scorer": ({"scorers": (ScorerConfig(name="beauty"),)}, "scorer is 'beauty'; use one of"),
    "few": ({"measures": ("kid",), "samples": 4}, "samples is 4; use at least 20"),
    "classes": ({"measures": ("classes",)}, "which only the digits have"),
    "digits": ({"measures": ("classes",), "reference": "digits:train"}, "reference digits needs classifier"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_sections_are_refused_before_a_model_is_read(inputs: TinyInputs, tmp_path: Path, name: str) -> None:
    values, message = WRONG[name]
    config = tiny_config(inputs, tmp_path / "run", {"validation": ValidationConfig(every=1, **values)})
    # No teacher is there, and nobody asks for it.
    config = changed(config, {"teacher.path": str(tmp_path / "nothing")})
    with pytest.raises(ValueError, match=message):
        train_dmd(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"every": 0, "measures": ("kid",)}, "every is 0; it must be at least 1"),
        ({"every": 1}, r"nothing to measure: name measures, such as \[kid\]"),
        ({"every": 1, "measures": ("kid", "kid")}, "kid is named twice"),
        ({"every": 1, "measures": ("kid",), "inception": "nowhere.pth"}, "inception is nowhere.pth; there is no such"),
        ({"every": 1, "measures": ("kid",), "seed": -1}, "seed is -1"),
        ({"every": 1, "scorers": ({"name": "slant", "weight": -1.0},)}, "slant has weight -1.0, .* leave them out"),
    ],
)
def test_bad_settings_are_errors(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ValidationConfig(**values)


def test_a_section_on_the_command_line(inputs: TinyInputs, tmp_path: Path) -> None:
    """A file with the section reads back, and its settings can be given one by one."""
    file = tmp_path / "config.yaml"
    save_resolved(file, tiny_config(inputs, tmp_path / "run", CHANGES))
    arguments = ["--config", str(file), "--validation.every", "3", "--validation.samples", "30"]
    config, _ = load_config(DmdConfig, arguments, prog="x", description="")
    assert config.validation is not None
    assert (config.validation.every, config.validation.samples) == (3, 30)
    assert config.validation.scorers == (ScorerConfig(name="stroke_weight"),)


@pytest.mark.slow
def test_a_reward_run_is_validated_too(inputs: TinyInputs, validated: Path, tmp_path: Path) -> None:
    config = reward_config(inputs, validated, tmp_path / "run", "nft", {"validation": BY_STROKES})
    assert train_reward(config) == 0
    assert 0 in figures(tmp_path / "run")
    assert len(list_checkpoints(tmp_path / "run")) > 0
    assert best_checkpoint(tmp_path / "run") is not None
