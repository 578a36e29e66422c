"""What one sees of a run of a causal student: contact sheets of videos, health messages, and the note at the start.

Legend: B prompts, C channels, F latent frames, T pixel frames; latents [B, C, F, h, w], pixels [B, 3, T, H, W].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.causal_video.denoise import ChunkNoise, VideoCondition
from fewstep.causal_video.model.controls import controls_of
from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.rollout import rollout
from fewstep.causal_video.stages.config import CausalConfig
from fewstep.causal_video.stages.sampling import euler_rollout
from fewstep.causal_video.stages.setup import CausalSetup
from fewstep.core.condition import Condition
from fewstep.core.randomness import sample_noise
from fewstep.core.training.health import HealthMonitor, HealthStatistics
from fewstep.core.training.sample_grid import frame_row, save_grid
from fewstep.core.training.trainer import Trainer
from fewstep.core.training.watch import GRID_SEED, run_text, saturation, training_statistics

TEACHER_STEPS, FLOW_STEPS = 50, 20


class VideoWatch:
    """Fixed prompts and seeds for the contact sheet, the teacher's videos beside it, and the health monitor.

    Args:
        setup: what to look at.
        trainer: the run.
        sample_count: prompts of the sheet, the first ones.
        guidance: of the teacher.
        is_flow: whether the student takes many steps of an ODE with that guidance, or those of its schedule.
    """

    def __init__(
        self, setup: CausalSetup, trainer: Trainer, *, sample_count: int, guidance: float, is_flow: bool
    ) -> None:
        self.setup, self.trainer, self.monitor = setup, trainer, HealthMonitor()
        self.guidance, self.flow_guidance = guidance, guidance if is_flow else None
        self.rows = list(range(min(sample_count, len(setup.prompts))))
        self.teacher_latents: Tensor | None = None
        self.pictures = HealthStatistics()

    def state(self) -> dict[str, Any]:
        """JSON data from which `load_state` goes on exactly: the monitor, and what it knows of the last sheet."""
        return {"health": self.monitor.state(), "pictures": asdict(self.pictures)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.monitor.load_state(state["health"])
        self.pictures = HealthStatistics(**state["pictures"])

    def begin(self) -> None:
        """The sheet of a run's start."""
        self.save_samples()

    def measure(self) -> Mapping[str, float]:
        """No more metrics than those of the steps."""
        return {}

    @torch.no_grad()
    def _reference(self) -> Tensor:
        """The teacher's latents of the sheet, made once."""
        if self.teacher_latents is None:
            setup = self.setup
            if setup.scores is not None and setup.scores.real is not None:
                self.teacher_latents = causal_teacher_videos(setup, self.rows, guidance=self.guidance)
                return self.teacher_latents
            noise = sample_noise(GRID_SEED, self.rows, setup.latent_shape, stream="sheet", device=self.trainer.device)
            self.teacher_latents = setup.teacher.sample(
                noise, sheet_condition(setup, self.rows), steps=TEACHER_STEPS, guidance=self.guidance
            )
        return self.teacher_latents

    @torch.no_grad()
    def save_samples(self) -> None:
        """Write the contact sheet of this step (process 0): a row of frames per prompt, the teacher's and the averaged
        student's, whose video is streamed over its cache.

        Raises NonFiniteError when videos of either are not finite.
        """
        if not self.trainer.is_main:
            return
        setup, role = self.setup, self.setup.student_role
        assert role.ema is not None
        with role.ema.applied(role.module):
            latents = student_videos(setup, self.rows, flow_guidance=self.flow_guidance)
        self.trainer.check_finite("teacher's sample videos", self._reference())
        self.trainer.check_finite("student's sample videos", latents)
        teacher_pixels, pixels = setup.teacher.decode(self._reference()), setup.teacher.decode(latents)
        rows, labels = [], []
        for place, row in enumerate(self.rows):
            for name, video in (("teacher", teacher_pixels), ("student", pixels)):
                rows.append(frame_row(video[place]))
                labels.append(f"{name}: {setup.prompts.prompts[row]}")
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


def student_videos(setup: CausalSetup, rows: list[int], *, flow_guidance: float | None) -> Tensor:
    """Latents [B, C, F, h, w] of these prompts with fixed seeds, from the weights as they are.

    With `flow_guidance` the student takes 20 Euler steps a chunk on the teacher's grid, as those of a flow do; without
    it the steps of its schedule.
    """
    channels, _, height, width = setup.latent_shape
    noise = ChunkNoise(GRID_SEED, tuple(rows), (channels, height, width), stream="sheet")
    asked, student = sheet_condition(setup, rows), setup.student
    condition = VideoCondition(asked.text, extra=controls_of(asked, setup.latent_shape[1]))
    if flow_guidance is not None:
        return euler_rollout(
            student,
            condition,
            noise,
            setup.settings,
            times=setup.teacher.family.teacher_grid(setup.teacher.pipeline, FLOW_STEPS),
            guidance=flow_guidance,
            null_text=setup.teacher.null_condition.tokens,
            control_guidance=setup.teacher.control_guidance,
        )
    schedule, chunks = setup.settings.schedule, setup.settings.layout.chunks
    exits = schedule.exits(schedule.longest - 1, chunks)
    return rollout(student, condition, noise, setup.settings, exits=exits).video


def causal_teacher_videos(setup: CausalSetup, rows: list[int], *, guidance: float) -> Tensor:
    """What a causal teacher makes chunk by chunk in many steps, where the scores are causal."""
    channels, _, height, width = setup.latent_shape
    network: Any = setup.teacher.denoiser.network
    return euler_rollout(
        CausalWan(network),
        VideoCondition(sheet_condition(setup, rows).text),
        ChunkNoise(GRID_SEED, tuple(rows), (channels, height, width), stream="sheet"),
        setup.settings,
        times=setup.teacher.family.teacher_grid(setup.teacher.pipeline, TEACHER_STEPS),
        guidance=guidance,
        null_text=setup.teacher.null_condition.tokens,
    )


def sheet_condition(setup: CausalSetup, rows: list[int]) -> Condition:
    """These prompts; a steered student follows the controls of the first videos beside them, one after the other."""
    count = 1 if setup.real is None else len(setup.real.dataset.prompts)
    return setup.controlled(setup.prompts.rows(rows), [row % count for row in rows])


def describe_run(config: CausalConfig, setup: CausalSetup, trainer: Trainer) -> str:
    """The resolved settings, the times of each chunk, and parameters and memory of each network, as text."""
    held: dict[str, nn.Module] = {"teacher": setup.teacher.denoiser}
    if setup.networks is not None and setup.networks.teacher is not None:
        held["causal teacher"] = setup.networks.teacher.network
    data = "no videos" if setup.real is None else f"{len(setup.real.dataset.prompts)} videos"
    data += "" if setup.controls is None else f" with controls {', '.join(setup.controls.names)}"
    text = f"{setup.settings.text}; latents {setup.latent_shape}; {data}, {len(setup.prompts)} prompts"
    return run_text(config, trainer, text, frozen=held)
