"""Samples that are drawn without an export equal those of the export, and are judged the same way."""

import json
from pathlib import Path

import pytest
import torch
from studies.consistency import (
    ABLATIONS,
    CURVE_STEPS,
    METHODS,
    NOT_EXPORTED,
    STUDENT_STEPS,
    evaluation_rows,
    steps_of,
    teacher_steps,
)
from studies.two_time import BATCH, sample_run, write_results

from fewstep.consistency.config import ConsistencyConfig
from fewstep.consistency.train import train_consistency
from fewstep.core.config import parse_config
from fewstep.core.export.run import export_run
from fewstep.evaluation.generation import generate, load_pipeline
from tests.consistency.tiny_consistency_run import tiny_consistency
from tests.dmd.tiny_run import TinyInputs, write_inputs

TWO_TIME_METHODS = ("meanflow", "imf", "alphaflow", "dmf", "anyflow")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    """A tiny teacher and data on disk."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def digits_config(repository: Path, method: str, *changes: str) -> ConsistencyConfig:
    """The committed configuration of a method, with changes as on the command line."""
    file = repository / "configs" / "digits" / f"{method}.yaml"
    return parse_config(ConsistencyConfig, ["--config", str(file), *changes], prog="test", description="")[0]


@pytest.mark.parametrize("method", TWO_TIME_METHODS)
def test_committed_configurations_are_read(repository: Path, method: str) -> None:
    config = digits_config(repository, method)
    student = config.student_settings
    assert (config.method, student.sampler) == (method, "flow_map")
    assert student.second_time == {"anyflow": "gate", "dmf": "decoupled"}.get(method, "sum")
    assert config.run.directory == f"runs/{method}_digits"
    assert config.run.steps * config.run.batch_size > 10_000


@pytest.mark.slow
def test_samples_are_those_of_the_export(inputs: TinyInputs, tmp_path: Path) -> None:
    assert train_consistency(tiny_consistency(inputs, tmp_path / "run", "anyflow", {"steps": 2})) == 0
    prompts = ["ab", "c"] * 2
    found = sample_run(tmp_path / "run", prompts, steps=3, seed=4)
    path, _ = export_run(tmp_path / "run", steps=3)
    expected = generate(
        load_pipeline(path), prompts, indices=range(len(prompts)), seed=4, steps=3, guidance=1.0, batch_size=4
    )
    assert found.shape == (4, 3, 16, 16)
    assert (found - expected).abs().max() < 1e-4
    more = sample_run(tmp_path / "run", prompts * 40, steps=3, seed=4)
    assert len(more) == 160 > BATCH
    assert torch.allclose(more[:4], found, atol=1e-5)


def test_students_that_renoise_are_refused(inputs: TinyInputs, tmp_path: Path) -> None:
    assert train_consistency(tiny_consistency(inputs, tmp_path / "run", "dcm", {"steps": 1})) == 0
    with pytest.raises(ValueError, match=r"re-noises \('sde'\); export it"):
        sample_run(tmp_path / "run", ["ab"], steps=2, seed=0)


@pytest.mark.slow
def test_a_run_without_export_is_judged(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    changes = ("--run.directory", str(tmp_path / "dmf"), "--run.steps", "1", "--run.batch_size", "4")
    short = (*changes, "--data.sample_count", "2")
    assert train_consistency(digits_config(repository, "dmf", *short)) == 0
    file = write_results([tmp_path / "dmf"], (1, 2), name="dmf", samples=20, output=tmp_path / "report")
    results = json.loads(file.read_text(encoding="utf-8"))["dmf"]
    assert [result["steps"] for result in results] == [1, 2]
    assert all(result["samples"] == 20 and result["figures"]["fid"]["value"] > 0 for result in results)
    # After one step the student is still the teacher, whose blurred means are classified well.
    assert results[1]["figures"]["accuracy"]["value"] > 0.5


def test_steps_of_the_study() -> None:
    assert steps_of("anyflow") == CURVE_STEPS
    assert steps_of("dcm") == STUDENT_STEPS
    assert teacher_steps(["dcm"]) == (50, 4, 2, 1)
    assert teacher_steps(["dcm", "scm"]) == (50, 32, 16, 8, 4, 2, 1)
    assert set(NOT_EXPORTED) < set(METHODS)


def test_rows_of_the_study_have_their_own_teachers() -> None:
    rows = evaluation_rows(Path("runs"), ["dcm", "dmf", "sana_sprint"], [0, 1])
    assert len(rows) == 4 + 4 + 3 * 2 + 3 * 2
    assert rows[0] == ("teacher=assets/digits_image", 50, 1.0)
    assert rows[4] == ("teacher_sana=assets/digits_sana", 20, 1.25)
    assert rows[-1] == ("sana_sprint=runs/sana_sprint_digits_seed1/export_4step", 4, 1.25)
    assert {scale for name, _, scale in rows if name.startswith("dcm")} == {1.0}
    alone = evaluation_rows(Path("runs"), ["sana_sprint", *ABLATIONS], [0])
    assert {name.partition("=")[0] for name, _, _ in alone} == {"teacher_sana", "sana_sprint", *ABLATIONS}
    assert {scale for _, _, scale in alone} == {1.25}


@pytest.mark.parametrize("method", ["sana_sprint", *ABLATIONS])
def test_committed_configurations_of_sana_sprint_are_read(repository: Path, method: str) -> None:
    config = digits_config(repository, "sana_sprint", *ABLATIONS.get(method, ()))
    sprint = config.sana_sprint
    assert sprint is not None
    assert (config.method, sprint.time_mean) == ("sana_sprint", 0.693)
    weights = tuple(0.0 if half is None else half.weight for half in (sprint.consistency, sprint.discriminator))
    assert weights == {"sana_sprint": (1, 0.5), "sana_sprint_scm": (1, 0), "sana_sprint_ladd": (0, 0.5)}[method]
    # As many updates of the student: with a discriminator every second step is the student's.
    assert config.run.steps // (2 if weights[1] > 0 else 1) == 300


def test_the_configuration_with_a_controlnet_is_read(repository: Path) -> None:
    config = digits_config(repository, "sana_sprint_control")
    assert config.sana_sprint is not None
    assert config.sana_sprint.guidance_scales == (config.teacher.guidance,)
    assert config.sana_sprint.control == f"{config.teacher.path}/control_latents"
    assert config.run.steps == 600
