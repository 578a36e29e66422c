"""The training loop of Astrolabe on streams: stream, branch, score, compare within prompts, update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fewstep.causal_video.reward.config import CausalRewardConfig
from fewstep.causal_video.reward.setup import CausalRewardData, CausalRewardSetup, build_setup
from fewstep.causal_video.reward.state import PenaltyState, Risk, judge_risk, no_risk
from fewstep.causal_video.reward.watch import CausalRewardWatch, describe_run
from fewstep.causal_video.reward.window import (
    Candidates,
    ChunkStep,
    WindowPlan,
    chunk_loss,
    draw_candidates,
    plan_window,
    prepare,
)
from fewstep.core.training.metrics import mean_records
from fewstep.core.training.roles import Role, inject_student
from fewstep.core.training.run import open_run
from fewstep.core.training.trainer import Trainer
from fewstep.dmd.reward.groups import group_samples, require_whole_groups
from fewstep.dmd.reward.methods.nft import optimality_probability
from fewstep.dmd.reward.scores import Pending, StepRewards, collect, compare
from fewstep.dmd.reward.train import decay_now
from fewstep.evaluation.scorers.failure import keeping_failures
from fewstep.evaluation.scorers.scorer import Scorer

Metrics = dict[str, float | Tensor]


def train_causal_reward(config: CausalRewardConfig, *, scorers: Sequence[Scorer] | None = None) -> int:
    """Make a causal student better by a reward (Astrolabe, arXiv:2603.17051); returns the exit code (0, or 128 + signal
    with a checkpoint written).

    `scorers` takes the place of those that `reward.scorers` names.

    Raises:
        ValueError: a setting, file or model does not fit. NonFiniteError: a loss or gradient is not finite.
        RewardError: a scorer failed; where no weight had changed yet, the step's start is saved first.
    """
    data = CausalRewardData.read(config)
    with open_run(config) as run:
        config, trainer = run.config, run.trainer
        require_whole_groups(config.reward.group_size, config.run, trainer)
        setup = build_setup(config, data, trainer, scorers=scorers)
        setup.causal.teacher.free_after_setup(config.data)
        run.on_close(setup.reward.close)
        watch = CausalRewardWatch(config, setup, trainer)
        notes = partial(describe_run, config, setup, trainer)
        for _ in run.steps(watch, notes, beside=setup.causal.settings.save):
            with keeping_failures(run):
                metrics, watch.penalty = train_step(config, setup, trainer, watch.penalty)
                run.finish_step(metrics)
    return run.exit_code


def train_step(
    config: CausalRewardConfig, setup: CausalRewardSetup, trainer: Trainer, state: PenaltyState
) -> tuple[Metrics, PenaltyState]:
    """One step: candidates, their rewards, the student's update, the policies that follow it.

    Returns its metrics and the state of the next step.
    """
    plan, role = plan_window(config, trainer.step), setup.causal.student_role
    slices: list[Candidates] = []
    pending: list[Pending] = []
    prepared: list[tuple[ChunkStep, ...]] = []
    for indices in trainer.micro_batches(trainer.local_indices(trainer.step, config.run.batch_size)):
        candidates, answer = sample(config, setup, trainer, indices, plan)
        slices.append(candidates)
        pending.append(answer)
        prepared.append(prepare(setup, candidates))
    rewards = judge(config, setup, trainer, pending)
    # Nothing has changed up to here: a reward that fails leaves the state at the start of the step.
    risk = no_risk(config.run.batch_size) if setup.reference is None else judge_risk(config, rewards, state)
    records = []
    for place, (candidates, steps) in enumerate(zip(slices, prepared, strict=True)):
        task = slice_task(rewards, risk, trainer.rank * len(slices) + place, slices=len(slices) * trainer.world_size)
        last = place == len(slices) - 1
        records.append(slice_backward(config, setup, trainer, candidates, steps=steps, task=task, last=last))
    found = mean_records(records)
    metrics: Metrics = {**found, **rewards.log([scorer.card.name for scorer in setup.reward.scorers])}
    metrics["student_grad_norm"] = trainer.update(role)
    metrics["window_start"] = float(plan.start)
    follow(setup.old_role, role, decay=decay_now(config.section.old, role.updates))
    if setup.reference_role is None:
        return metrics, state
    stale = state.is_stale(config, setup.processes.mean(found["reference_penalty"]).item())
    if stale:
        follow(setup.reference_role, role, decay=0.0)
    metrics |= {
        "risky_share": risk.risky.double().mean().item(),
        "rank_gap": risk.mean_gap,
        "risk_quantile": state.risk.share,
        "reference_reset": float(stale),
    }
    return metrics, state.after(risk.mean_gap, reset=stale)


def sample(
    config: CausalRewardConfig,
    setup: CausalRewardSetup,
    trainer: Trainer,
    indices: Sequence[int],
    plan: WindowPlan,
) -> tuple[Candidates, Pending]:
    """Candidates of one slice, handed to the scorers as soon as they are there."""
    candidates = draw_candidates(config, setup, indices, plan)
    trainer.check_finite("candidates", candidates.window.latents)
    return candidates, setup.reward.submit(candidates.window.pixels, candidates.prompts)


def judge(
    config: CausalRewardConfig, setup: CausalRewardSetup, trainer: Trainer, pending: Sequence[Pending]
) -> StepRewards:
    """Wait for the rewards of all slices and compare them within their prompts, over all processes."""
    parts = collect(pending, setup.processes, step=trainer.step)
    values = torch.cat([setup.reward.normalised(part) for part in parts], dim=1)
    size, batch = config.reward.group_size, config.run.batch_size
    numbers = range(trainer.step * batch, (trainer.step + 1) * batch)
    groups = group_samples(numbers, size, prompts=len(setup.causal.prompts), seed=config.run.seed).groups
    return compare(setup.reward, values, values[:0], groups, processes=setup.processes)


@dataclass(frozen=True, eq=False)
class SliceTask:
    """What the comparison says of one slice: advantages [n] in fp32, and bool [n] who is held back.

    `penalty_factor` makes the mean over the slices of their penalties one over the risky candidates of the whole step.
    """

    advantages: Tensor
    risky: Tensor
    penalty_factor: float


def slice_task(rewards: StepRewards, risk: Risk, number: int, *, slices: int) -> SliceTask:
    """That of slice `number` of all `slices` of a step, over all processes."""
    count = len(risk.risky) // slices
    own = risk.risky[number * count : (number + 1) * count]
    advantages = rewards.advantages.values[number * count : (number + 1) * count].float()
    total = int(risk.risky.sum())
    return SliceTask(advantages, own, int(own.sum()) * slices / total if total else 0.0)


def slice_backward(
    config: CausalRewardConfig,
    setup: CausalRewardSetup,
    trainer: Trainer,
    candidates: Candidates,
    *,
    steps: Sequence[ChunkStep],
    task: SliceTask,
    last: bool,
) -> dict[str, Tensor]:
    """Add the student's gradients of one slice, chunk by chunk in the memory of one; returns what to log."""
    section, role = config.section, setup.causal.student_role
    weight = 0.0 if section.penalty is None else section.penalty.weight
    advantages, risky = task.advantages.to(setup.device), task.risky.to(setup.device)
    probability = optimality_probability(advantages, max_advantage=section.max_advantage)
    record: dict[str, Tensor] = {}
    for number, step in enumerate(steps):
        with trainer.sync(role, last and number == len(steps) - 1):
            prediction = step.call.predict(role.wrapped, candidates.window.tokens).x0
            parts = chunk_loss(step, prediction, probability, risky, nft_beta=section.nft_beta)
            penalty = task.penalty_factor * parts.penalty
            loss = parts.policy + weight * penalty
            trainer.check_finite("student loss", loss)
            trainer.backward(loss)
        moved = step.share * (prediction - step.old_x0).detach().square().mean()
        found = {"student_loss": loss, "policy_loss": parts.policy, "old_policy_distance": moved}
        if setup.reference is not None:
            found["reference_penalty"] = penalty
        record = {name: record.get(name, 0.0) + value.detach() for name, value in found.items()}
    # A mean square over the window up to here.
    return {**record, "old_policy_distance": record["old_policy_distance"].sqrt()}


@torch.no_grad()
def follow(role: Role, student: Role, *, decay: float) -> None:
    """role <- decay role + (1 - decay) student; 0 is a copy."""
    ours, theirs = ([parameter for _, parameter in one.parameters] for one in (role, student))
    inject_student(ours, theirs, decay=decay)
