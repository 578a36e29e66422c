"""A student and a fake score on toy data; the student is updated in every second step."""

from __future__ import annotations

import torch
from torch import nn

from fewstep.core.config import OptimizerConfig, RunConfig
from fewstep.core.randomness import sample_noise
from fewstep.core.training.ema import EmaSettings
from fewstep.core.training.roles import frozen
from fewstep.core.training.run_directory import RunDirectory
from fewstep.core.training.trainer import Trainer


class Net(nn.Module):
    def __init__(self, seed, dropout=0.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 3))
        self.register_buffer("scale", torch.tensor([1.0 + 0.1 * seed]))
        self.frozen = nn.Parameter(torch.full((3,), 0.1 * seed), requires_grad=False)

    def forward(self, x):
        return self.net(x) * self.scale + self.frozen


def run_config(directory, **changes):
    values = {"directory": str(directory), "seed": 5, "steps": 6, "batch_size": 8, "checkpoint_every": 3}
    values |= {"keep_checkpoints": 5, "sample_every": 2, "log_every": 1}
    return RunConfig(**{**values, **changes})


def build(run, *, dropout=0.0):
    trainer = Trainer(run, RunDirectory(run.directory, resume=run.resume), cpu=True)
    student = trainer.add_role(
        "student",
        Net(1 + trainer.rank, dropout),
        OptimizerConfig(learning_rate=0.02, betas=(0.0, 0.99), warmup_steps=3),
        ema=EmaSettings(0.9, 1),
    )
    fake = trainer.add_role("fake", Net(11 + trainer.rank), OptimizerConfig(learning_rate=0.05, clip=0.1))
    return trainer, student, fake


def fake_loss(trainer, fake, samples, step, slices):
    total = 0.0
    for number, (indices, x0) in enumerate(zip(slices, samples, strict=True)):
        with trainer.sync(fake, number == len(slices) - 1):
            eps = sample_noise(trainer.run.seed, indices, (3,), step=step, stream="fake")
            loss = (fake.wrapped(x0 + eps) - eps).square().mean()
            trainer.check_finite("fake score loss", loss)
            trainer.backward(loss)
        total = total + loss.detach() / len(slices)
    return total


def student_loss(trainer, student, fake, step, slices):
    total = 0.0
    for number, indices in enumerate(slices):
        with trainer.sync(student, number == len(slices) - 1), frozen(fake.module):
            x0 = student.wrapped(sample_noise(trainer.run.seed, indices, (3,), step=step))
            loss = (x0 - 1).square().mean() + 0.1 * fake.module(x0).square().mean()
            trainer.check_finite("student loss", loss)
            trainer.backward(loss)
        total = total + loss.detach() / len(slices)
    return total


def train(run, *, dropout=0.0, before_step=None, stop_after=None):
    trainer, student, fake = build(run, dropout=dropout)
    extra = {} if trainer.directory.resume_path is None else trainer.resume(trainer.directory.resume_path)
    while not trainer.should_stop() and trainer.step != stop_after:
        step = trainer.step
        if before_step is not None:
            before_step(trainer, student, fake)
        slices = trainer.micro_batches(trainer.local_indices(step, run.batch_size))
        metrics = {}
        if step % 2 == 0:
            metrics["student_loss"] = student_loss(trainer, student, fake, step, slices)
            metrics["student_grad_norm"] = trainer.update(student)
        with torch.no_grad():
            samples = [student.module(sample_noise(run.seed, part, (3,), step=step)) for part in slices]
        metrics["fake_loss"] = fake_loss(trainer, fake, samples, step, slices)
        metrics["fake_grad_norm"] = trainer.update(fake)
        trainer.advance()
        trainer.log(metrics)
        if trainer.checkpoint_due:
            trainer.save({"note": trainer.step})
    code = trainer.finish({"note": trainer.step})
    trainer.close()
    return trainer, student, fake, code, extra
