"""Rewards that fail stop a run with its state kept, and it goes on as if nothing had happened."""

import re
from pathlib import Path
from threading import Thread

import pytest
import torch

from fewstep.core.config import OptimizerConfig
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from fewstep.core.training.trainer import NonFiniteError
from fewstep.dmd.reward.config import ScorerConfig
from fewstep.dmd.reward.methods.table import needs_of
from fewstep.dmd.reward.setup import RewardData
from fewstep.dmd.reward.train import train_reward
from fewstep.embedded.digits.scorers import StrokeWeight
from fewstep.evaluation.scorers.failure import RewardError
from fewstep.evaluation.scorers.remote import Patience, RemoteScorer
from fewstep.evaluation.scorers.remote_server import ScorerServer
from tests.dmd.reward.reward_run import (
    Brittle,
    reward_config,
    with_pixel_gan,
    write_pixel_backbone,
    write_student,
)
from tests.dmd.tiny_run import TinyInputs, assert_same_checkpoint, changed, measured

WILD = OptimizerConfig(learning_rate=1e30, clip=None)


@pytest.fixture(scope="module")
def student(inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return write_student(inputs, tmp_path_factory.mktemp("student") / "run")


def final(run: Path) -> Path:
    return list_checkpoints(run)[-1]


# The others keep a subset of what these keep.
@pytest.mark.slow
@pytest.mark.parametrize("method", ["crd", "rtdmd", "flash", "euphonium"])
def test_a_resumed_run_is_the_undisturbed_one(inputs: TinyInputs, student: Path, tmp_path: Path, method: str) -> None:
    """Bit for bit: student, fake score, older policies, averages, optimizers, monitor and metrics."""
    config = reward_config(inputs, student, tmp_path / "run", method, {"run.steps": 3})
    assert train_reward(config) == 0
    other = reward_config(inputs, student, tmp_path / "other", method, {"run.steps": 3})
    resumed = changed(other, {"run.resume": str(tmp_path / "run" / "checkpoint-2")})
    assert train_reward(resumed) == 0
    assert final(tmp_path / "other").name == "checkpoint-3"
    assert_same_checkpoint(load_checkpoint(final(tmp_path / "other")), load_checkpoint(final(tmp_path / "run")))
    assert measured(tmp_path / "other")[-1] == measured(tmp_path / "run")[-1]


@pytest.mark.slow
def test_a_resumed_discriminator_is_the_undisturbed_one(inputs: TinyInputs, student: Path, tmp_path: Path) -> None:
    """Its heads and its optimizer are in the checkpoint, its frozen features are not."""
    changes = {"run.steps": 3, **with_pixel_gan(inputs, write_pixel_backbone(tmp_path / "backbone"))}
    config = reward_config(inputs, student, tmp_path / "run", "flash", changes)
    assert train_reward(config) == 0
    resumed = {"run.directory": str(tmp_path / "other"), "run.resume": str(tmp_path / "run" / "checkpoint-2")}
    assert train_reward(changed(config, resumed)) == 0
    left, right = (load_checkpoint(final(tmp_path / name)) for name in ("other", "run"))
    assert_same_checkpoint(left, right)
    assert measured(tmp_path / "other")[-1] == measured(tmp_path / "run")[-1]
    assert right.state["roles"]["pixel_gan"]["updates"] == 3
    assert all(name.startswith("heads.") for name in right.tensors["pixel_gan"])
    assert len(right.tensors["pixel_gan"]) == 3 * 8
    early = load_checkpoint(tmp_path / "run" / "checkpoint-2").tensors["pixel_gan"]
    assert all(not torch.equal(early[name], weight) for name, weight in right.tensors["pixel_gan"].items())


# Calls of a scorer: one for the monitor at step 0, then one in each step, one more for the monitor after step 2.
@pytest.mark.slow
@pytest.mark.parametrize(("with_nan", "told"), [(False, "the model forgot a token"), (True, "are not finite")])
def test_a_failing_scorer_keeps_the_start_of_its_step(
    inputs: TinyInputs, student: Path, tmp_path: Path, with_nan: bool, told: str
) -> None:
    changes = {"run.steps": 4, "run.checkpoint_every": 100}
    config = reward_config(inputs, student, tmp_path / "run", "gndm", changes)
    with pytest.raises(RewardError, match=told) as raised:
        train_reward(config, scorers=[Brittle(6, with_nan=with_nan)])
    assert str(raised.value).startswith("step 3: the reward failed")
    assert str(raised.value).endswith(f"continue with --resume {tmp_path / 'run' / 'checkpoint-3'}")
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-3"]

    assert train_reward(changed(config, {"run.resume": "latest"}), scorers=[Brittle(0)]) == 0
    whole = changed(config, {"run.directory": str(tmp_path / "whole")})
    assert train_reward(whole, scorers=[Brittle(0)]) == 0
    assert_same_checkpoint(load_checkpoint(final(tmp_path / "run")), load_checkpoint(final(tmp_path / "whole")))
    assert measured(tmp_path / "run") == measured(tmp_path / "whole")


@pytest.mark.slow
def test_a_failure_inside_the_loss_goes_back_to_the_last_checkpoint(
    inputs: TinyInputs, student: Path, tmp_path: Path
) -> None:
    """The direct term scores again when the fake score has moved: the start of the step is gone."""
    changes = {"matching.cold_start_steps": 0, "run.checkpoint_every": 1}
    config = reward_config(inputs, student, tmp_path / "run", "rtdmd", changes)
    with pytest.raises(RewardError, match="step 1: the reward failed") as raised:
        train_reward(config, scorers=[Brittle(5, with_nan=True)])
    assert not raised.value.clean
    assert str(raised.value).endswith(f"continue with --resume {tmp_path / 'run' / 'checkpoint-1'}")


def test_a_failing_measurement_goes_back_to_the_last_checkpoint(
    inputs: TinyInputs, student: Path, tmp_path: Path
) -> None:
    config = reward_config(inputs, student, tmp_path / "run", "flow_grpo", {"run.checkpoint_every": 1})
    with pytest.raises(RewardError, match=r"step 2: the measurement failed \(KeyError") as raised:
        train_reward(config, scorers=[Brittle(4)])
    assert str(raised.value).endswith(f"continue with --resume {tmp_path / 'run' / 'checkpoint-1'}")


def test_a_steered_rollout_that_fails_keeps_its_start(inputs: TinyInputs, student: Path, tmp_path: Path) -> None:
    config = reward_config(inputs, student, tmp_path / "run", "euphonium", {"run.checkpoint_every": 100})
    with pytest.raises(RewardError, match=r"step 1: the reward failed \(RewardError: the reward failed") as raised:
        train_reward(config, scorers=[Brittle(4)])
    assert raised.value.clean
    assert str(raised.value).endswith(f"continue with --resume {tmp_path / 'run' / 'checkpoint-1'}")


@pytest.mark.slow
def test_a_remote_scorer_that_goes_away(inputs: TinyInputs, student: Path, tmp_path: Path) -> None:
    config = reward_config(inputs, student, tmp_path / "run", "nft", {"run.checkpoint_every": 100})
    with ScorerServer(StrokeWeight(), 0) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        remote = RemoteScorer(address, patience=Patience(timeout=10.0, retries=0))
        assert train_reward(changed(config, {"run.steps": 1}), scorers=[remote]) == 0
        server.shutdown()
    with pytest.raises(RewardError, match=r"step 1: the reward failed \(RuntimeError: no scorer at"):
        train_reward(changed(config, {"run.resume": "latest"}), scorers=[remote])
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-1"]


def test_missing_inputs_are_named_before_anything_is_loaded(inputs: TinyInputs, student: Path, tmp_path: Path) -> None:
    config = reward_config(inputs, student, tmp_path / "run", "redmd")
    broken = {
        r"student\.init .* is no \.safetensors file, no run directory or checkpoint": {"student.init": str(tmp_path)},
        r"was trained with steps 2, and student\.steps is 4": {"student.steps": 4},
        r"prompt file .* does not exist": {"data.prompts": str(tmp_path / "none.txt")},
    }
    for message, changes in broken.items():
        with pytest.raises(ValueError, match=message):
            RewardData.read(changed(config, changes), needs_of(config))
    # A checkpoint of the run is held to its steps, too.
    checkpoint = {"student.init": str(student / "checkpoint-2"), "student.shift": 3.0}
    with pytest.raises(ValueError, match=r"was trained with shift 1\.0, and student\.shift is 3\.0"):
        RewardData.read(changed(config, checkpoint), needs_of(config))
    for weights, told in ((None, "scorer digit_log_probability needs weights"), (str(tmp_path), str(tmp_path))):
        scorers = (ScorerConfig(name="digit_log_probability", weights=weights),)
        with pytest.raises(ValueError, match=re.escape(told)):
            train_reward(changed(config, {"reward.scorers": scorers}))


def test_nan_in_the_student_stops_before_anything_moves(inputs: TinyInputs, student: Path, tmp_path: Path) -> None:
    config = reward_config(inputs, student, tmp_path / "run", "flow_grpo", {"student.optimizer": WILD})
    with pytest.raises(NonFiniteError, match="is not finite; no weight was changed by it"):
        train_reward(config)
