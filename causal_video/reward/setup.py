"""The parts of a reward run on streams: the student, the older policy and the reference beside it, and the reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan

from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.reward.config import CausalRewardConfig
from fewstep.causal_video.stages.batch import causal_settings
from fewstep.causal_video.stages.setup import CausalSetup, latent_shape
from fewstep.causal_video.stages.student import build_student, holds_two_times, smoothing_of
from fewstep.causal_video.vae_stream import check_vae
from fewstep.core.data import PromptConditions, read_prompts
from fewstep.core.networks.other_models import check_models
from fewstep.core.networks.shared import beside
from fewstep.core.teacher import Teacher
from fewstep.core.training.ema import EmaSettings
from fewstep.core.training.processes import Processes
from fewstep.core.training.roles import Role
from fewstep.core.training.trainer import Trainer
from fewstep.core.weights import StoredWeights, find_weights
from fewstep.dmd.reward.scorers import load_scorers
from fewstep.dmd.reward.scores import RewardModel
from fewstep.evaluation.scorers.scorer import Scorer, require_prompts


@dataclass(frozen=True)
class CausalRewardData:
    """What is read from disk, before any network is loaded: a mistake here costs seconds."""

    prompts: tuple[str, ...]
    init: StoredWeights

    @classmethod
    def read(cls, config: CausalRewardConfig) -> CausalRewardData:
        """Read the files that the settings name. Raises ValueError that names a missing or broken one."""
        check_models(config.teacher, student=config.student)
        assert config.student.init is not None
        init = find_weights(config.student.init)
        if config.student.second_time != "none" and not holds_two_times(init):
            raise ValueError(
                f"student.init {init.source} holds a network of one time, and student.second_time is "
                f"{config.student.second_time!r}: a student is rewarded in the steps that it takes; leave it out"
            )
        return cls(read_prompts(config.data.prompts), init)


@dataclass(frozen=True)
class CausalRewardSetup:
    """Everything the loop calls.

    `causal` has teacher, student, prompts and settings. `old` makes the candidates and is compared with, `reference`
    holds back (None without a penalty): roles without updates of their own, so that checkpoints hold them.
    """

    causal: CausalSetup
    old: CausalWan
    old_role: Role
    reference: CausalWan | None
    reference_role: Role | None
    vae: AutoencoderKLWan
    reward: RewardModel
    held_out: tuple[Scorer, ...]
    processes: Processes
    device: torch.device


def build_setup(
    config: CausalRewardConfig, data: CausalRewardData, trainer: Trainer, *, scorers: Sequence[Scorer] | None = None
) -> CausalRewardSetup:
    """Load teacher, student and scorers, copy the student into the older policy and the reference.

    `scorers` takes the place of those that `reward.scorers` names, for a reward that is not in the table; names,
    weights, means and deviations stay those of the configuration. Raises ValueError when a component or a file does not
    fit.
    """
    reward = build_reward(config, trainer, scorers)
    held_out = load_scorers(config.reward.held_out, device=trainer.device, videos=True)
    require_prompts([*reward.scorers, *held_out], data.prompts)
    teacher = Teacher.of(config.teacher, device=trainer.device)
    vae = teacher.pipeline.components["vae"]
    check_vae(vae)
    settings = causal_settings(config.student)
    shape = latent_shape((config.data.height, config.data.width), None, teacher, settings)
    student = build_student(config.student, teacher, data.init, seed=config.run.seed)
    # Copies are made before the trainer wraps the call of the network.
    old = CausalWan(beside(student.transformer))
    reference = CausalWan(beside(student.transformer)) if config.section.penalty is not None else None
    student_role = trainer.add_role(
        "student",
        student,
        config.student.optimizer,
        ema=EmaSettings.of_student(config.student),
    )
    causal = CausalSetup(
        teacher=teacher,
        student=student,
        student_role=student_role,
        settings=settings,
        prompts=PromptConditions(teacher, data.prompts, cache=config.data.cache_prompts),
        latent_shape=shape,
        time_smoothing=smoothing_of(data.init),
    )
    return CausalRewardSetup(
        causal=causal,
        old=old,
        old_role=add_snapshot("old_policy", old, config, trainer),
        reference=reference,
        reference_role=None if reference is None else add_snapshot("reference", reference, config, trainer),
        vae=vae,
        reward=reward,
        held_out=held_out,
        processes=Processes(trainer.rank, trainer.world_size),
        device=trainer.device,
    )


def build_reward(config: CausalRewardConfig, trainer: Trainer, scorers: Sequence[Scorer] | None) -> RewardModel:
    """The trained reward, of videos. Raises ValueError unless there is one scorer for each entry."""
    entries = config.reward.scorers
    loaded = load_scorers(entries, device=trainer.device, videos=True) if scorers is None else tuple(scorers)
    if len(loaded) != len(entries):
        raise ValueError(f"{len(loaded)} scorers for {len(entries)} entries of reward.scorers")
    return RewardModel(loaded, config.reward, gradient=False, videos=True)


def add_snapshot(name: str, network: CausalWan, config: CausalRewardConfig, trainer: Trainer) -> Role:
    """A policy that is only copied to; it gets no gradient."""
    role = trainer.add_role(name, network, config.student.optimizer)
    network.requires_grad_(False)
    return role
