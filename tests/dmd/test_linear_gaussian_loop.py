"""The loop itself on Gaussians, where it has a known end: the student becomes the guided teacher.

The teacher is N(0.5 + c, 1.3^2) under a prompt with the token c and N(0.5, 1.3^2) without; guidance w gives it the mean
0.5 + w c (G8). The student starts as N(0, 0.7^2) without an eye for the prompt.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.condition import Condition
from fewstep.core.config import OptimizerConfig, RunConfig
from fewstep.core.data import PromptConditions
from fewstep.core.fake_score import FakeScoreOutput
from fewstep.core.settings import SampleDataConfig, SteppingStudentConfig, TeacherConfig
from fewstep.core.student import Student
from fewstep.core.training.ema import EmaSettings
from fewstep.core.training.run import Run
from fewstep.core.training.run_directory import RunDirectory, read_metrics
from fewstep.core.training.trainer import Trainer
from fewstep.core.training.watch import Watch
from fewstep.dmd.config import DmdConfig, DmdFakeScoreConfig, DmdObjective, SidObjective
from fewstep.dmd.setup import DmdSetup
from fewstep.dmd.train import train_step
from tests.dmd.gaussian_bench import GaussianDenoiser, LinearGaussianDenoiser

MEAN, STD, GUIDANCE = 0.5, 1.3, 2.0
PROMPTS = ("1.0", "-0.8", "0.3")
SHAPE = (1, 2, 4)
UPDATES = 240


class GaussianTeacher:
    """Stands where `Teacher` stands: a prompt is a number, its token."""

    def __init__(self) -> None:
        self.denoiser = GaussianDenoiser(MEAN, STD)
        # Its times are canonical, so nothing asks for a family.
        self.family: Any = None
        self.null_condition = self.encode(["0"])

    def encode(self, prompts: list[str], *, height: int | None = None, width: int | None = None) -> Condition:
        return Condition(torch.tensor([[[float(prompt)]] for prompt in prompts]))

    def x0(self, x_t: Tensor, t: Tensor, condition: Condition, guidance: float) -> Tensor:
        null = self.denoiser.x0(x_t, t, self.null_condition.expand(len(x_t)))
        return null + guidance * (self.denoiser.x0(x_t, t, condition) - null)

    def sample(self, noise: Tensor, condition: Condition, *, steps: int, guidance: float) -> Tensor:
        return MEAN + guidance * condition.text[:, :, :, None] + STD * noise

    def decode(self, latents: Tensor) -> Tensor:
        return torch.sigmoid(latents).expand(-1, 3, -1, -1)


class GaussianFakeScore(nn.Module):
    """Stands where `FakeScore` stands: affine in x_t and in the token, exact for every Gaussian student."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = LinearGaussianDenoiser(MEAN, STD, kind="posterior", token_gain=1.0, dtype=torch.float32)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> FakeScoreOutput:
        return FakeScoreOutput(self.denoiser(x_t, t, condition), None)


@dataclass(frozen=True)
class Case:
    """How a student is trained."""

    steps: int
    objective: Literal["dmd", "sid"]


def settings(case: Case, directory: Path, *, updates: int) -> DmdConfig:
    student = OptimizerConfig(learning_rate=0.04, betas=(0.0, 0.999), weight_decay=0.0, clip=None, decay="cosine")
    fake = OptimizerConfig(learning_rate=0.03, weight_decay=0.0, clip=None, decay="cosine")
    return DmdConfig(
        teacher=TeacherConfig(path="gaussian", guidance=GUIDANCE),
        data=SampleDataConfig(prompts="none", sample_count=2),
        run=RunConfig(
            directory=str(directory),
            seed=0,
            steps=5 * updates,
            batch_size=32,
            checkpoint_every=10**6,
            keep_checkpoints=1,
            sample_every=10**6,
            log_every=50,
        ),
        student=SteppingStudentConfig(optimizer=student, steps=case.steps, ema_decay=0.95),
        fake_score=DmdFakeScoreConfig(optimizer=fake),
        dmd=DmdObjective() if case.objective == "dmd" else None,
        sid=SidObjective() if case.objective == "sid" else None,
    )


def train(case: Case, directory: Path, *, updates: int) -> tuple[dict[str, Tensor], GaussianFakeScore]:
    """Run the loop to its end; the student's averaged parameters and the fake score."""
    config = settings(case, directory, updates=updates)
    run_directory = RunDirectory(directory)
    trainer = Trainer(config.run, run_directory, cpu=True)
    teacher: Any = GaussianTeacher()
    student: Any = LinearGaussianDenoiser(0.0, 0.7, kind="transport", dtype=torch.float32)
    fake: Any = GaussianFakeScore()
    times: Sequence[float] = [1 - step / case.steps for step in range(case.steps)]
    setup = DmdSetup(
        teacher=teacher,
        student=Student(student, times),
        student_role=trainer.add_role(
            "student", student, config.student.optimizer, ema=EmaSettings(config.student.ema_decay), every=5
        ),
        fake_role=trainer.add_role("fake_score", fake, config.fake_score.optimizer),
        fake_score=fake,
        prompts=PromptConditions(teacher, PROMPTS, cache=True),
        latent_shape=SHAPE,
        real=None,
        pairs=None,
    )
    watch = Watch(setup, trainer, sample_count=config.data.sample_count, guidance=config.teacher.guidance)
    with ExitStack() as stack:
        run = Run(config, trainer, run_directory, dry=False, stack=stack)
        for _ in run.steps(watch):
            run.finish_step(train_step(config, setup, trainer))
    assert run.exit_code == 0
    ema = setup.student_role.ema
    assert ema is not None
    return ema.state_dict(), fake


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case(1, "dmd"), Case(2, "dmd"), Case(1, "sid")])
def test_loop_reaches_the_guided_teacher(tmp_path: Path, case: Case) -> None:
    reached, fake = train(case, tmp_path, updates=UPDATES)
    assert reached["mean"].item() == pytest.approx(MEAN, abs=0.03 * STD)
    assert reached["log_std"].exp().item() == pytest.approx(STD, rel=0.03)
    assert reached["token_gain"].item() == pytest.approx(GUIDANCE, rel=0.03)
    # The fake score follows the student, without guidance of its own.
    assert fake.denoiser.token_gain.item() == pytest.approx(GUIDANCE, rel=0.15)
    assert math.exp(fake.denoiser.log_std.item()) == pytest.approx(STD, rel=0.08)
    records = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "note" not in record]
    assert len(records) == 5 * UPDATES // 50
    assert records[-1]["matching_direction_rms"] < 0.3 * records[0]["matching_direction_rms"]
