"""The parts of a reward run: student from a distillation, fake score, snapshots of the policy, and the reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from fewstep.core.data import (
    LatentDataset,
    PromptConditions,
    embedded_prompts,
    find_prompt_pictures,
    read_prompts,
)
from fewstep.core.denoiser import Denoiser
from fewstep.core.export.schedulers import exportable_times
from fewstep.core.fake_score import FakeScore
from fewstep.core.networks.build import build_denoiser, build_fake_score, find_fake_score
from fewstep.core.networks.other_models import check_models
from fewstep.core.randomness import sample_noise
from fewstep.core.run_settings import read_settings
from fewstep.core.student import Student
from fewstep.core.teacher import Teacher
from fewstep.core.teacher_files import require_told_pictures
from fewstep.core.training.ema import EmaSettings
from fewstep.core.training.processes import Processes
from fewstep.core.training.roles import Role
from fewstep.core.training.trainer import Trainer
from fewstep.core.weights import StoredWeights, find_weights
from fewstep.dmd.reward.config import RewardRunConfig, RewardStudentConfig
from fewstep.dmd.reward.groups import route_steps
from fewstep.dmd.reward.latent.network import LatentScorer, load_latent_reward
from fewstep.dmd.reward.pixel_discriminator import RealPictures, build_discriminator
from fewstep.dmd.reward.scorers import load_scorers
from fewstep.dmd.reward.scores import RewardModel
from fewstep.dmd.reward.sections import DecayConfig, PixelGanConfig
from fewstep.evaluation.measures.spectrum import LatentSpread
from fewstep.evaluation.scorers.scorer import Scorer, require_prompts

VARIANCE_SAMPLES, VARIANCE_STEPS = 16, 20


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method asks the setup to build, beside teacher, student and reward.

    The fake score is not among it: it belongs to the sections matching and fake_score, whichever the method.

    Attributes:
        reference: the student at the start, frozen.
        snapshots: older policies by name, each with how much of it stays at an update. Rollouts are drawn from the
            last one, or from the student where there is none.
        reward_gradient: whether the reward is differentiated, which not every scorer can be.
        followed: names of the scorers that are, where not all are.
        teacher_spread: how wide the teacher's samples are.
        latent_reward: folder of a latent reward model.
        pixel_gan: settings of a discriminator on decoded pixels.
    """

    reference: bool = False
    snapshots: Mapping[str, DecayConfig] = field(default_factory=dict)
    reward_gradient: bool = False
    followed: tuple[str, ...] = ()
    teacher_spread: bool = False
    latent_reward: str | None = None
    pixel_gan: PixelGanConfig | None = None


@dataclass(frozen=True)
class RewardData:
    """What is read from disk before any network is loaded: a mistake here costs seconds.

    `init` are the student's weights, None for a cold start from the teacher, `fake_score` those of the fake score that
    went with them, or None; `real` are latents of real pictures for the pixel GAN, or None.
    """

    prompts: tuple[str, ...]
    init: StoredWeights | None
    fake_score: StoredWeights | None
    real: LatentDataset | None = None
    pictures: tuple[Path, ...] = ()

    @classmethod
    def read(cls, config: RewardRunConfig, needs: Needs) -> RewardData:
        """Read the files that the settings name. Raises ValueError that names a missing or broken one."""
        check_models(config.teacher, student=config.student, fake_score=config.fake_score)
        init = None if config.student.init is None else find_weights(config.student.init)
        if init is not None:
            require_same_steps(config.student, init)
        fake_score = find_fake_score(config.fake_score)
        beside = init is not None and config.fake_score is not None and fake_score is None
        file = init.beside("fake_score") if beside and init is not None else None
        if file is not None and init is not None:
            found = StoredWeights(init.key, init.source, (file,))
            # A fake score of other adapters is of no use; one of all weights starts none.
            fits = config.fake_score is not None and found.holds_adapters == (config.fake_score.lora_rank > 0)
            fake_score = found if fits else None
        real = None if needs.pixel_gan is None else LatentDataset.load(needs.pixel_gan.latents)
        prompts = read_prompts(config.data.prompts)
        pictures = find_prompt_pictures(config.data.pictures, prompts)
        require_told_pictures(config.teacher, pictures)
        return cls(prompts, init, fake_score, real, pictures)


def require_same_steps(student: RewardStudentConfig, init: StoredWeights) -> None:
    """Raise ValueError for weights of a run whose student steps by another grid or sampler."""
    if init.run is None:
        return
    settings = read_settings(init.run)
    for name in ("steps", "shift", "times", "timesteps", "sampler"):
        found, asked = getattr(settings, name), getattr(student, name)
        if found != asked:
            raise ValueError(
                f"{init.key} {init.source} was trained with {name} {found}, and student.{name} is {asked}; set it to "
                "that of the run"
            )


@dataclass(frozen=True)
class RewardSetup:
    """Everything the loop calls. `latent_shape` is (C, h, w), or (C, F, h, w) for videos.

    `reference` is the student at the start, frozen; `snapshots` are older policies, roles without updates of their own,
    so that checkpoints hold them, and `decays` how much of each stays at an update. `teacher_spread` is that of the
    teacher's samples where the direct term needs it to tell its tilt. `pixel_role` is the discriminator of Flash-DMD
    and `pixel_real` what it takes for real; `latent_reward` judges noisy latents.
    """

    teacher: Teacher
    student: Student
    student_role: Role
    fake_role: Role | None
    fake_score: FakeScore | None
    reference: Denoiser | None
    snapshots: Mapping[str, Role]
    decays: Mapping[str, DecayConfig]
    prompts: PromptConditions
    latent_shape: tuple[int, ...]
    reward: RewardModel
    held_out: tuple[Scorer, ...]
    processes: Processes
    device: torch.device
    teacher_spread: LatentSpread | None
    pixel_role: Role | None = None
    pixel_real: RealPictures | None = None
    latent_reward: LatentScorer | None = None

    @property
    def behaviour(self) -> nn.Module:
        """The network that rollouts are drawn from: the last snapshot, or the student."""
        return [self.student_role, *self.snapshots.values()][-1].module


def build_setup(
    config: RewardRunConfig,
    needs: Needs,
    data: RewardData,
    trainer: Trainer,
    *,
    scorers: Sequence[Scorer] | None = None,
) -> RewardSetup:
    """Load teacher, student, scorers and what the method needs, and hand what is trained to the trainer.

    `scorers` takes the place of those that `reward.scorers` names, for a reward that is not in the table; weights,
    means and deviations stay those of the configuration. Raises ValueError when a component or a file does not fit.
    """
    teacher = Teacher.of(config.teacher, device=trainer.device)
    shape = teacher.latent_shape(config.data.height, config.data.width, frames=config.data.frames)
    videos = teacher.family.makes_videos
    if videos and (needs.pixel_gan is not None or needs.latent_reward is not None):
        raise ValueError(
            f"{config.method} reads single pictures or their latents here (pixel_gan, latent_reward), and the teacher "
            "makes videos: leave them out, or choose another method"
        )
    reward = build_reward(config, trainer, scorers, needs=needs, videos=videos)
    held_out = load_scorers(config.reward.held_out, device=trainer.device, videos=videos)
    require_prompts([*reward.scorers, *held_out], data.prompts)
    denoiser = build_denoiser(config.student, teacher, data.init, seed=config.run.seed)
    times = exportable_times(teacher.pipeline, teacher.family, config.student, config.student.sampler)
    # Copies are made before the trainer wraps the call of the network.
    reference = denoiser.beside() if needs.reference else None
    if reference is not None:
        reference.requires_grad_(False)
    copies = {name: denoiser.beside() for name in needs.snapshots}
    average = EmaSettings.of_student(config.student)
    student_role = trainer.add_role("student", denoiser, config.student.optimizer, ema=average)
    student_role.total_updates = config.run.steps * config.student.updates_per_rollout
    fake_score, fake_role = add_fake_score(config, data, teacher, trainer)
    snapshots = {name: add_snapshot(name, network, config, trainer) for name, network in copies.items()}
    prompts = embedded_prompts(teacher, config.data, data.prompts, data.pictures)
    pixel_role, pixel_real = add_discriminator(config, needs, data.real, trainer, times=times, shape=shape)
    return RewardSetup(
        teacher=teacher,
        student=Student(denoiser, times, config.student.sampler),
        student_role=student_role,
        fake_role=fake_role,
        fake_score=fake_score,
        reference=reference,
        snapshots=snapshots,
        decays=needs.snapshots,
        prompts=prompts,
        latent_shape=shape,
        reward=reward,
        held_out=held_out,
        processes=Processes(trainer.rank, trainer.world_size),
        device=trainer.device,
        teacher_spread=teacher_spread(config, teacher, prompts, shape) if needs.teacher_spread else None,
        pixel_role=pixel_role,
        pixel_real=pixel_real,
        latent_reward=load_latent_judge(needs, teacher, device=trainer.device),
    )


def add_fake_score(
    config: RewardRunConfig, data: RewardData, teacher: Teacher, trainer: Trainer
) -> tuple[FakeScore | None, Role | None]:
    """The fake score of the student's own run, which knows its distribution, or a copy of the teacher, as a role.

    None where nothing is matched. Raises ValueError when its weights do not fit.
    """
    settings = config.fake_score
    if settings is None:
        return None, None
    fake_score = build_fake_score(settings, teacher, data.fake_score, seed=config.run.seed)
    role = trainer.add_role("fake_score", fake_score, settings.optimizer)
    role.total_updates = config.run.steps * settings.ratio
    return fake_score, role


def add_snapshot(name: str, network: Denoiser, config: RewardRunConfig, trainer: Trainer) -> Role:
    """A policy that is only copied to; it gets no gradient."""
    role = trainer.add_role(name, network, config.student.optimizer)
    network.requires_grad_(False)
    return role


def add_discriminator(
    config: RewardRunConfig,
    needs: Needs,
    real: LatentDataset | None,
    trainer: Trainer,
    *,
    times: Sequence[float],
    shape: tuple[int, ...],
) -> tuple[Role | None, RealPictures | None]:
    """The pixel discriminator as a role with one update in each step, and the real pictures; None where not needed.

    Raises ValueError when the boundary leaves no step to it or to matching, or the latents have another size.
    """
    if needs.pixel_gan is None or real is None:
        return None, None
    route_steps(times, boundary=needs.pixel_gan.boundary)
    real.require_shape(shape, "pixel_gan.latents")
    network = build_discriminator(needs.pixel_gan, seed=config.run.seed)
    return trainer.add_role("pixel_gan", network, needs.pixel_gan.optimizer), RealPictures(real, config.run.seed)


def load_latent_judge(needs: Needs, teacher: Teacher, *, device: torch.device) -> LatentScorer | None:
    """The latent reward model that the method asks, or None.

    Raises ValueError when it is missing, or was made for another teacher.
    """
    if needs.latent_reward is None:
        return None
    model = load_latent_reward(needs.latent_reward, device=device)
    model.require_fit(teacher.latent_shape()[0], teacher.null_condition)
    return model


@torch.no_grad()
def teacher_spread(
    config: RewardRunConfig, teacher: Teacher, prompts: PromptConditions, shape: tuple[int, ...]
) -> LatentSpread:
    """Variances of a few of the teacher's samples."""
    rows = list(range(min(VARIANCE_SAMPLES, len(prompts))))
    condition = prompts.rows(rows)
    noise = sample_noise(config.run.seed, rows, shape, stream="teacher_variance", device=condition.device)
    latents = teacher.sample(noise, condition, steps=VARIANCE_STEPS, guidance=config.teacher.guidance)
    return LatentSpread.of(latents)


def build_reward(
    config: RewardRunConfig, trainer: Trainer, scorers: Sequence[Scorer] | None, *, needs: Needs, videos: bool
) -> RewardModel:
    """The trained reward. Raises ValueError where the method needs a gradient that a scorer does not have."""
    entries = config.reward.scorers
    loaded = load_scorers(entries, device=trainer.device, videos=videos) if scorers is None else tuple(scorers)
    if len(loaded) != len(config.reward.scorers):
        raise ValueError(f"{len(loaded)} scorers for {len(config.reward.scorers)} entries of reward.scorers")
    return RewardModel(loaded, config.reward, gradient=needs.reward_gradient, followed=needs.followed, videos=videos)
