"""Trained weights in bfloat16, as some published runs keep them (`optimizer.weights`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from fewstep.core.config import OptimizerConfig
from fewstep.core.export.run import export_run
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from fewstep.dmd.config import GanConfig
from fewstep.dmd.train import train_dmd, train_step
from tests.dmd.tiny_run import TinyInputs, assert_same_checkpoint, start, tiny_config

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
HALF = OptimizerConfig(weights="bfloat16", learning_rate=1e-2)


def changes(inputs: TinyInputs, lora: int = 0) -> dict[str, Any]:
    heads = OptimizerConfig(learning_rate=1e-2, weights="bfloat16")
    found: dict[str, Any] = {
        "student.optimizer": HALF,
        "fake_score.optimizer": HALF,
        "fake_score.ratio": 1,
        "run.mixed_precision": "bf16",
        "gan": GanConfig(latents=str(inputs.latents), weight=0.1, features="teacher", optimizer=heads),
    }
    return found | ({"student.lora_rank": lora, "fake_score.lora_rank": lora} if lora else {})


@pytest.mark.parametrize("lora", [0, 2])
def test_weights_and_moments_are_bfloat16_and_the_average_is_not(inputs: TinyInputs, tmp_path: Path, lora: int) -> None:
    setup, trainer = start(tiny_config(inputs, tmp_path, changes(inputs, lora)))
    config = tiny_config(inputs, tmp_path, changes(inputs, lora))
    assert setup.heads_role is not None
    roles = (setup.student_role, setup.fake_role, setup.heads_role)
    before = [torch.cat([p.detach().flatten() for _, p in role.parameters]) for role in roles]
    for _ in range(2):
        metrics = train_step(config, setup, trainer)
        assert all(bool(torch.isfinite(torch.as_tensor(value)).all()) for value in metrics.values())
        trainer.advance()
    trainer.close()
    for role, old in zip(roles, before, strict=True):
        assert {parameter.dtype for _, parameter in role.parameters} == {torch.bfloat16}
        moments = [value for state in role.optimizer.state.values() for value in state.values() if value.ndim > 0]
        assert {value.dtype for value in moments} == {torch.bfloat16}
        assert not torch.equal(torch.cat([p.detach().flatten() for _, p in role.parameters]), old)
    assert setup.student_role.ema is not None
    assert {value.dtype for value in setup.student_role.ema.state_dict().values()} == {torch.float32}


@pytest.mark.slow
def test_such_a_run_resumes_exactly_and_is_exported(inputs: TinyInputs, tmp_path: Path) -> None:
    given = changes(inputs)
    assert train_dmd(tiny_config(inputs, tmp_path / "straight", given)) == 0
    assert train_dmd(tiny_config(inputs, tmp_path / "resumed", {**given, "run.steps": 2})) == 0
    assert train_dmd(tiny_config(inputs, tmp_path / "resumed", {**given, "run.resume": "latest"})) == 0
    left, right = (load_checkpoint(list_checkpoints(tmp_path / name)[-1]) for name in ("straight", "resumed"))
    assert_same_checkpoint(left, right)
    kept = {name: tensor.dtype for name, tensor in left.tensors["student"].items() if "pos_embed" not in name}
    assert set(kept.values()) == {torch.bfloat16}
    _, record = export_run(tmp_path / "straight")
    assert record.verification is not None
    assert record.verification.sampler_difference < 1e-4
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match=r"bfloat16 in the checkpoint and .*float32 here"):
        train_dmd(tiny_config(inputs, tmp_path / "resumed", {"run.resume": "latest", "gan": given["gan"]}))
