"""The video study's parts: committed configurations, clips of a run against its export, rows and tables."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from studies import consistency_video as study
from torch import Tensor

from fewstep.consistency.config import ConsistencyConfig
from fewstep.consistency.setup import ConsistencyData, build_setup
from fewstep.consistency.train import train_step
from fewstep.core.config import parse_config, save_resolved
from fewstep.core.export.run import export_run, load_run_student
from fewstep.core.grids import step_grid
from fewstep.core.randomness import sample_noise
from fewstep.core.run_settings import read_settings
from fewstep.core.training.checkpoint import save_checkpoint
from fewstep.core.training.run_directory import CONFIG_FILE, RunDirectory
from fewstep.core.training.trainer import Trainer
from fewstep.embedded.moving_digits.measures import VideoResult


def digits_config(repository: Path, method: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> ConsistencyConfig:
    """A committed configuration of the study as on the command line."""
    monkeypatch.chdir(repository)
    file = f"configs/digits_video/{method}.yaml"
    changes = ("--run.directory", str(run), "--run.batch_size", "4")
    return parse_config(ConsistencyConfig, ["--config", file, *changes], prog="test", description="")[0]


def start_of_run(config: ConsistencyConfig, run: Path) -> None:
    """A run whose student is its starting point."""
    setup = build_setup(config, ConsistencyData.read(config), Trainer(config.run, RunDirectory(run), cpu=True))
    weights: dict[str, Tensor] = {name: value.detach() for name, value in setup.student_role.parameters}
    save_checkpoint(run, 1, tensors={"student_ema": weights}, state={}, keep=1)
    save_resolved(run / CONFIG_FILE, config)
    config.student_settings.save(run)


@pytest.mark.parametrize("method", study.METHODS)
def test_committed_configurations_make_a_step(
    repository: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = digits_config(repository, method, tmp_path, monkeypatch)
    assert config.method == method
    assert config.teacher.guidance == study.GUIDANCE
    trainer = Trainer(config.run, RunDirectory(tmp_path), cpu=True)
    setup = build_setup(config, ConsistencyData.read(config), trainer)
    metrics = train_step(config, setup, trainer)
    trainer.close()
    assert setup.latent_shape == (8, 7, 8, 8)
    assert 0 < float(metrics["consistency_loss"]) < 10


@pytest.mark.slow
@pytest.mark.parametrize("method", study.METHODS)
def test_clips_are_those_of_the_export(
    repository: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, prompts = tmp_path / "run", ["a seven moving left quickly", "a two moving up slowly"]
    start_of_run(digits_config(repository, method, run, monkeypatch), run)
    loaded = load_run_student(run, read_settings(run))
    clips = study.sample_clips(loaded, prompts, times=step_grid(1, shift=3.0), seed=3)
    assert clips.shape == (2, 3, 25, 32, 32)
    path, record = export_run(run, steps=1)
    pipeline: Any = DiffusionPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    noise = sample_noise(3, range(2), (8, 7, 8, 8), stream=study.STREAM)
    found = pipeline(prompts, latents=noise, output_type="pt", **record.call_arguments()).frames.transpose(1, 2)
    assert (found - clips).abs().max() < 1e-3
    two = study.sample_clips(loaded, prompts, times=step_grid(2, shift=3.0), seed=3)
    alone = study.sample_clips(loaded, prompts[:1], times=step_grid(2, shift=3.0), seed=3)
    assert (two[:1] - alone).abs().max() < 1e-3
    assert (two - clips).abs().max() > 1e-2


def result_of(accuracy: float) -> VideoResult:
    return VideoResult(2, 25, accuracy, 0.5, 0.25, 0.0, 0.3, 0.4, 10.0, 20.0, (0.9, 0.7), (1.0, 2.0))


def test_the_table_holds_medians_and_the_record_every_row(tmp_path: Path) -> None:
    rows = [study.VideoRow("teacher", 50, None, result_of(1.0))]
    rows += [study.VideoRow("mcm", 2, seed, result_of(value)) for seed, value in enumerate((0.25, 0.75, 0.5))]
    study.write_table(rows, tmp_path, command=["scripts/benchmark_consistency_video.py", "--seeds", "0"])
    lines = (tmp_path / "README.md").read_text(encoding="ascii").splitlines()
    assert lines[-1] == "| mcm | 2 | 0.500 | 0.500 | 0.250 | 0.300 | 10.000 | 20.000 | 3 |"
    assert lines[-2].startswith("| teacher | 50 | 1.000 |")
    stored = json.loads((tmp_path / study.RESULTS_FILE).read_text(encoding="ascii"))
    assert [row["result"]["digit_accuracy"] for row in stored["rows"]] == [1.0, 0.25, 0.75, 0.5]
    study.write_sheet(torch.rand(9, 3, 25, 32, 32), ["x"] * 9, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 1000
