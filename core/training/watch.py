"""What one sees of a training run: sample grids of fixed prompts and seeds, and health messages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

import torch
import yaml
from torch import Tensor, nn

from fewstep.core.config import plain_values
from fewstep.core.data import PromptConditions
from fewstep.core.randomness import sample_noise
from fewstep.core.student import Student
from fewstep.core.teacher import Teacher
from fewstep.core.training.health import HealthMonitor, HealthStatistics
from fewstep.core.training.roles import Role, memory_table
from fewstep.core.training.sample_grid import frame_row, save_grid
from fewstep.core.training.trainer import Trainer

TEACHER_STEPS = 50
# The grid's noise has a seed of its own, so that grids of runs with different seeds show the same samples.
GRID_SEED = 0


class Watched(Protocol):
    """The parts of a method's set-up that are looked at. `latent_shape` is (C, h, w), or (C, F, h, w) for videos."""

    @property
    def teacher(self) -> Teacher: ...
    @property
    def student(self) -> Student: ...
    @property
    def student_role(self) -> Role: ...
    @property
    def prompts(self) -> PromptConditions: ...
    @property
    def latent_shape(self) -> tuple[int, ...]: ...


class Watch:
    """Fixed prompts and seeds for the sample grid, the teacher's row, and the health monitor.

    Args:
        setup: what to look at.
        trainer: the run.
        sample_count: columns of the grid, the first prompts.
        guidance: of the teacher's row.
    """

    def __init__(self, setup: Watched, trainer: Trainer, *, sample_count: int, guidance: float) -> None:
        self.setup, self.trainer, self.monitor = setup, trainer, HealthMonitor()
        self.rows = list(range(min(sample_count, len(setup.prompts))))
        self.guidance = guidance
        self.teacher_latents: Tensor | None = None
        self.pictures = HealthStatistics()

    def state(self) -> dict[str, Any]:
        """JSON data from which `load_state` goes on exactly: the monitor, and what it knows of the last grid."""
        return {"health": self.monitor.state(), "pictures": asdict(self.pictures)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.monitor.load_state(state["health"])
        self.pictures = HealthStatistics(**state["pictures"])

    def begin(self) -> None:
        """The samples of a run's start."""
        self.save_samples()

    def measure(self) -> Mapping[str, float]:
        """No more metrics than those of the steps."""
        return {}

    def _noise(self, stream: str) -> Tensor:
        shape, device = self.setup.latent_shape, self.trainer.device
        return sample_noise(GRID_SEED, self.rows, shape, stream=stream, device=device)

    @torch.no_grad()
    def _reference(self) -> Tensor:
        """The teacher's latents of the grid, made once."""
        if self.teacher_latents is None:
            condition = self.setup.prompts.rows(self.rows)
            teacher = self.setup.teacher
            self.teacher_latents = teacher.sample(
                self._noise("grid"), condition, steps=TEACHER_STEPS, guidance=self.guidance
            )
        return self.teacher_latents

    @torch.no_grad()
    def save_samples(self) -> None:
        """Write the grid of this step (process 0): the teacher's row, then the student's averaged weights.

        Videos have a row of frames each, the teacher's and the student's one below the other.

        Raises NonFiniteError when samples of either are not finite.
        """
        if not self.trainer.is_main:
            return
        setup, role = self.setup, self.setup.student_role
        renoise = [self._noise(f"grid_renoise_{step}") for step in range(len(setup.student.times) - 1)]
        assert role.ema is not None
        with role.ema.applied(role.module):
            latents = setup.student.sample(self._noise("grid"), setup.prompts.rows(self.rows), renoise)
        self.trainer.check_finite("teacher's sample grid", self._reference())
        self.trainer.check_finite("student's sample grid", latents)
        teacher_pixels, pixels = setup.teacher.decode(self._reference()), setup.teacher.decode(latents)
        labels = [f"teacher, {TEACHER_STEPS} steps", f"student, {len(setup.student.times)}"]
        rows = [teacher_pixels, pixels]
        if pixels.ndim == 5:
            rows = [frame_row(video) for pair in zip(*rows, strict=True) for video in pair]
            texts = [setup.prompts.prompts[row] for row in self.rows]
            labels = [f"{label}: {text}" for text in texts for label in labels]
        save_grid(rows, self.trainer.directory.sample_path(self.trainer.step), labels=labels)
        self.pictures = HealthStatistics(
            brightness=pixels.mean().item(),
            reference_brightness=teacher_pixels.mean().item(),
            saturation=saturation(pixels),
            reference_saturation=saturation(teacher_pixels),
        )

    def look_at(self, means: Mapping[str, float] | None) -> None:
        """Say what is unhealthy in a record of means; nothing when no record was due."""
        if means is None or not self.trainer.is_main:
            return
        statistics = training_statistics(means, self._reference(), self.pictures, self.setup.student_role)
        for message in self.monitor.update(statistics):
            self.trainer.note(f"health: {message.text}")


def run_text(config: Any, trainer: Trainer, told: str, *, frozen: Mapping[str, nn.Module]) -> str:
    """What a run says of itself at the start: settings, what it does in words, and each network's share of memory."""
    settings = yaml.safe_dump(plain_values(config), sort_keys=False).rstrip()
    processes = f"{trainer.world_size} process(es) on {trainer.device.type}"
    slow = ""
    if trainer.device.type == "cuda" and config.run.mixed_precision == "no":
        slow = (
            "run.mixed_precision is 'no': on CUDA products of fp32 take several times those of bf16; set it to bf16\n"
        )
    return f"{settings}\n{told}; {processes}\n{slow}{memory_table(trainer.memory_report(frozen))}"


def training_statistics(
    means: Mapping[str, float], reference: Tensor, pictures: HealthStatistics, student: Role
) -> HealthStatistics:
    """What a run's health is judged by: logged means, the teacher's latents, the latest `pictures`, and the student."""
    return HealthStatistics(
        student_mean=means.get("matching_student_mean"),
        student_std=means.get("matching_student_std"),
        reference_mean=reference.mean().item(),
        reference_std=reference.std().item(),
        direction_rms=means.get("matching_direction_rms"),
        student_grad_norm=means.get("student_grad_norm"),
        student_grad_over_eps=grad_over_eps(means.get("student_grad_norm"), student),
        fake_grad_norm=means.get("fake_grad_norm"),
        brightness=pictures.brightness,
        reference_brightness=pictures.reference_brightness,
        saturation=pictures.saturation,
        reference_saturation=pictures.reference_saturation,
    )


def grad_over_eps(norm: float | None, role: Role) -> float | None:
    """Root mean square of a gradient of this norm over the eps of its optimizer; None where it has none of Adam's."""
    eps = role.optimizer.param_groups[0].get("eps")
    if norm is None or not isinstance(eps, float):
        return None
    count = sum(parameter.numel() for _, parameter in role.parameters)
    return norm / math.sqrt(count) / eps


def saturation(pixels: Tensor) -> float:
    """Mean over pixels [N, 3, H, W] of the largest minus the smallest channel, in [0, 1]."""
    return (pixels.amax(dim=1) - pixels.amin(dim=1)).mean().item()
