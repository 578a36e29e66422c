"""The loop on a tiny random Stable Diffusion 3: what moves when, and what stops a run."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.core.data import REAL_SEED
from fewstep.core.randomness import Draw, shared_integer
from fewstep.core.training.checkpoint import load_checkpoint
from fewstep.core.training.roles import Role
from fewstep.core.training.trainer import NonFiniteError
from fewstep.dmd.train import student_samples, train_dmd, train_step
from tests.dmd.tiny_run import WITH_GAN, WITH_REGRESSION, TinyInputs, measured, start, tiny_config


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def moved(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of the parameters that changed."""
    return {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, WITH_GAN, {"student.lora_rank": 2, "fake_score.lora_rank": 3, **WITH_GAN}])
def test_each_turn_moves_its_own_network(inputs: TinyInputs, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Student in steps 0, 3, 6; fake score and heads in every step; teacher, frozen weights and prompts never."""
    config = tiny_config(inputs, tmp_path, {"fake_score.ratio": 3, **changes})
    setup, trainer = start(config)
    student, fake, teacher = setup.student_role, setup.fake_role, setup.teacher.denoiser
    has_heads = any(name.startswith("heads.") for name, _ in fake.parameters)
    assert has_heads == (config.gan is not None)
    trained = {role.name: {name for name, _ in role.parameters} for role in (student, fake)}
    if config.student.lora_rank:
        assert all("lora_" in name for name in trained["student"])
        assert all("lora_" in name or name.startswith("heads.") for name in trained["fake_score"])
        assert len(trained["student"]) < len(weights_of(student.module)) / 2
    origin = weights_of(teacher)
    for step in range(7):
        before = {role.name: weights_of(role.module) for role in (student, fake)}
        metrics = train_step(config, setup, trainer)
        changed_student, changed_fake = (moved(role.module, before[role.name]) for role in (student, fake))
        # The last layers of the heads start at zero, and so does each B of the adapters: their partners move later.
        least = 0.4 if step == 0 else 0.9
        assert changed_student <= (set() if step % 3 else trained["student"])
        assert len(changed_student) >= (0 if step % 3 else least * len(trained["student"]))
        assert changed_fake <= trained["fake_score"]
        assert len(changed_fake) >= least * len(trained["fake_score"])
        assert ("student_loss" in metrics) == (step % 3 == 0)
        assert ("discriminator_loss" in metrics) == has_heads
        trainer.advance()
    trainer.close()
    assert (student.updates, fake.updates) == (3, 7)
    assert len(moved(teacher, origin)) == 0
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def run_steps(config, count: int) -> tuple[list[dict[str, float]], dict[str, dict[str, Tensor]]]:
    """Losses of some steps, and the trained weights after them."""
    setup, trainer = start(config)
    losses = []
    for _ in range(count):
        metrics = train_step(config, setup, trainer)
        losses.append({name: float(value) for name, value in metrics.items() if name.endswith("_loss")})
        trainer.advance()
    trainer.close()
    return losses, {role.name: weights_of(role.module) for role in (setup.student_role, setup.fake_role)}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [WITH_REGRESSION, {"student.steps": 2, **WITH_GAN}])
def test_accumulating_two_slices_equals_one(inputs: TinyInputs, tmp_path: Path, changes: dict[str, Any]) -> None:
    whole, expected = run_steps(tiny_config(inputs, tmp_path / "whole", changes), 4)
    config = tiny_config(inputs, tmp_path / "parts", {"run.gradient_accumulation": 2, **changes})
    parts, found = run_steps(config, 4)
    assert len(parts) == 4
    for left, right in zip(parts, whole, strict=True):
        assert left == pytest.approx(right, rel=1e-5)
    for name, weights in expected.items():
        for key, weight in weights.items():
            torch.testing.assert_close(found[name][key], weight, rtol=1e-5, atol=1e-5, msg=f"{name} {key}")


@pytest.mark.slow
@pytest.mark.parametrize("ema_start", [0, 2])
def test_ema_is_the_closed_form(inputs: TinyInputs, tmp_path: Path, ema_start: int) -> None:
    """shadow_n = d^n w_0 + (1 - d) sum_k d^(n - k) w_k, counted from `ema_start`, where the shadow is the weights."""
    changes = {
        "run.checkpoint_every": 1,
        "run.steps": 5,
        "fake_score.ratio": 1,
        "student.ema_start": ema_start,
    }
    config = tiny_config(inputs, tmp_path, changes)
    assert train_dmd(config) == 0
    saved = [load_checkpoint(tmp_path / f"checkpoint-{step}").tensors for step in range(1, 6)]
    origin = load_file(inputs.teacher / "transformer" / "diffusion_pytorch_model.safetensors")
    live = [{f"network.{name}": weight for name, weight in origin.items()}, *(step["student"] for step in saved)]
    decay, base, last = config.student.ema_decay, ema_start, 5
    names = [name for name, _ in saved[0]["student"].items() if "pos_embed.pos_embed" not in name]
    assert len(names) > 50
    for name in names:
        expected = decay ** (last - base) * live[base][name].double()
        for k in range(base + 1, last + 1):
            expected = expected + (1 - decay) * decay ** (last - k) * live[k][name].double()
        found = saved[-1]["student_ema"][name].double()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7, msg=name)
    if ema_start:
        assert all(torch.equal(saved[1]["student_ema"][name], saved[1]["student"][name]) for name in names)


def test_samples_depend_on_seed_step_and_sample_number_alone(inputs: TinyInputs, tmp_path: Path) -> None:
    """The step with the gradient is shared: a part of the batch gives the rows that the whole batch gives."""
    config = tiny_config(inputs, tmp_path, {"student.steps": 4, "run.batch_size": 6})
    setup, trainer = start(config)
    seen = set()
    for step in (0, 1, 2, 7, 11):
        trainer.step = step
        grad_step = shared_integer(config.run.seed, step, "grad_step", 4)
        seen.add(grad_step)
        indices = list(range(6 * step, 6 * step + 6))
        rows = []
        for part in (indices, indices[:2], indices[2:]):
            draw, condition = Draw(5, part, trainer.device), setup.prompts.of_samples(part, 5)
            rows.append(student_samples(config, setup, trainer, condition=condition, draw=draw).x0)
        torch.testing.assert_close(torch.cat(rows[1:]), rows[0], rtol=1e-5, atol=1e-5)
        renoise = [Draw(5, indices, trainer.device).noise(setup.latent_shape, f"renoise_{i}") for i in range(grad_step)]
        noise = Draw(5, indices, trainer.device).noise(setup.latent_shape, "noise")
        condition = setup.prompts.of_samples(indices, 5)
        again = setup.student.rollout(noise, condition, renoise, grad_step).x0
        assert torch.equal(again, rows[0])
    trainer.close()
    assert len(seen) >= 3


def test_real_data_come_in_an_order_of_their_own(inputs: TinyInputs, tmp_path: Path) -> None:
    setup, trainer = start(tiny_config(inputs, tmp_path, WITH_GAN))
    trainer.close()
    assert setup.real is not None
    rows, latents, condition = setup.real.rows(range(14), trainer.device)
    assert sorted(rows[:7]) == sorted(rows[7:]) == list(range(7))
    assert torch.equal(latents, setup.real.dataset.latents[rows])
    assert condition.batch_size == 14
    assert setup.real.seed == 5 + REAL_SEED
    with pytest.raises(ValueError, match="these latents have no noise"):
        setup.real.noise(rows, trainer.device)


def test_lora_starts_as_the_teacher_and_saves_adapters_only(inputs: TinyInputs, tmp_path: Path) -> None:
    config = tiny_config(inputs, tmp_path, {"student.lora_rank": 2, "run.steps": 2})
    assert train_dmd(config) == 0
    tensors = load_checkpoint(tmp_path / "checkpoint-2").tensors
    adapters = [name for name in tensors["student"] if "lora_" in name]
    assert len(adapters) >= 2 * 3 * 4
    # No frozen table, neither of the weights nor of their average (906 MB each for SD3.5 medium).
    assert {*tensors["student"]} == {*tensors["student_ema"]} == {*adapters}
    assert {tuple(tensors["student"][name].shape)[0 if "lora_A" in name else 1] for name in adapters} == {2}


def test_dry_run_writes_nothing_into_the_run_directory(
    inputs: TinyInputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(inputs, tmp_path / "run", {"run.dry_run": True, "student.steps": 2})
    assert train_dmd(config) == 0
    assert not (tmp_path / "run").exists()
    shown = capsys.readouterr().out
    assert "steps at t = 1, 0.5 (sde); latents (4, 8, 8); 2 fake-score updates per student update" in shown
    assert "dry run: one step was made, nothing is kept" in shown
    assert [line.split()[0] for line in shown.splitlines()[-5:-1]] == ["teacher", "student", "fake_score", "all"]


@pytest.mark.slow
def test_every_step_and_grid_is_kept(inputs: TinyInputs, tmp_path: Path) -> None:
    config = tiny_config(inputs, tmp_path, {"run.log_every": 2, "run.sample_every": 3, "run.steps": 5})
    assert train_dmd(config) == 0
    assert [record["step"] for record in measured(tmp_path)] == [2, 4, 5]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-0000000.png", "step-0000003.png"]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        *("config.yaml", "environment.json", "metrics.jsonl", "samples", "student.json", "tensorboard"),
        *("checkpoint-3", "checkpoint-5"),
    }


def poison(role: Role) -> None:
    with torch.no_grad():
        role.parameters[3][1].view(-1)[0] = float("nan")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("poisoned", "step", "message"),
    [
        ("student", 2, "step 2: student loss is not finite"),
        ("student", 3, "step 3: fake score loss is not finite"),
        ("fake_score", 2, "step 2: student loss is not finite"),
        ("fake_score", 3, "step 3: fake score loss is not finite"),
        ("teacher", 2, "step 2: student loss is not finite"),
    ],
)
def test_nan_in_weights_stops_before_anything_moves(
    inputs: TinyInputs, tmp_path: Path, poisoned: str, step: int, message: str
) -> None:
    config = tiny_config(inputs, tmp_path)
    setup, trainer = start(config)
    for _ in range(step):
        train_step(config, setup, trainer)
        trainer.advance()
    trainer.save({})
    if poisoned == "teacher":
        with torch.no_grad():
            next(setup.teacher.denoiser.parameters()).view(-1)[0] = float("nan")
    else:
        poison(trainer.roles[poisoned])
    before = {name: weights_of(role.module) for name, role in trainer.roles.items()}
    optimizers = {name: copy.deepcopy(role.optimizer.state_dict()["state"]) for name, role in trainer.roles.items()}
    with pytest.raises(NonFiniteError) as raised:
        train_step(config, setup, trainer)
    trainer.close()
    assert str(raised.value).startswith(f"{message}; no weight was changed by it")
    assert f"continue with --resume {tmp_path / f'checkpoint-{step}'}" in str(raised.value)
    for name, role in trainer.roles.items():
        same = [torch.equal(p.nan_to_num(7.0), before[name][key].nan_to_num(7.0)) for key, p in role.parameters]
        assert all(same)
        state = role.optimizer.state_dict()["state"]
        assert [float(entry["step"]) for entry in state.values()] == [
            float(entry["step"]) for entry in optimizers[name].values()
        ]


def test_nan_in_a_teacher_on_disk_stops_the_first_step(
    inputs: TinyInputs, broken_teacher: Path, tmp_path: Path
) -> None:
    path = broken_teacher / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["proj_out.bias"][0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    config = tiny_config(inputs, tmp_path / "run", {"teacher.path": str(broken_teacher)})
    with pytest.raises(NonFiniteError, match=r"^step 0: teacher's sample grid is not finite.*no checkpoint was"):
        train_dmd(config)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_adapters_on_other_weights_than_the_teachers_are_refused(inputs: TinyInputs, tmp_path: Path) -> None:
    weights = inputs.teacher / "transformer" / "diffusion_pytorch_model.safetensors"
    assert weights.is_file()
    config = tiny_config(inputs, tmp_path / "run", {"student.lora_rank": 2, "student.init": str(weights)})
    with pytest.raises(ValueError, match="adapters are saved without the weights under them"):
        train_dmd(config)
