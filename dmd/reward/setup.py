"""The parts of a reward run: student from a distillation, fake score, snapshots of the policy, and the reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from fewstep.core.data import LatentDataset, PromptConditions, read_prompts
from fewstep.core.denoiser import Denoiser
from fewstep.core.export.schedulers import nearest_exportable_times
from fewstep.core.fake_score import FakeScore
from fewstep.core.grids import step_grid
from fewstep.core.networks import build_fake_score, build_student_denoiser, image_shape
from fewstep.core.randomness import sample_noise
from fewstep.core.run_settings import read_settings
from fewstep.core.student import Student
from fewstep.core.teacher import Teacher, check_teacher_path
from fewstep.core.training.checkpoint import latest_checkpoint, load_checkpoint
from fewstep.core.training.processes import Processes
from fewstep.core.training.roles import Role
from fewstep.core.training.run_directory import CONFIG_FILE
from fewstep.core.training.trainer import Trainer
from fewstep.core.weights import EMA_FILE
from fewstep.dmd.reward.config import FORWARD_METHODS, RewardRunConfig
from fewstep.dmd.reward.groups import route_steps
from fewstep.dmd.reward.latent.network import LatentScorer, load_latent_reward
from fewstep.dmd.reward.pixel_discriminator import RealPictures, build_discriminator
from fewstep.dmd.reward.scorers import load_scorers
from fewstep.dmd.reward.scores import RewardModel
from fewstep.evaluation.scorers.scorer import Scorer

# Folders of a diffusers export that may hold the student's network.
NETWORK_FOLDERS = ("transformer", "unet")
VARIANCE_SAMPLES, VARIANCE_STEPS = 16, 20


@dataclass(frozen=True)
class RewardData:
    """What is read from disk before any network is loaded: a mistake here costs seconds.

    `student` is the file of the student's weights, `fake_score` that of the fake score that went with it, or None;
    `real` are latents of real pictures for the pixel GAN, or None.
    """

    prompts: tuple[str, ...]
    student: Path
    fake_score: Path | None
    real: LatentDataset | None = None

    @classmethod
    def read(cls, config: RewardRunConfig) -> RewardData:
        """Read the files that the settings name. Raises ValueError that names a missing or broken one."""
        check_teacher_path(config.teacher.path)
        student, fake_score = find_student(config)
        gan, latents = config.pixel_gan.weight > 0, config.data.latents
        real = LatentDataset.load(latents) if gan and latents is not None else None
        return cls(read_prompts(config.data.prompts), student, fake_score if config.matches else None, real)


def find_student(config: RewardRunConfig) -> tuple[Path, Path | None]:
    """The weights of `student.init` and, for a run directory, those of its fake score.

    A run directory gives the averaged weights of its latest checkpoint, an export its network, a file itself. Raises
    ValueError for none of these, and for a run whose sampler is not the one of this configuration.
    """
    init = Path(config.student.init or "")
    if init.is_file():
        return init, None
    if (init / CONFIG_FILE).is_file():
        settings, student = read_settings(init), config.student
        found = (settings.steps, settings.shift, settings.sampler)
        asked = (student.steps, student.shift, student.sampler)
        if found != asked:
            raise ValueError(
                f"student.init {init} steps by {found} (steps, shift, sampler), this configuration by {asked}; set "
                "student.steps, shift and sampler to those of the run"
            )
        checkpoint = latest_checkpoint(init)
        if checkpoint is None or not (checkpoint / f"{EMA_FILE}.safetensors").is_file():
            raise ValueError(f"student.init {init} has no checkpoint with averaged weights; train it first")
        fake_score = checkpoint / "fake_score.safetensors"
        return checkpoint / f"{EMA_FILE}.safetensors", fake_score if fake_score.is_file() else None
    for name in NETWORK_FOLDERS:
        file = init / name / "diffusion_pytorch_model.safetensors"
        if file.is_file():
            return file, None
    raise ValueError(
        f"student.init {init} is no run directory ({CONFIG_FILE}), no export (transformer or unet) and no "
        ".safetensors file; train a student with scripts/train_dmd.py"
    )


@dataclass(frozen=True)
class RewardSetup:
    """Everything the loop calls. `latent_shape` is (C, h, w).

    `reference` is the student at the start, frozen; `old_role` the policy that nft and crd compare with and
    `sampling_role` the one that crd samples from: roles without updates of their own, so that checkpoints hold them.
    `teacher_variance` is that of the teacher's samples where the direct term needs it to tell its tilt. `pixel_role` is
    the discriminator of Flash-DMD and `pixel_real` what it takes for real; `latent_reward` judges noisy latents.
    """

    teacher: Teacher
    student: Student
    student_role: Role
    fake_role: Role | None
    fake_score: FakeScore | None
    reference: Denoiser | None
    old_role: Role | None
    sampling_role: Role | None
    prompts: PromptConditions
    latent_shape: tuple[int, int, int]
    reward: RewardModel
    held_out: tuple[Scorer, ...]
    processes: Processes
    device: torch.device
    teacher_variance: float | None
    pixel_role: Role | None = None
    pixel_real: RealPictures | None = None
    latent_reward: LatentScorer | None = None

    @property
    def behaviour(self) -> nn.Module:
        """The network that rollouts are drawn from."""
        role = self.sampling_role or self.old_role or self.student_role
        return role.module


def build_setup(
    config: RewardRunConfig, data: RewardData, trainer: Trainer, *, scorers: Sequence[Scorer] | None = None
) -> RewardSetup:
    """Load teacher, student, fake score and scorers, and hand what is trained to the trainer.

    `scorers` takes the place of those that `reward.scorers` names, for a reward that is not in the table; weights,
    means and deviations stay those of the configuration. Raises ValueError when a component or a file does not fit.
    """
    reward = build_reward(config, trainer, scorers)
    held_out = load_scorers(config.reward.held_out, device=trainer.device)
    teacher = Teacher.load(config.teacher.path, device=trainer.device, dtype=getattr(torch, config.teacher.dtype))
    shape = image_shape(teacher.latent_shape(config.data.height, config.data.width))
    denoiser = build_student_denoiser(replace(config.student, init=str(data.student)), teacher, seed=config.run.seed)
    times = nearest_exportable_times(teacher.pipeline, step_grid(config.student.steps, shift=config.student.shift))
    # Copies are made before the trainer wraps the call of the network.
    reference = denoiser.copy(trainable=False) if needs_reference(config) else None
    snapshots = [denoiser.copy() if name in snapshot_names(config) else None for name in ("old_policy", "sampling")]
    student_role = trainer.add_role(
        "student",
        denoiser,
        config.student.optimizer,
        ema_decay=config.student.ema_decay,
        ema_start=config.student.ema_start,
    )
    student_role.total_updates = config.run.steps * config.objective.updates_per_rollout
    fake_score = load_fake_score(config, data, teacher) if config.matches else None
    fake_role = None
    if fake_score is not None:
        fake_role = trainer.add_role("fake_score", fake_score, config.fake_score.optimizer)
        fake_role.total_updates = config.run.steps * config.fake_score.updates_per_student_update
    roles = [
        None if network is None else add_snapshot(name, network, config, trainer)
        for name, network in zip(("old_policy", "sampling"), snapshots, strict=True)
    ]
    size = {"height": config.data.height, "width": config.data.width}
    prompts = PromptConditions(teacher, data.prompts, cache=config.data.cache_prompts, **size)
    pixel_role = None if data.real is None else add_discriminator(config, data.real, trainer, times=times, shape=shape)
    variance = teacher_variance(config, teacher, prompts, shape) if config.objective.direct_weight > 0 else None
    return RewardSetup(
        teacher=teacher,
        student=Student(denoiser, times, config.student.sampler),
        student_role=student_role,
        fake_role=fake_role,
        fake_score=fake_score,
        reference=reference,
        old_role=roles[0],
        sampling_role=roles[1],
        prompts=prompts,
        latent_shape=shape,
        reward=reward,
        held_out=held_out,
        processes=Processes(trainer.rank, trainer.world_size),
        device=trainer.device,
        teacher_variance=variance,
        pixel_role=pixel_role,
        pixel_real=None if data.real is None else RealPictures(data.real, config.run.seed),
        latent_reward=load_latent_judge(config, teacher, times=times, device=trainer.device),
    )


def add_discriminator(
    config: RewardRunConfig, real: LatentDataset, trainer: Trainer, *, times: Sequence[float], shape: tuple[int, ...]
) -> Role:
    """The pixel discriminator as a role with one update in each step.

    Raises ValueError when the boundary leaves no step to it or to matching, or the latents have another size.
    """
    route_steps(times, boundary=config.pixel_gan.boundary)
    if tuple(real.latents.shape[1:]) != shape:
        found = tuple(real.latents.shape[1:])
        raise ValueError(f"data.latents holds latents of shape {found}, this run makes {shape}; set data.height/width")
    assert config.pixel_gan.optimizer is not None
    network = build_discriminator(config.pixel_gan, seed=config.run.seed)
    return trainer.add_role("pixel_gan", network, config.pixel_gan.optimizer)


def load_latent_judge(
    config: RewardRunConfig, teacher: Teacher, *, times: Sequence[float], device: torch.device
) -> LatentScorer | None:
    """The latent reward model that the method asks, or None.

    Raises ValueError when it is missing, was made for another teacher, or no step is left for it.
    """
    if config.latent_reward is None:
        return None
    if config.method == "euphonium" and not any(t <= config.process.highest_time for t in times[:-1]):
        raise ValueError(
            f"process.highest_time {config.process.highest_time} leaves none of the random steps at "
            f"{', '.join(f'{t:g}' for t in times[:-1])} to the latent judge; take a student of more steps, or raise it"
        )
    model = load_latent_reward(config.latent_reward, device=device)
    model.require_fit(teacher.latent_shape()[0], teacher.null_condition)
    return model


@torch.no_grad()
def teacher_variance(
    config: RewardRunConfig, teacher: Teacher, prompts: PromptConditions, shape: tuple[int, int, int]
) -> float:
    """Variance over all elements of a few of the teacher's samples."""
    rows = list(range(min(VARIANCE_SAMPLES, len(prompts))))
    condition = prompts.rows(rows)
    noise = sample_noise(config.run.seed, rows, shape, stream="teacher_variance", device=condition.tokens.device)
    latents = teacher.sample(noise, condition, steps=VARIANCE_STEPS, guidance=config.teacher.guidance)
    return latents.double().var().item()


def build_reward(config: RewardRunConfig, trainer: Trainer, scorers: Sequence[Scorer] | None) -> RewardModel:
    """The trained reward; which methods need its gradient is decided here."""
    loaded = load_scorers(config.reward.scorers, device=trainer.device) if scorers is None else tuple(scorers)
    if len(loaded) != len(config.reward.scorers):
        raise ValueError(f"{len(loaded)} scorers for {len(config.reward.scorers)} entries of reward.scorers")
    objective = config.objective
    steers = config.method == "euphonium" and config.process.judge == "decoded"
    follows = objective.direct_weight > 0 or steers
    return RewardModel(loaded, config.reward, gradient=follows or (config.method == "redmd" and objective.saliency))


def snapshot_names(config: RewardRunConfig) -> tuple[str, ...]:
    """Snapshots that the method keeps: nft an old policy, crd one more to sample from."""
    if config.method not in FORWARD_METHODS:
        return ()
    return ("old_policy",) if config.method == "nft" else ("old_policy", "sampling")


def needs_reference(config: RewardRunConfig) -> bool:
    """Whether the frozen start is called in the loss."""
    weight = config.forward.kl_weight if config.method in FORWARD_METHODS else config.chain.kl_weight
    return weight > 0 or config.method == "flash"


def add_snapshot(name: str, network: Denoiser, config: RewardRunConfig, trainer: Trainer) -> Role:
    """A policy that is only copied to; it gets no gradient."""
    role = trainer.add_role(name, network, config.student.optimizer)
    network.requires_grad_(False)
    return role


def load_fake_score(config: RewardRunConfig, data: RewardData, teacher: Teacher) -> FakeScore:
    """The fake score of the student's own run, which knows its distribution, or a copy of the teacher.

    Raises ValueError when its weights do not fit.
    """
    fake_score = build_fake_score(config.fake_score, teacher, seed=config.run.seed, with_heads=False)
    if data.fake_score is None or config.fake_score.lora_rank > 0:
        return fake_score
    tensors = load_checkpoint(data.fake_score.parent).tensors["fake_score"]
    trunk = {name: tensor for name, tensor in tensors.items() if not name.startswith("heads.")}
    missing, unexpected = fake_score.load_state_dict(trunk, strict=False)
    if missing or unexpected:
        raise ValueError(
            f"{data.fake_score} does not fit the teacher's network: {len(missing)} weights missing {missing[:3]}, "
            f"{len(unexpected)} unknown {unexpected[:3]}; give student.init as a file to start from the teacher's"
        )
    return fake_score
