"""Trains a latent reward model: a scorer's reward of clean samples, learnt from their noised latents.

Legend: N samples, G groups of K samples of one prompt; latents [N, C, h, w], rewards [N]; n samples of one slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.data import LatentDataset, PromptConditions, read_prompts, rows_of_samples
from fewstep.core.export.run import load_run_student
from fewstep.core.paths import add_noise
from fewstep.core.randomness import sample_noise, sample_uniform
from fewstep.core.run_settings import SETTINGS_FILE, read_settings
from fewstep.core.teacher import Teacher
from fewstep.core.teacher_files import check_teacher, needs_pictures
from fewstep.core.training.metrics import mean_records
from fewstep.core.training.roles import Role
from fewstep.core.training.run import Unwatched, open_run
from fewstep.core.training.trainer import Trainer
from fewstep.dmd.reward.config import RewardSettings
from fewstep.dmd.reward.latent.config import LatentRewardConfig
from fewstep.dmd.reward.latent.loss import bradley_terry_loss, correlation, latent_regression_loss, pair_accuracy
from fewstep.dmd.reward.latent.network import (
    Agreement,
    LatentReward,
    LatentRewardRecord,
    LatentRewardShape,
    latent_scores,
    prompt_vector,
    save_latent_reward,
    with_scale,
)
from fewstep.dmd.reward.scorers import load_scorers
from fewstep.dmd.reward.scores import RewardModel
from fewstep.evaluation.scorers.total import score_all

# Samples drawn, decoded and scored at a time.
BATCH = 64
MODEL_FOLDER = "latent_reward"


@dataclass(frozen=True, eq=False)
class ScoredLatents:
    """Clean latents [N, C, h, w] on the CPU with a prompt and a reward [N] each, in G whole groups of one prompt.

    The first `trained` groups are learnt from, the others judge.
    """

    latents: Tensor
    rewards: Tensor
    conditions: PromptConditions
    group_size: int
    trained: int

    @property
    def groups(self) -> int:
        return len(self.latents) // self.group_size

    def rows(self, groups: Sequence[int]) -> list[int]:
        """The samples of these groups, in order."""
        return [group * self.group_size + place for group in groups for place in range(self.group_size)]


def train_latent_reward(config: LatentRewardConfig) -> int:
    """Train a latent reward model into `latent_reward` of the run directory; returns the exit code.

    Raises:
        ValueError: a setting, file or model does not fit. NonFiniteError: a loss or gradient is not finite.
    """
    check_teacher(config.teacher)
    with open_run(config) as run:
        config, trainer = run.config, run.trainer
        samples = scored_samples(config, device=trainer.device)
        model = build_model(config, samples)
        role = trainer.add_role("latent_reward", model, config.optimizer)
        for _ in run.steps(Unwatched(), partial(describe_run, config, samples)):
            run.finish_step(train_step(config, samples, trainer, role=role))
            if trainer.is_main and trainer.step >= config.run.steps:
                trainer.note(report(config, samples, model, trainer))
    return run.exit_code


def describe_run(config: LatentRewardConfig, samples: ScoredLatents) -> str:
    """What there is to learn from, as text."""
    told = f"{samples.groups} groups of {samples.group_size}, {samples.trained} of them to learn from"
    return f"{config.objective}: {told}; rewards {samples.rewards.mean():.4g} +- {samples.rewards.std():.4g}"


def scored_samples(config: LatentRewardConfig, *, device: torch.device) -> ScoredLatents:
    """Draw or read the samples, decode and score them. A function of the settings, so a resumed run has the same.

    Raises ValueError when a file is missing, or there are too few groups to learn from and to judge by.
    """
    settings, source = config.samples, Path(config.samples.source)
    if needs_pictures(config.teacher):
        raise ValueError(
            f"{config.teacher.path} is told a picture with each prompt, and a latent reward is trained on prompts "
            "alone: train it on a model that is told text"
        )
    if (source / SETTINGS_FILE).is_file():
        teacher, dataset = draw_of_student(config, device=device)
    else:
        if settings.prompts is not None:
            raise ValueError(f"samples.source {source} is no run of a student: latents have prompts, leave prompts out")
        teacher = Teacher.of(config.teacher, device=device)
        dataset = whole_groups(LatentDataset.load(source), config.reward.group_size, limit=settings.count)
    groups = len(dataset.prompts) // config.reward.group_size
    trained = groups - max(1, round(groups * settings.held_out))
    if trained < 1:
        raise ValueError(f"{groups} groups of {config.reward.group_size}; give samples for at least two")
    scorers, chunk = config.reward.scorers, config.reward.chunk
    whole = RewardSettings(scorers=scorers, group_size=config.reward.group_size, chunk=chunk, overlap=False)
    reward = RewardModel(load_scorers(scorers, device=device), whole, gradient=False)
    values = []
    for start in range(0, len(dataset.prompts), BATCH):
        rows = slice(start, start + BATCH)
        with torch.no_grad():
            pixels = teacher.decode(dataset.latents[rows].to(device))
        parts = score_all(reward.scorers, pixels, list(dataset.prompts[rows]), chunk=chunk)
        values.append(reward.total(reward.normalised(parts)).cpu())
    conditions = PromptConditions(teacher, dataset.prompts, cache=True)
    return ScoredLatents(dataset.latents, torch.cat(values), conditions, config.reward.group_size, trained)


@torch.no_grad()
def draw_of_student(config: LatentRewardConfig, *, device: torch.device) -> tuple[Teacher, LatentDataset]:
    """Samples of the averaged student of a run, in groups of one prompt, which go through the prompts in turn."""
    settings, source, size = config.samples, Path(config.samples.source), config.reward.group_size
    if settings.prompts is None:
        raise ValueError(f"samples.source {source} is a student; set samples.prompts to a text file of prompts")
    if config.teacher.dtype != "float32":
        raise ValueError(
            f"teacher.dtype is {config.teacher.dtype}: a student draws its samples in float32; leave it out"
        )
    prompts, chosen = read_prompts(settings.prompts), replace(read_settings(source), teacher_path=config.teacher.path)
    loaded = load_run_student(source, chosen, device=str(device))
    shape = loaded.teacher.latent_shape(chosen.height, chosen.width)
    count = settings.count // size * size
    rows = [number // size % len(prompts) for number in range(count)]
    conditions = PromptConditions(loaded.teacher, prompts, cache=True, height=chosen.height, width=chosen.width)
    latents = []
    for start in range(0, count, BATCH):
        numbers = range(start, min(start + BATCH, count))
        streams = ("latent_reward", *(f"latent_reward_{step}" for step in range(len(loaded.student.times) - 1)))
        noise = [sample_noise(config.run.seed, numbers, shape, stream=name, device=device) for name in streams]
        own = conditions.rows([rows[number] for number in numbers])
        latents.append(loaded.student.sample(noise[0], own, noise[1:]).float().cpu())
    if not latents:
        raise ValueError(f"samples.count is {settings.count}, less than one group of reward.group_size {size}")
    return loaded.teacher, LatentDataset(torch.cat(latents), tuple(prompts[row] for row in rows))


def whole_groups(dataset: LatentDataset, size: int, *, limit: int) -> LatentDataset:
    """The latents in groups of `size` of one prompt, at most `limit` samples; what is left over of a prompt is dropped.

    Groups are dealt from all prompts in turn. Raises ValueError when no prompt has that many latents.
    """
    places: dict[str, list[int]] = {}
    for row, prompt in enumerate(dataset.prompts):
        places.setdefault(prompt, []).append(row)
    rounds = max(len(rows) // size for rows in places.values())
    groups = [
        rows[start : start + size]
        for start in range(0, rounds * size, size)
        for rows in places.values()
        if len(rows) >= start + size
    ]
    rows = [row for group in groups[: limit // size] for row in group]
    if not rows:
        raise ValueError(f"no prompt has {size} latents within the first {limit}; lower reward.group_size")
    return LatentDataset(dataset.latents[rows], tuple(dataset.prompts[row] for row in rows))


def build_model(config: LatentRewardConfig, samples: ScoredLatents) -> LatentReward:
    """The model at the start, with mean and deviation of the trained rewards where it regresses on them."""
    width = prompt_vector(samples.conditions.rows([0])).shape[1]
    network = config.network
    shape = LatentRewardShape(samples.latents.shape[1], width, network.width, network.blocks)
    # For its check that the rewards vary, too.
    scaled = with_scale(shape, samples.rewards[: samples.trained * samples.group_size])
    return LatentReward(scaled if config.objective == "regression" else shape, seed=config.run.seed)


def train_step(
    config: LatentRewardConfig, samples: ScoredLatents, trainer: Trainer, *, role: Role
) -> dict[str, float | Tensor]:
    """One update on whole groups, each noised to a time of its own. Returns its metrics."""
    size, seed, records = samples.group_size, config.run.seed, []
    slices = trainer.micro_batches(trainer.local_indices(trainer.step, config.run.batch_size))
    for place, indices in enumerate(slices):
        numbers = [index // size for index in indices[::size]]
        rows = samples.rows(rows_of_samples(numbers, samples.trained, seed))
        u = sample_uniform(seed, numbers, (), stream="latent_reward_time", device=trainer.device)
        t = (config.t_min + (config.t_max - config.t_min) * u).repeat_interleave(size)
        x0, rewards, condition = batch_of(samples, rows, device=trainer.device)
        eps = sample_noise(seed, indices, tuple(x0.shape[1:]), stream="latent_reward_noise", device=trainer.device)
        groups = torch.arange(len(numbers), device=trainer.device).repeat_interleave(size)
        with trainer.sync(role, place == len(slices) - 1):
            scores = role.wrapped(add_noise(x0, eps, t), t, condition)
            loss = objective_loss(config, samples, scores, rewards, groups=groups)
            trainer.check_finite("latent reward loss", loss)
            trainer.backward(loss)
        records.append({"loss": loss.detach()})
    return {**mean_records(records), "grad_norm": trainer.update(role)}


def objective_loss(
    config: LatentRewardConfig, samples: ScoredLatents, scores: Tensor, rewards: Tensor, *, groups: Tensor
) -> Tensor:
    """The loss of the settings; both are free of the reward's scale."""
    std = samples.rewards[: samples.trained * samples.group_size].std().to(scores.device)
    if config.objective == "regression":
        return latent_regression_loss(scores / std, rewards / std)
    return bradley_terry_loss(scores, rewards / std, groups, temperature=config.temperature)


def batch_of(samples: ScoredLatents, rows: Sequence[int], *, device: torch.device) -> tuple[Tensor, Tensor, Condition]:
    """Clean latents, rewards and conditions of these rows."""
    rows = list(rows)
    return samples.latents[rows].to(device), samples.rewards[rows].to(device), samples.conditions.rows(rows)


@torch.no_grad()
def measure_agreement(
    config: LatentRewardConfig, samples: ScoredLatents, model: LatentReward, *, device: torch.device
) -> tuple[Agreement, ...]:
    """Agreement with the reward on the held-out groups, at each of `report_times`, with noise of its own.

    A held-out sample has its reward, whatever the noise did to it: at large t no model can agree fully.
    """
    rows = samples.rows(range(samples.trained, samples.groups))
    groups = torch.arange(samples.groups - samples.trained).repeat_interleave(samples.group_size)
    shape, found = tuple(samples.latents.shape[1:]), []
    for number, time in enumerate(config.report_times):
        scores = []
        for start in range(0, len(rows), BATCH):
            own = rows[start : start + BATCH]
            x0, _, condition = batch_of(samples, own, device=device)
            stream = f"latent_reward_report_{number}"
            eps = sample_noise(config.run.seed, own, shape, stream=stream, device=device)
            t = torch.full((len(own),), time, device=device)
            scores.append(latent_scores(model, add_noise(x0, eps, t), t, condition).cpu())
        told, truth = torch.cat(scores), samples.rewards[rows]
        found.append(Agreement(time, correlation(told, truth), pair_accuracy(told, truth, groups)))
    return tuple(found)


def report(config: LatentRewardConfig, samples: ScoredLatents, model: LatentReward, trainer: Trainer) -> str:
    """Write the model and what it reached into the run directory; says both in words."""
    agreement = measure_agreement(config, samples, model.eval(), device=trainer.device)
    record = LatentRewardRecord(
        scorers=tuple(f"{entry.weight:g} {entry.name}" for entry in config.reward.scorers),
        objective=config.objective,
        samples=samples.trained * samples.group_size,
        held_out=(samples.groups - samples.trained) * samples.group_size,
        steps=config.run.steps,
        seed=config.run.seed,
        agreement=agreement,
    )
    folder = trainer.directory.path / MODEL_FOLDER
    save_latent_reward(model, record, folder)
    lines = [f"t = {a.t:g}: correlation {a.correlation:.3f}, pairs {a.pair_accuracy:.3f}" for a in agreement]
    return "\n".join([f"wrote {folder}; on {record.held_out} held-out samples", *lines])
