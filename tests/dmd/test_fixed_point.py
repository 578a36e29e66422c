"""Small complete trainings on Gaussians: the losses together lead a student to the guided teacher.

The teacher is N(0.5 + c, 1.3^2) under a token c and N(0.5, 1.3^2) without; guidance w gives it the mean 0.5 + w c (G8).
The student starts elsewhere and must find mean and std of the guided teacher; the fake score starts as the teacher.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from fewstep.core.condition import Condition
from fewstep.core.paths import add_noise
from fewstep.dmd.f_divergence import density_ratio, divergence_weight, normalise_by_time, unit_mean
from fewstep.dmd.loss import distribution_matching_loss, fake_score_loss
from fewstep.dmd.sid_loss import sid_loss
from tests.dmd.gaussian_bench import Gaussian, GaussianDenoiser, LinearGaussianDenoiser, log_ratio

BATCH, WIDTH = 64, 8
GUIDANCE, TOKEN = 2.0, 0.6
TARGET = Gaussian(0.5 + GUIDANCE * TOKEN, 1.3)


@dataclass
class Bench:
    """Student, fake score, guided teacher, and the generator of all noise."""

    student: LinearGaussianDenoiser
    fake: LinearGaussianDenoiser
    teacher: GaussianDenoiser
    generator: torch.Generator
    times: tuple[float, ...] = (1.0,)

    def noise(self) -> Tensor:
        return torch.randn(BATCH, WIDTH, generator=self.generator, dtype=torch.float64)

    def score_times(self) -> Tensor:
        return 0.02 + 0.96 * torch.rand(BATCH, generator=self.generator, dtype=torch.float64)

    def rollout(self) -> Tensor:
        """A student sample whose last step carries the gradient; the number of steps is drawn, as in DMD2."""
        steps = int(torch.randint(len(self.times), (), generator=self.generator)) + 1
        x, t = self.noise(), torch.full((BATCH,), self.times[0], dtype=torch.float64)
        for next_time in self.times[1:steps]:
            with torch.no_grad():
                x0 = self.student.x0(x, t)
            t = torch.full_like(t, next_time)
            x = add_noise(x0, self.noise(), t)
        return self.student.x0(x, t)

    def real_x0(self, x_t: Tensor, t: Tensor) -> Tensor:
        tokens = torch.full((BATCH, 1, 1), TOKEN, dtype=torch.float64)
        null = self.teacher.x0(x_t, t, Condition(torch.zeros_like(tokens)))
        return null + GUIDANCE * (self.teacher.x0(x_t, t, Condition(tokens)) - null)

    def fake_update(self, optimizer: Optimizer) -> None:
        x0, eps, t = self.rollout().detach(), self.noise(), self.score_times()
        optimizer.zero_grad()
        fake_score_loss(self.fake(add_noise(x0, eps, t), t), x0, eps).backward()
        optimizer.step()

    def student_loss(self, objective: str) -> Tensor:
        x0, eps, t = self.rollout(), self.noise(), self.score_times()
        if objective == "sid":
            x_t = add_noise(x0, eps, t)
            return sid_loss(x0, self.fake.x0(x_t, t), self.real_x0(x_t, t), alpha=1.0)
        with torch.no_grad():
            x_t = add_noise(x0, eps, t)
            fake_x0, real_x0 = self.fake.x0(x_t, t), self.real_x0(x_t, t)
            weight = self.divergence_weights(x_t, t) if objective == "js" else None
        return distribution_matching_loss(x0, fake_x0, real_x0, weight=weight)

    def divergence_weights(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Weights from the exact logit (G9) of the law that the fake score has learnt."""
        student = self.fake.gaussian(x_t, t)
        ratio = density_ratio(log_ratio(student, TARGET, x_t, t[:, None]).sum(dim=1))
        ratio = normalise_by_time(ratio, t, bins=4, interval=(0.02, 0.98))
        return unit_mean(divergence_weight(ratio, "js"))


def make_bench(times: tuple[float, ...] = (1.0,)) -> Bench:
    """All steps share the student's parameters: the fake score sees the mixture of their samples, so that parameters
    per step would be determined as a mixture alone.
    """
    student = LinearGaussianDenoiser(0.0, 0.7, kind="transport")
    fake = LinearGaussianDenoiser(0.5, 1.3, kind="posterior")
    return Bench(student, fake, GaussianDenoiser(0.5, 1.3), torch.Generator().manual_seed(0), times)


def train_student(bench: Bench, objective: str, make: Callable[..., Optimizer], *, lr: float, updates: int) -> Gaussian:
    """Five fake-score updates for each of the student; returns the student's Gaussian averaged over the last third."""
    student_optimizer = make([bench.student.mean, bench.student.log_std], lr=lr)
    fake_optimizer = torch.optim.AdamW([bench.fake.mean, bench.fake.log_std], lr=0.02, weight_decay=0.0)
    tail: list[Tensor] = []
    for update in range(updates):
        for _ in range(5):
            bench.fake_update(fake_optimizer)
        student_optimizer.zero_grad()
        bench.student_loss(objective).backward()
        student_optimizer.step()
        if update >= 2 * updates // 3:
            tail.append(torch.stack([bench.student.mean.detach(), bench.student.log_std.detach().exp()]).clone())
    mean, std = torch.stack(tail).mean(dim=0)
    return Gaussian(mean, std)


def adamw(parameters: list[Tensor], *, lr: float) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.0, 0.999), weight_decay=0.0)


def sgd(parameters: list[Tensor], *, lr: float) -> Optimizer:
    return torch.optim.SGD(parameters, lr=lr)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "make", "lr", "times"),
    [
        ("dmd", adamw, 0.02, (1.0,)),
        ("dmd", sgd, 0.4, (1.0,)),
        ("dmd", adamw, 0.02, (1.0, 0.5)),
        ("sid", adamw, 0.02, (1.0,)),
        ("js", adamw, 0.02, (1.0,)),
    ],
)
def test_student_reaches_the_guided_teacher(
    objective: str, make: Callable[..., Optimizer], lr: float, times: tuple[float, ...]
) -> None:
    bench = make_bench(times)
    reached = train_student(bench, objective, make, lr=lr, updates=300)
    assert torch.as_tensor(reached.mean).tolist() == pytest.approx([TARGET.mean], rel=0.02)
    assert torch.as_tensor(reached.std).tolist() == pytest.approx([TARGET.std], rel=0.03)
    # The fake score follows the student (G2), which is the teacher's law by now.
    assert bench.fake.mean.item() == pytest.approx(float(TARGET.mean), rel=0.08)
    assert math.exp(bench.fake.log_std.item()) == pytest.approx(float(TARGET.std), rel=0.08)
