"""Two processes train a flow map as one does: forward mode, means over the batch, rollouts, the fake score."""

import dataclasses
from pathlib import Path

import pytest

from fewstep.consistency.config import ConsistencyConfig
from fewstep.consistency.train import train_consistency
from fewstep.core.config import save_resolved
from tests.consistency.tiny_consistency_run import tiny_consistency
from tests.dmd.tiny_run import TinyInputs
from tests.two_processes import assert_same_run, launch_two

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_consistency.py"


def flow_map_with_matching(inputs: TinyInputs, directory: Path) -> ConsistencyConfig:
    config = tiny_consistency(inputs, directory, "anyflow_dmd")
    assert config.anyflow is not None
    return dataclasses.replace(config, anyflow=dataclasses.replace(config.anyflow, tangent="jvp", time_smoothing=0.01))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_train_a_flow_map_as_one_does(inputs: TinyInputs, tmp_path: Path) -> None:
    save_resolved(tmp_path / "two.yaml", flow_map_with_matching(inputs, tmp_path / "two"))
    assert "2 process(es) on cpu" in launch_two(str(SCRIPT), "--config", str(tmp_path / "two.yaml"))
    assert train_consistency(flow_map_with_matching(inputs, tmp_path / "one")) == 0
    assert_same_run(tmp_path / "two", tmp_path / "one", roles=("student", "student_ema", "fake_score"))
