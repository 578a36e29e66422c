"""Consistency and self-forcing in one step: the gradient is the sum, the causal teacher is its own, and stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.causal_video.stages.config import CausalTeacherConfig, JointConfig
from fewstep.causal_video.stages.sections import TfDcmConfig, TfScmConfig
from fewstep.causal_video.stages.train import train_causal_video, train_step
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from fewstep.core.training.run_directory import read_metrics
from tests.causal_video.tiny_causal_run import VideoInputs, start_causal, tiny_causal, with_joint, with_teacher
from tests.dmd.tiny_run import assert_same_checkpoint

STAGES: dict[str, dict[str, Any]] = {
    "tf_scm": {"tf_scm": TfScmConfig(time_mean=0.0, check_tangent=False)},
    "tf_dcm": {"tf_dcm": TfDcmConfig(grid_steps=8)},
}


def gradient_of_a_step(inputs: VideoInputs, directory: Path, case: str, changes: dict[str, Any]) -> tuple[Tensor, Any]:
    """The student's gradient of its first step, all weights in a row, and the metrics."""
    config = tiny_causal(inputs, directory, case, {"student.init": str(inputs.init), **changes})
    setup, trainer = start_causal(config)
    found: list[Tensor] = []

    def update(role: Any) -> Tensor:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in setup.student_role.parameters]
        found.append(torch.cat([grad.flatten() for grad in grads]).clone())
        return torch.zeros(())

    trainer.update = update  # pyright: ignore[reportAttributeAccessIssue]
    metrics = train_step(config, setup, trainer)
    trainer.close()
    return found[0], metrics


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("replay", [False, True])
def test_a_step_has_the_gradient_of_both(inputs: VideoInputs, tmp_path: Path, name: str, replay: bool) -> None:
    """0.3 of the consistency of the stage alone, of which the causal teacher is the same, and that of the rollouts."""
    how = {"self_forcing.replay": replay}
    joint = {**how, "joint": with_joint(**STAGES[name]), "causal_teacher": with_teacher(inputs)}
    both, metrics = gradient_of_a_step(inputs, tmp_path / "both", "self_forcing", joint)
    rollouts, _ = gradient_of_a_step(inputs, tmp_path / "rollouts", "self_forcing", {**how, "data.image_share": 0.0})
    alone = {**{f"{name}.{key}": value for key, value in vars(STAGES[name][name]).items()}, "student.steps": (3, 2)}
    consistency, found = gradient_of_a_step(inputs, tmp_path / "alone", name, {**alone, "teacher.guidance": 1.5})
    assert float(metrics["joint_loss"]) == pytest.approx(float(found["forcing_loss"]), rel=1e-5)
    assert float(consistency.norm()) > 1e-3
    torch.testing.assert_close(
        both, rollouts + 0.3 * consistency, rtol=2e-3, atol=1e-6 * float(both.abs().max()) + 1e-7
    )


@pytest.mark.slow
def test_a_joint_run_resumes_exactly_with_its_teacher_unmoved(inputs: VideoInputs, tmp_path: Path) -> None:
    for name, changes in (("straight", {}), ("resumed", {"run.steps": 2}), ("resumed", {"run.resume": "latest"})):
        config = tiny_causal(inputs, tmp_path / name, "self_forcing_joint", changes)
        assert train_causal_video(config) == 0
    left, right = (load_checkpoint(list_checkpoints(tmp_path / name)[-1]) for name in ("straight", "resumed"))
    assert_same_checkpoint(left, right)
    records = [record for record in read_metrics(tmp_path / "straight" / "metrics.jsonl") if "note" not in record]
    # The student's steps alone.
    assert [record["step"] for record in records if "joint_loss" in record] == [1, 4]
    config = tiny_causal(inputs, tmp_path / "teacher", "self_forcing_joint")
    setup, trainer = start_causal(config)
    assert setup.networks is not None
    assert setup.networks.teacher is not None
    frozen = setup.networks.teacher.network.transformer
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    train_step(config, setup, trainer)
    trainer.close()
    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    # The student began as the bidirectional teacher.
    assert not torch.equal(setup.student.transformer.patch_embedding.weight, frozen.patch_embedding.weight)


def test_what_a_joint_stage_cannot_be_is_named(inputs: VideoInputs, tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "one of the sections tf_scm and tf_dcm"),
        ({**STAGES["tf_scm"], **STAGES["tf_dcm"]}, "one of the sections tf_scm and tf_dcm"),
        ({**STAGES["tf_dcm"], "weight": 0.0}, r"weight is 0\.0; it must be above 0"),
        ({**STAGES["tf_dcm"], "weight": float("inf")}, "weight is inf"),
        ({"tf_scm": TfScmConfig(time_smoothing=0.01)}, "in its weights already"),
    ]
    for values, told in wrong:
        with pytest.raises(ValueError, match=told):
            JointConfig(**values)
    with pytest.raises(ValueError, match="the section joint belongs to self_forcing"):
        tiny_causal(inputs, tmp_path, "tf_dcm", {"joint": with_joint()})
    noisy = {"joint": with_joint(tf_dcm=TfDcmConfig(noisy_context=True)), "causal_teacher": with_teacher(inputs)}
    with pytest.raises(ValueError, match=r"tf_dcm\.noisy_context with student\.policy\.noisy_from None"):
        tiny_causal(inputs, tmp_path, "self_forcing", noisy)
    with pytest.raises(ValueError, match=r"guidance is nan; it must be finite"):
        CausalTeacherConfig(weights="run", guidance=float("nan"))
    with pytest.raises(ValueError, match="joint needs the section causal_teacher"):
        tiny_causal(inputs, tmp_path, "self_forcing", {"joint": with_joint()})
    nowhere = CausalTeacherConfig(weights=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"causal_teacher\.weights"):
        start_causal(tiny_causal(inputs, tmp_path, "self_forcing_joint", {"causal_teacher": nowhere}))
    for case in ("teacher_forcing", "self_forcing"):
        with pytest.raises(ValueError, match=f"causal_teacher, and {case} follows none here"):
            tiny_causal(inputs, tmp_path, case, {"causal_teacher": with_teacher(inputs)})
