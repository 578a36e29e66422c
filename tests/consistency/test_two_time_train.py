"""Runs of students with two times: what moves, both stages of AnyFlow, resume, starting files, export, and mistakes."""

import dataclasses
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.consistency.methods.rcm import student_samples
from fewstep.consistency.sections import AnyflowConfig, MeanflowConfig
from fewstep.consistency.tangent_check import check_tangent
from fewstep.consistency.train import train_consistency, train_step
from fewstep.core.export.run import export_run, load_run_student
from fewstep.core.grids import step_grid
from fewstep.core.randomness import Draw, sample_noise, shared_integer
from fewstep.core.run_settings import read_settings
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from fewstep.core.training.roles import Role
from fewstep.core.two_time import second_time_of
from tests.consistency.tiny_consistency_run import start_consistency, tiny_consistency
from tests.dmd.tiny_run import TinyInputs, assert_same_checkpoint
from tests.tiny_pipelines import LATENT_SHAPE

TIME_TARGETS = ("attn.to_q", "timestep_embedder.linear_1", "timestep_embedder.linear_2")


def weights_of(role: Role | None) -> dict[str, torch.Tensor]:
    assert role is not None
    return {name: value.detach().clone() for name, value in role.parameters}


def moved_names(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def test_stages_of_anyflow(inputs: TinyInputs, tmp_path: Path) -> None:
    """One step of the first stage, then student and fake score alternate; the student's steps take both losses."""
    config = tiny_consistency(inputs, tmp_path, "anyflow_dmd")
    setup, trainer = start_consistency(config)
    logged, moved = [], []
    for _ in range(4):
        before = weights_of(setup.student_role), weights_of(setup.fake_role)
        metrics = train_step(config, setup, trainer)
        trainer.advance()
        after = weights_of(setup.student_role), weights_of(setup.fake_role)
        moved.append(tuple(len(moved_names(a, b)) > 0 for a, b in zip(before, after, strict=True)))
        logged.append(sorted(name for name in metrics if name.endswith("_loss")))
    trainer.close()
    assert moved == [(True, False), (True, False), (False, True), (True, False)]
    both = ["consistency_loss", "matching_loss"]
    assert logged == [["consistency_loss"], both, ["fake_score_loss"], both]


@pytest.mark.parametrize("name", ["meanflow", "anyflow"])
def test_weights_of_the_second_time_move(inputs: TinyInputs, tmp_path: Path, name: str) -> None:
    config = tiny_consistency(inputs, tmp_path, name)
    setup, trainer = start_consistency(config)
    before = weights_of(setup.student_role)
    for _ in range(2):
        train_step(config, setup, trainer)
        trainer.advance()
    moved = moved_names(before, weights_of(setup.student_role))
    trainer.close()
    layers = {key for key in before if "timestep_embedder" in key}
    assert len(layers) == 8
    assert layers <= moved


@pytest.mark.slow
def test_with_adapters_the_second_embedding_is_trained_beside_them(inputs: TinyInputs, tmp_path: Path) -> None:
    config = tiny_consistency(inputs, tmp_path / "run", "anyflow")
    config = dataclasses.replace(config, student=dataclasses.replace(config.student, lora_rank=2))
    assert train_consistency(config) == 0
    names = set(load_checkpoint(list_checkpoints(tmp_path / "run")[-1]).tensors["student"])
    plain = {name for name in names if ".lora_" not in name and "pos_embed" not in name}
    prefix = "network.time_text_embed.timestep_embedder.second"
    assert plain == {f"{prefix}.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
    _, record = export_run(tmp_path / "run", steps=3)
    assert (record.steps, record.weights, record.sampler) == (3, "merged", "flow_map")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alphaflow", "anyflow_dmd"])
def test_a_resumed_run_equals_an_uninterrupted_one(inputs: TinyInputs, tmp_path: Path, name: str) -> None:
    """The run is of one length throughout, since alphaflow's schedule follows it: the last checkpoint is taken away."""
    straight = tmp_path / "straight"
    assert train_consistency(tiny_consistency(inputs, straight, name)) == 0
    shutil.copytree(straight, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    assert train_consistency(tiny_consistency(inputs, tmp_path / "resumed", name, {"resume": "latest"})) == 0
    left, right = (load_checkpoint(list_checkpoints(tmp_path / folder)[-1]) for folder in ("straight", "resumed"))
    assert left.step == 4
    assert_same_checkpoint(left, right)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("meanflow", 1), ("imf", 2), ("anyflow", 4), ("alphaflow", 8)])
def test_export_of_any_number_of_steps(inputs: TinyInputs, tmp_path: Path, name: str, steps: int) -> None:
    assert train_consistency(tiny_consistency(inputs, tmp_path / "run", name)) == 0
    assert len(list((tmp_path / "run").glob("samples/*"))) == 1
    path, record = export_run(tmp_path / "run", steps=steps)
    assert (path / "model_index.json").is_file()
    assert (record.method, record.steps, record.sampler) == (name, steps, "flow_map")
    assert record.verification is not None
    assert record.verification.sampler_difference < 1e-5


@pytest.mark.slow
def test_decoupled_is_sampled_here_and_has_no_export(inputs: TinyInputs, tmp_path: Path) -> None:
    assert train_consistency(tiny_consistency(inputs, tmp_path / "run", "dmf")) == 0
    with pytest.raises(ValueError, match="'decoupled' has no export"):
        export_run(tmp_path / "run")
    loaded = load_run_student(tmp_path / "run", read_settings(tmp_path / "run"))
    assert loaded.step == 4
    noise = sample_noise(1, [0, 1], LATENT_SHAPE)
    latents = loaded.student.sample(noise, loaded.teacher.encode(["ab", "c"]))
    assert latents.shape == (2, *LATENT_SHAPE)
    assert latents.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("source", ["two", "one"])
@pytest.mark.parametrize("kind", ["run", "checkpoint", "file"])
def test_a_run_starts_from_weights_of_one_time_or_two(
    inputs: TinyInputs, tmp_path: Path, source: str, kind: str
) -> None:
    """A run directory and a checkpoint give their average, a file what it holds."""
    name = "anyflow" if source == "two" else "dcm"
    assert train_consistency(tiny_consistency(inputs, tmp_path / "first", name, {"steps": 2})) == 0
    checkpoint = list_checkpoints(tmp_path / "first")[-1]
    init = {"run": tmp_path / "first", "checkpoint": checkpoint, "file": checkpoint / "student.safetensors"}[kind]
    config = tiny_consistency(inputs, tmp_path / "next", "anyflow")
    student = dataclasses.replace(config.student, init=str(init))
    setup, trainer = start_consistency(dataclasses.replace(config, student=student))
    trainer.close()
    expected = load_checkpoint(checkpoint).tensors["student" if kind == "file" else "student_ema"]
    found = dict(setup.student_role.module.named_parameters())
    place = "network.time_text_embed.timestep_embedder"
    first = expected[f"{place}.first.linear_1.weight" if source == "two" else f"{place}.linear_1.weight"]
    assert torch.equal(found[f"{place}.first.linear_1.weight"], first)
    second = expected[f"{place}.second.linear_1.weight"] if source == "two" else first
    assert torch.equal(found[f"{place}.second.linear_1.weight"], second)


@pytest.mark.slow
def test_another_kind_of_second_time_is_no_start(inputs: TinyInputs, tmp_path: Path) -> None:
    """The gate of AnyFlow and the sum of MeanFlow have layers of the same names and sizes."""
    assert train_consistency(tiny_consistency(inputs, tmp_path / "first", "anyflow", {"steps": 1})) == 0
    config = tiny_consistency(inputs, tmp_path / "next", "meanflow")
    student = dataclasses.replace(config.student, init=str(tmp_path / "first"))
    with pytest.raises(ValueError, match="second time is 'gate', and this method has 'sum'"):
        start_consistency(dataclasses.replace(config, student=student))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "message"), [("anyflow", "cannot start adapters"), ("dcm", "adapters are saved")])
def test_adapters_start_from_the_teacher_alone(inputs: TinyInputs, tmp_path: Path, name: str, message: str) -> None:
    assert train_consistency(tiny_consistency(inputs, tmp_path / "first", name, {"steps": 1})) == 0
    config = tiny_consistency(inputs, tmp_path / "next", "anyflow")
    student = dataclasses.replace(config.student, init=str(tmp_path / "first"), lora_rank=2)
    with pytest.raises(ValueError, match=message):
        start_consistency(dataclasses.replace(config, student=student))


def test_backward_simulation_trains_one_segment(inputs: TinyInputs, tmp_path: Path) -> None:
    """The gradient of the weights is that of the trained jump alone, through the state of the jumps after it."""
    config = tiny_consistency(inputs, tmp_path, "anyflow_dmd")
    setup, trainer = start_consistency(config)
    draw = Draw(5, [0, 1], trainer.device)
    assert setup.frozen_student is not None
    calls, frozen_calls = count_calls(setup.student_role.module), count_calls(setup.frozen_student)
    seen = set()
    for step in range(12):
        trainer.step = step
        steps = (1, 2, 4)[shared_integer(5, step, "rollout_steps", 3)]
        segment = shared_integer(5, step, "rollout_segment", steps)
        calls.clear()
        frozen_calls.clear()
        x0 = student_samples(config, setup, trainer, draw=draw)
        # Jumps before the trained one have no graph; those after it go through weights that take no gradient.
        assert calls == [True]
        assert frozen_calls == [False] * ((segment > 0) + (segment < steps - 1))
        seen.add((steps, segment))
        x0.square().mean().backward()
        assert all(value.grad is not None and value.requires_grad for _, value in setup.student_role.parameters)
        setup.student_role.module.zero_grad()
        with torch.no_grad():
            again = student_samples(config, setup, trainer, draw=draw)
        assert torch.allclose(again, x0.detach(), atol=1e-6)
    trainer.close()
    assert len(seen) >= 4


def test_all_jumps_may_be_learnt_from(inputs: TinyInputs, tmp_path: Path) -> None:
    """The public code's rollout: x0 is the same, and the gradient that of the composition of all jumps."""
    config = tiny_consistency(inputs, tmp_path, "anyflow_dmd")
    assert config.anyflow is not None
    config = dataclasses.replace(config, anyflow=dataclasses.replace(config.anyflow, rollout_learns="all"))
    setup, trainer = start_consistency(config)
    draw, module = Draw(5, [0, 1], trainer.device), setup.student_role.module
    condition = setup.prompts.of_samples([0, 1], 5)
    seen = set()
    for step in range(8):
        trainer.step = step
        steps = (1, 2, 4)[shared_integer(5, step, "rollout_steps", 3)]
        segment = shared_integer(5, step, "rollout_segment", steps)
        grid = (*step_grid(steps, shift=config.student.shift), 0.0)
        student_samples(config, setup, trainer, draw=draw).square().mean().backward()
        found = torch.cat([p.grad.flatten() for _, p in setup.student_role.parameters if p.grad is not None])
        module.zero_grad()
        x = draw.noise(setup.latent_shape, "noise")
        for t, r in pairwise(dict.fromkeys([grid[0], grid[segment], grid[segment + 1], 0.0])):
            x = x - (t - r) * module(x, torch.full((2,), t), condition, torch.full((2,), r))
        x.square().mean().backward()
        expected = torch.cat([p.grad.flatten() for _, p in setup.student_role.parameters if p.grad is not None])
        module.zero_grad()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
        seen.add((steps, segment))
    trainer.close()
    assert len(seen) >= 4


def test_the_second_stage_of_anyflow_can_compute_blocks_again(inputs: TinyInputs, tmp_path: Path) -> None:
    """The jumps after the trained one take no gradient while blocks are recomputed in the backward pass, either."""
    found: list[list[Tensor]] = []
    for checkpointing in (False, True):
        config = tiny_consistency(inputs, tmp_path / str(checkpointing), "anyflow_dmd")
        student = dataclasses.replace(config.student, gradient_checkpointing=checkpointing)
        config = dataclasses.replace(config, student=student)
        setup, trainer = start_consistency(config)
        gradients: list[Tensor] = []
        for step in range(6):
            trainer.step = step
            student_samples(config, setup, trainer, draw=Draw(5, [0, 1], trainer.device)).square().mean().backward()
            gradients += [torch.cat([p.grad.flatten() for _, p in setup.student_role.parameters if p.grad is not None])]
            setup.student_role.module.zero_grad()
        trainer.close()
        found.append(gradients)
    for plain, again in zip(*found, strict=True):
        assert float(plain.norm()) > 0
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [(), TIME_TARGETS], ids=["beside", "in"])
@pytest.mark.parametrize("name", ["meanflow", "anyflow"])
def test_adapters_and_a_second_time_on_a_bf16_base(
    inputs: TinyInputs, tmp_path: Path, name: str, targets: tuple[str, ...]
) -> None:
    """Layers of the second time are fp32, or have fp32 adapters; a run goes on from them, or from their sum."""
    config = tiny_consistency(inputs, tmp_path / "run", name)
    config = dataclasses.replace(
        config,
        teacher=dataclasses.replace(config.teacher, dtype="bfloat16"),
        student=dataclasses.replace(config.student, lora_rank=2, lora_alpha=2.0, lora_targets=targets),
    )
    assert train_consistency(config) == 0
    stored = load_checkpoint(list_checkpoints(tmp_path / "run")[-1]).tensors["student_ema"]
    places = {name.partition("timestep_embedder.")[2] for name in stored if "timestep_embedder" in name}
    if targets:
        halves = [f"{half}.linear_{i}" for half in ("first", "second") for i in (1, 2)]
        assert places == {f"{layer}.lora_{factor}.default.weight" for layer in halves for factor in "AB"}
    else:
        assert places == {f"second.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    _, record = export_run(tmp_path / "run")
    assert record.verification is not None
    assert record.verification.sampler_difference < 3e-5
    trained = load_run_student(tmp_path / "run", read_settings(tmp_path / "run"))
    x, condition = sample_noise(1, [0, 1], LATENT_SHAPE), trained.teacher.encode(["ab", "c"])
    t, r = torch.tensor([0.9, 0.5]), torch.tensor([0.3, 0.0])
    with torch.no_grad():
        expected = trained.student.denoiser(x, t, condition, r)
    for rank in (0, 2):
        alpha = 2.0 if rank else 64.0
        given = {"lora_rank": rank, "lora_alpha": alpha, "lora_targets": targets if rank else ()}
        student = dataclasses.replace(config.student, init=str(tmp_path / "run"), **given)
        again = dataclasses.replace(
            config, student=student, run=dataclasses.replace(config.run, directory=str(tmp_path / f"b{rank}"))
        )
        setup, trainer = start_consistency(again)
        metrics = train_step(again, setup, trainer)
        trainer.close()
        assert bool(torch.isfinite(torch.as_tensor(metrics["consistency_loss"])))
        setup, trainer = start_consistency(again)
        with torch.no_grad():
            # The same weights, computed in fp32 as in the run that is loaded for an export.
            setup.student.denoiser.network.float()
            found = setup.student.denoiser(x, t, condition, r)
        trainer.close()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
        assert {parameter.dtype for _, parameter in setup.student_role.parameters} == {torch.float32}


def count_calls(module: nn.Module) -> list[bool]:
    """Filled at every call of the module: whether its weights take part in the graph."""
    calls: list[bool] = []

    def note(called: nn.Module, inputs: tuple[Any, ...]) -> None:
        calls.append(torch.is_grad_enabled() and next(called.parameters()).requires_grad)

    module.register_forward_pre_hook(note)
    return calls


def test_the_tangent_is_checked_along_the_second_time(inputs: TinyInputs, tmp_path: Path) -> None:
    checked = dataclasses.replace(
        tiny_consistency(inputs, tmp_path, "meanflow"), meanflow=MeanflowConfig(time_smoothing=0.01)
    )
    setup, trainer = start_consistency(checked)
    assert second_time_of(setup.student.denoiser.network) is not None
    text = check_tangent(checked, setup, trainer)
    trainer.close()
    assert text is not None
    assert text.startswith("tangent against differences: off by ")
    assert float(text.rpartition("of time is ")[2].partition(",")[0]) > 0.98


def test_a_network_without_tangent_names_the_setting(
    inputs: TinyInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_consistency(inputs, tmp_path, "meanflow")

    def unknown(name: str, processor: object, *, in_unet: bool) -> object:
        raise ValueError(f"{name} has no counterpart with tangents")

    monkeypatch.setattr("fewstep.core.tangents.network.with_tangent", unknown)
    with pytest.raises(ValueError, match=r"set meanflow\.tangent to 'central'"):
        start_consistency(config)


def test_settings_default_to_the_teacher() -> None:
    settings = AnyflowConfig()
    assert (settings.velocity, settings.pairs, settings.second_time) == ("teacher", "ordered", "gate")
    assert settings.rollout_steps == (2, 4, 8, 16, 50)
    assert MeanflowConfig().kappa == 0.0
    assert MeanflowConfig().second_time == "sum"
