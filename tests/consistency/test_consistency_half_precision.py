"""One step of every method with the teacher in bf16 and the run in bf16, against the same step in fp32."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from fewstep.consistency.config import ConsistencyConfig
from fewstep.consistency.tangent_check import check_tangent
from fewstep.consistency.train import train_step
from tests.consistency.tiny_consistency_run import OBJECTIVES, start_consistency, tiny_consistency
from tests.consistency.tiny_video_run import VIDEO_CASES, VideoInputs, tiny_video, write_inputs
from tests.dmd.tiny_run import TinyInputs

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

# Other cases of the same step.
LEFT_OUT = ("scm_central", "scm_weight", "rcm", "meanflow_data", "anyflow_data", "anyflow_dmd")
SHOWN = ("consistency_loss", "tangent", "student_grad_norm")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> VideoInputs:
    return write_inputs(tmp_path_factory.mktemp("videos"))


def first_step(config: ConsistencyConfig) -> dict[str, float]:
    """Metrics of the first step, after the check of the tangent that every run makes."""
    AcceleratorState._reset_state(reset_partial_state=True)
    setup, trainer = start_consistency(config)
    checked = check_tangent(config, setup, trainer)
    assert (checked is not None) == (config.tangent is not None and config.tangent.tangent == "jvp")
    metrics = train_step(config, setup, trainer)
    weights = {parameter.dtype for _, parameter in setup.student_role.parameters}
    assert weights == {torch.float32}
    trainer.close()
    return {name: float(metrics[name]) for name in SHOWN if name in metrics}


def checked_section(config: ConsistencyConfig) -> ConsistencyConfig:
    """The same settings with the check of the tangent on, which tiny runs turn off to be quick."""
    name = config.METHODS[[getattr(config, each) is not None for each in config.METHODS].index(True)]
    section: Any = getattr(config, name)
    if getattr(section, "check_tangent", True) or getattr(section, "tangent", "") != "jvp":
        return config
    changes: dict[str, Any] = {name: dataclasses.replace(section, check_tangent=True, time_smoothing=0.01)}
    return dataclasses.replace(config, **changes)


def assert_close_in_bf16(config: ConsistencyConfig) -> None:
    config = checked_section(config)
    exact = first_step(config)
    half = first_step(
        dataclasses.replace(
            config,
            teacher=dataclasses.replace(config.teacher, dtype="bfloat16"),
            run=dataclasses.replace(config.run, mixed_precision="bf16", directory=f"{config.run.directory}_bf16"),
        )
    )
    assert half.keys() == exact.keys()
    assert "consistency_loss" in exact
    for name, value in exact.items():
        # A gradient has been through every layer twice.
        close = 0.15 if name == "student_grad_norm" else 0.1
        assert half[name] == pytest.approx(value, rel=close, abs=2e-3), name
    assert half != exact


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in LEFT_OUT])
def test_pictures(inputs: TinyInputs, tmp_path: Path, name: str) -> None:
    assert_close_in_bf16(tiny_consistency(inputs, tmp_path / "run", name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scm", "dcm", "meanflow", "anyflow"])
def test_videos(videos: VideoInputs, tmp_path: Path, name: str) -> None:
    """Wan keeps some layers in fp32, so that its first parameter says nothing of its dtype."""
    assert name in VIDEO_CASES
    assert_close_in_bf16(tiny_video(videos, tmp_path / "run", name))
