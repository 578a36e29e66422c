"""Teacher, student and fake score on one set of frozen tensors: the same numbers as three copies, and one storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fewstep.core.config import OptimizerConfig
from fewstep.core.denoiser import Denoiser
from fewstep.core.discriminator import build_heads
from fewstep.core.fake_score import FakeScore
from fewstep.core.networks.build import build_denoiser, build_fake_score
from fewstep.core.networks.lora import add_lora
from fewstep.core.networks.shared import frozen_twin
from fewstep.core.randomness import Draw
from fewstep.core.settings import FakeScoreConfig, GridStudentConfig
from fewstep.core.teacher import Teacher
from fewstep.core.training.ema import Ema
from fewstep.core.training.roles import frozen
from fewstep.dmd.config import (
    DmdObjective,
    FDistillObjective,
    GanConfig,
    MatchingConfig,
    MatchingObjective,
    SidObjective,
)
from fewstep.dmd.matching import Scores, fake_score_step, student_step
from tests.tiny_networks import widen_weights
from tests.tiny_pipelines import build_sd3, build_sdxl
from tests.tiny_sana import build_sana
from tests.tiny_videos import build_video_pipeline

BUILDERS: dict[str, Callable[[], Any]] = {
    "sd3": build_sd3,
    "sdxl": build_sdxl,
    "sana": build_sana,
    "wan": build_video_pipeline,
}
SIZES = {"wan": (32, 32, 5)}
PROMPTS = ["a red cat", "two dogs"]
OPTIMIZER = OptimizerConfig(learning_rate=1e-3)
OBJECTIVES: dict[str, tuple[MatchingObjective, bool]] = {
    "dmd": (DmdObjective(), False),
    "sid": (SidObjective(), False),
    "gan": (DmdObjective(), True),
    "f_distill": (FDistillObjective(), True),
}


def make_teacher(name: str) -> Teacher:
    pipeline = BUILDERS[name]()
    widen_weights(pipeline.unet if name == "sdxl" else pipeline.transformer)
    return Teacher(pipeline, path=name)


def shape_of(teacher: Teacher) -> tuple[int, ...]:
    height, width, frames = SIZES.get(teacher.path, (None, None, None))
    return teacher.latent_shape(height, width, frames=frames)


def role(base: Denoiser, teacher: Teacher, *, seed: int, checkpointing: bool) -> Denoiser:
    """Adapters that do something, on this network."""
    add_lora(base.network, rank=2, alpha=4.0, targets=teacher.family.lora_targets, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    if checkpointing:
        base.network.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
    return base


def three_steps(teacher: Teacher, *, shared: bool, kind: str, checkpointing: bool) -> dict[str, Tensor]:
    """Losses, first gradients and last weights of a short distillation, with one base or with three."""
    make = teacher.denoiser.beside if shared else lambda: teacher.denoiser.copy(trainable=False)
    student = role(make(), teacher, seed=1, checkpointing=checkpointing)
    trunk = role(make(), teacher, seed=2, checkpointing=checkpointing)
    objective, with_gan = OBJECTIVES[kind]
    heads = build_heads(trunk, None, width=8, seed=3) if with_gan else None
    fake = FakeScore(trunk, heads=heads)
    gan = GanConfig(latents="", weight=0.1) if with_gan else None
    condition, shape = teacher.encode(PROMPTS), shape_of(teacher)
    found: dict[str, Tensor] = {}
    networks = {"student": student, "fake": fake}
    optimizers = {
        name: torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)
        for name, module in networks.items()
    }
    for step in range(3):
        draw = Draw(7 + step, [0, 1], torch.device("cpu"))
        x_1 = draw.noise(shape, "noise")
        x0 = x_1 - student(x_1, torch.ones(2), condition)
        with frozen(fake):
            loss = student_step(
                x0,
                condition,
                scores=Scores(teacher, fake, 2.0),
                draw=draw,
                times=MatchingConfig(),
                objective=objective,
                gan=gan,
            ).loss
            loss.backward()
        real = (draw.noise(shape, "real"), condition) if with_gan else None
        fake_loss = fake_score_step(
            x0.detach(),
            condition,
            fake_score=fake,
            draw=draw,
            times=MatchingConfig(),
            clock=teacher.family,
            gan=gan,
            real=real,
        ).loss
        fake_loss.backward()
        found |= {f"loss {step}": loss.detach(), f"fake loss {step}": fake_loss.detach()}
        for name, module in networks.items():
            for key, parameter in module.named_parameters():
                if parameter.requires_grad and step == 0:
                    assert parameter.grad is not None or "heads" in key, key
                    if parameter.grad is not None:
                        found[f"{name} gradient {key}"] = parameter.grad.clone()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
    for name, module in networks.items():
        found |= {f"{name} {key}": p.detach().clone() for key, p in module.named_parameters() if p.requires_grad}
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "kind"), [("sd3", kind) for kind in OBJECTIVES] + [("wan", "sid"), ("sdxl", "gan")])
def test_one_base_gives_the_numbers_of_three(name: str, kind: str, checkpointing: bool) -> None:
    """Losses, gradients and weights after three steps, with blocks that are computed again and without."""
    teacher = make_teacher(name)
    before = {key: weight.clone() for key, weight in teacher.denoiser.state_dict().items()}
    one = three_steps(teacher, shared=True, kind=kind, checkpointing=checkpointing)
    three = three_steps(teacher, shared=False, kind=kind, checkpointing=checkpointing)
    assert one.keys() == three.keys()
    assert sum("gradient" in key for key in one) > 20
    for key, expected in three.items():
        torch.testing.assert_close(one[key], expected, rtol=1e-6, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    # The adapters moved, the teacher did not.
    assert float(one["loss 0"]) != float(one["loss 2"])
    assert all(torch.equal(weight, before[key]) for key, weight in teacher.denoiser.state_dict().items())


class SwitchedRole(nn.Module):
    """The mistake: one network with the adapters of two roles, of which a wrapper's forward switches one on."""

    def __init__(self, denoiser: Denoiser, adapter: str) -> None:
        super().__init__()
        self.denoiser, self.adapter = denoiser, adapter

    def forward(self, *inputs: Any) -> Tensor:
        for layer in self.denoiser.modules():
            if isinstance(layer, LoraLayer):
                layer._active_adapter = [self.adapter]
        return self.denoiser(*inputs)


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_a_role_that_is_switched_by_a_forward_would_be_found(name: str) -> None:
    """With blocks computed again, the backward pass finds the adapters that were switched on last: gradients that are
    wrong by more than their size, beside a loss that is right. Networks with modules of their own have none of it."""
    teacher = make_teacher(name)
    base = role(teacher.denoiser.copy(trainable=False), teacher, seed=1, checkpointing=True)
    network: Any = base.network
    own = {key: parameter for key, parameter in base.named_parameters() if parameter.requires_grad}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        network.add_adapter(network.peft_config["default"], "second")
        with torch.no_grad():
            for key, parameter in base.named_parameters():
                if ".second." in key:
                    parameter.copy_(torch.randn_like(parameter) * 0.05)
    for parameter in own.values():
        parameter.requires_grad_(True)
    x, t, condition = torch.randn(2, *shape_of(teacher)), torch.tensor([0.4, 0.8]), teacher.encode(PROMPTS)

    def gradients(call: nn.Module, after: nn.Module) -> tuple[float, dict[str, Tensor]]:
        for parameter in own.values():
            parameter.grad = None
        loss = call(x, t, condition).square().mean()
        with torch.no_grad():
            after(x, t, condition)
        loss.backward()
        return loss.item(), {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in own.items()}

    student, fake = SwitchedRole(base, "default"), SwitchedRole(base, "second")
    loss, wrong = gradients(student, fake)
    right_loss, right = gradients(student, student)
    assert loss == right_loss
    error = torch.cat([(wrong[key] - right[key]).flatten() for key in own]).norm()
    assert error > 0.5 * torch.cat([value.flatten() for value in right.values()]).norm()

    # The same two roles with modules of their own: whatever is called between, the gradients are the right ones.
    apart = teacher.denoiser.beside()
    apart = role(apart, teacher, seed=1, checkpointing=True)
    own = {key: parameter for key, parameter in apart.named_parameters() if parameter.requires_grad}
    other = role(teacher.denoiser.beside(), teacher, seed=2, checkpointing=True)
    loss, found = gradients(apart, other)
    assert loss == pytest.approx(right_loss, rel=1e-6)
    for key, value in right.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7)


def storages(*modules: nn.Module) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for module in modules for parameter in module.parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(BUILDERS))
def test_each_base_weight_has_one_storage(name: str, dtype: torch.dtype) -> None:
    teacher = make_teacher(name)
    nn.Module.to(teacher.denoiser.network, dtype)
    base = storages(teacher.denoiser)
    settings = GridStudentConfig(optimizer=OPTIMIZER, lora_rank=2, gradient_checkpointing=True)
    student = build_denoiser(settings, teacher, None, seed=0)
    fake = build_fake_score(FakeScoreConfig(optimizer=OPTIMIZER, lora_rank=3), teacher, None, seed=0)
    fake = FakeScore(fake.denoiser, heads=build_heads(fake.denoiser, None, width=8, seed=0))
    trained = [p for module in (student, fake) for p in module.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert len(storages(teacher.denoiser, student, fake)) == len(base) + len(trained)
    # What a run keeps beside them is of the adapters alone.
    assert {*Ema(student, 0.9).state_dict()} == {key for key, p in student.named_parameters() if p.requires_grad}
    assert not any(p.requires_grad for p in teacher.denoiser.parameters())
    assert not any("lora_" in key for key in teacher.denoiser.state_dict())


@pytest.mark.parametrize("name", list(BUILDERS))
def test_adapters_on_a_bf16_base_are_those_on_an_fp32_one_but_for_rounding(name: str) -> None:
    """Forward and gradients of fp32 adapters, with the base as rounded in both: what bf16 arithmetic costs."""
    teacher = make_teacher(name)
    nn.Module.to(teacher.denoiser.network, torch.bfloat16)
    half = role(teacher.denoiser.beside(), teacher, seed=1, checkpointing=True)
    full = role(teacher.denoiser.copy(trainable=False).float(), teacher, seed=1, checkpointing=False)
    x, t, condition = torch.randn(2, *shape_of(teacher)), torch.tensor([0.4, 0.8]), teacher.encode(PROMPTS)
    outputs, gradients = [], []
    for denoiser in (half, full):
        output = denoiser(x, t, condition)
        output.square().mean().backward()
        outputs.append(output.detach())
        grads = [p.grad for p in denoiser.parameters() if p.requires_grad and p.grad is not None]
        assert {grad.dtype for grad in grads} == {torch.float32}
        gradients.append(torch.cat([grad.flatten() for grad in grads]))
    assert outputs[0].dtype == torch.float32
    for found, expected in (outputs, gradients):
        assert 1e-5 < float((found - expected).norm() / expected.norm()) < 0.05


@contextmanager
def averaged(module: nn.Module) -> Iterator[None]:
    ema = Ema(module, 0.0)
    for value in ema.state_dict().values():
        value.mul_(0.5)
    with ema.applied(module):
        yield


def test_a_frozen_twin_follows_the_weights_and_takes_no_gradient() -> None:
    teacher = make_teacher("sd3")
    student = role(teacher.denoiser.beside(), teacher, seed=1, checkpointing=True)
    twin = frozen_twin(student)
    assert storages(twin) == storages(student)
    x, t, condition = torch.randn(2, *shape_of(teacher)), torch.tensor([0.4, 0.8]), teacher.encode(PROMPTS)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    assert torch.equal(twin(x, t, condition), student(x, t, condition))
    with averaged(student):
        assert torch.equal(twin(x, t, condition), student(x, t, condition))
    leaf = x.clone().requires_grad_()
    # Both recompute their blocks in one backward pass: the gradient goes through the twin and stays out of its weights.
    twin(student(leaf, t, condition), t, condition).square().mean().backward()
    assert leaf.grad is not None
    assert float(leaf.grad.abs().max()) > 0
    assert all(parameter.grad is None for parameter in twin.parameters())
    trained = [p for p in student.parameters() if p.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
