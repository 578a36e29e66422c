"""Adapters on a base of 8 bits: its rounding, gradients and memory, and exports on the weights it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fewstep.core.config import OptimizerConfig
from fewstep.core.export.run import ExportFiles, export_run
from fewstep.core.networks.build import build_denoiser
from fewstep.core.networks.other_models import check_models
from fewstep.core.networks.quantised import dequantise, is_quantised, parts_of, quantise
from fewstep.core.settings import FakeScoreConfig, GridStudentConfig, TeacherConfig
from fewstep.core.teacher import Teacher
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from fewstep.core.training.roles import memory_of_frozen
from fewstep.dmd.train import train_dmd
from tests.dmd.tiny_run import assert_same_checkpoint, tiny_config, write_inputs
from tests.tiny_pipelines import build_sd3

OPTIMIZER = OptimizerConfig(learning_rate=1e-3)


def quantised_teacher(kind: Any) -> Teacher:
    pipeline = build_sd3()
    nn.Module.to(pipeline.transformer, torch.bfloat16)
    quantise(pipeline.transformer, kind)
    return Teacher(pipeline, path="tiny")


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.02), ("float8", 0.06)])
def test_a_quantised_base_is_the_plain_one_but_for_its_rounding(kind: Any, error: float) -> None:
    teacher, plain = quantised_teacher(kind), quantised_teacher("none")
    names = [name for name, weight in teacher.denoiser.network.named_parameters() if is_quantised(weight)]
    assert len(names) > 10
    assert all("blocks." in name for name in names)
    x, t, condition = torch.randn(2, *teacher.latent_shape()), torch.tensor([0.3, 0.8]), teacher.encode(["a", "b"])
    with torch.no_grad():
        expected = plain.denoiser(x, t, condition)
        found = teacher.denoiser(x, t, condition)
        dequantise(teacher.denoiser.network)
        again = teacher.denoiser(x, t, condition)
    difference = float((found - expected).norm() / expected.norm())
    assert 1e-4 < difference < error
    # The plain weights it stands for give the same, up to the order in which a product is rounded.
    assert float((found - again).norm() / expected.norm()) < 0.01
    assert not any(is_quantised(weight) for weight in teacher.denoiser.parameters())


def test_adapters_on_it_learn_and_share_it() -> None:
    teacher = quantised_teacher("int8")
    settings = GridStudentConfig(optimizer=OPTIMIZER, lora_rank=2, gradient_checkpointing=True)
    roles = [build_denoiser(settings, teacher, None, seed=seed) for seed in (0, 1)]
    x, t, condition = torch.randn(2, *teacher.latent_shape()), torch.tensor([0.3, 0.8]), teacher.encode(["a", "b"])
    for role in roles:
        role(x, t, condition).square().mean().backward()
        grads = [p.grad for p in role.parameters() if p.requires_grad]
        assert all(grad is not None and grad.dtype == torch.float32 for grad in grads)
    base = {part.data_ptr() for p in teacher.denoiser.parameters() for part in parts_of(p)}
    held = {part.data_ptr() for role in roles for p in role.parameters() if not p.requires_grad for part in parts_of(p)}
    assert held == base
    counted: set[int] = set()
    first = memory_of_frozen("teacher", teacher.denoiser, counted)
    plain = memory_of_frozen("teacher", quantised_teacher("none").denoiser, set())
    assert first.weight_bytes < plain.weight_bytes
    assert memory_of_frozen("again", roles[0], counted).weight_bytes == sum(
        p.numel() * 4 for p in roles[0].parameters() if p.requires_grad
    )


@pytest.mark.slow
def test_a_run_on_it_resumes_exactly_and_exports_what_training_saw(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path)
    changes: dict[str, Any] = {
        "teacher.dtype": "bfloat16",
        "teacher.quantise": "int8",
        "student.lora_rank": 2,
        "fake_score.lora_rank": 2,
    }
    assert train_dmd(tiny_config(inputs, tmp_path / "straight", changes)) == 0
    assert train_dmd(tiny_config(inputs, tmp_path / "resumed", {**changes, "run.steps": 3})) == 0
    assert train_dmd(tiny_config(inputs, tmp_path / "resumed", {**changes, "run.resume": "latest"})) == 0
    left, right = (load_checkpoint(list_checkpoints(tmp_path / name)[-1]) for name in ("straight", "resumed"))
    assert_same_checkpoint(left, right)
    record = export_run(tmp_path / "straight")[1]
    assert record.verification is not None
    assert record.verification.sampler_difference < 1e-5
    with pytest.raises(ValueError, match=r"lora_only with teacher\.quantise int8"):
        export_run(tmp_path / "straight", output=tmp_path / "alone", files=ExportFiles(lora_only=True))


def test_all_weights_are_not_trained_of_it(tmp_path: Path) -> None:
    teacher = TeacherConfig(path=str(tmp_path), quantise="int8")
    adapters = GridStudentConfig(optimizer=OPTIMIZER, lora_rank=2)
    for roles in (
        {"student": GridStudentConfig(optimizer=OPTIMIZER)},
        {"student": adapters, "fake_score": FakeScoreConfig(optimizer=OPTIMIZER)},
    ):
        with pytest.raises(ValueError, match=r"lora_rank is 0, which trains a copy of all weights"):
            check_models(teacher, **roles)
