"""The training loop of Astrolabe on streams: stream, branch, score, compare within prompts, update."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fewstep.causal_video.reward_config import CausalRewardConfig
from fewstep.causal_video.reward_setup import CausalRewardSetup, build_setup
from fewstep.causal_video.reward_state import PenaltyState, Risk, judge_risk, no_risk
from fewstep.causal_video.reward_turns import (
    Candidates,
    ChunkTurn,
    WindowPlan,
    chunk_loss,
    draw_candidates,
    plan_window,
    prepare,
)
from fewstep.causal_video.reward_watch import CausalRewardWatch, describe_run
from fewstep.causal_video.setup import CausalData
from fewstep.core.roles import Role
from fewstep.core.run_directory import RunDirectory
from fewstep.core.trainer import Trainer
from fewstep.dmd.groups import group_samples, require_group_size
from fewstep.dmd.reward.flash_dmd import inject_student
from fewstep.dmd.reward.forward_rl import optimality_probability
from fewstep.dmd.reward_train import decay_now, keep
from fewstep.dmd.reward_turns_scores import (
    Pending,
    RewardError,
    StepRewards,
    collect,
    compare,
)
from fewstep.dmd.train import mean_records
from fewstep.evaluation.scorer import Scorer

Metrics = dict[str, float | Tensor]


def train_causal_reward(config: CausalRewardConfig, *, scorers: Sequence[Scorer] | None = None) -> int:
    """Make a causal student better by a reward (Astrolabe, arXiv:2603.17051); returns the exit code (0, or 128 + signal
    with a checkpoint written).

    `scorers` takes the place of those that `reward.scorers` names.

    Raises:
        ValueError: a setting, file or model does not fit. NonFiniteError: a loss or gradient is not finite.
        RewardError: a scorer failed; where no weight had changed yet, the step's start is saved first.
    """
    data = CausalData.read(config.as_stage())
    with ExitStack() as stack:
        run = config.run
        if run.dry_run:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            config = replace(config, run=replace(run, directory=folder, resume=None))
        directory = RunDirectory(Path(config.run.directory), resume=config.run.resume)
        trainer = Trainer(config.run, directory)
        stack.callback(trainer.close)
        slices = trainer.world_size * run.gradient_accumulation
        require_group_size(config.reward.group_size, config.run.batch_size // slices)
        setup = build_setup(config, data, trainer, scorers=scorers)
        stack.callback(setup.reward.close)
        watch, state = CausalRewardWatch(config, setup, trainer), PenaltyState.start(config)
        if directory.resume_path is not None:
            extra = trainer.resume(directory.resume_path)
            watch.load_state(extra["watch"])
            state = PenaltyState.loaded(extra["penalty"])
        trainer.note(describe_run(config, setup, trainer))
        if run.dry_run:
            train_step(config, setup, trainer, state)
            trainer.note("dry run: one step was made, nothing is kept")
            return 0
        if trainer.is_main:
            directory.write_config(config)
            setup.causal.settings.save(directory.path)
        return training_loop(config, setup, trainer, watch=watch, state=state)


def training_loop(
    config: CausalRewardConfig,
    setup: CausalRewardSetup,
    trainer: Trainer,
    *,
    watch: CausalRewardWatch,
    state: PenaltyState,
) -> int:
    """Steps until the run is over or interrupted, with measurements, contact sheets and checkpoints on the way."""
    if trainer.step == 0:
        watch.watch.save_samples()
        watch.monitor.keep_start(watch.measure())
    while not trainer.should_stop():
        try:
            metrics, state = train_step(config, setup, trainer, state)
            trainer.advance()
            if watch.monitor.due:
                metrics |= watch.measure()
        except RewardError as error:
            told = keep(error, trainer, {"watch": watch.state(), "penalty": state.state()})
            raise RewardError(told, clean=error.clean) from error
        watch.watch.look_at(trainer.log(metrics))
        if watch.monitor.due:
            watch.monitor.say()
        if trainer.sample_due:
            watch.watch.save_samples()
        if trainer.checkpoint_due:
            trainer.save({"watch": watch.state(), "penalty": state.state()})
    return trainer.finish({"watch": watch.state(), "penalty": state.state()})


def train_step(
    config: CausalRewardConfig, setup: CausalRewardSetup, trainer: Trainer, state: PenaltyState
) -> tuple[Metrics, PenaltyState]:
    """One step: candidates, their rewards, the student's update, the policies that follow it.

    Returns its metrics and the state of the next step.
    """
    plan, role = plan_window(config, trainer.step), setup.causal.student_role
    slices: list[Candidates] = []
    pending: list[Pending] = []
    prepared: list[tuple[ChunkTurn, ...]] = []
    for indices in trainer.micro_batches(trainer.local_indices(trainer.step, config.run.batch_size)):
        candidates, answer = sample(config, setup, trainer, indices, plan)
        slices.append(candidates)
        pending.append(answer)
        prepared.append(prepare(setup, candidates))
    rewards = judge(config, setup, trainer, pending)
    # Nothing has changed up to here: a reward that fails leaves the state at the start of the step.
    risk = no_risk(config.run.batch_size) if setup.reference is None else judge_risk(config, rewards, state)
    records = []
    for place, (candidates, turns) in enumerate(zip(slices, prepared, strict=True)):
        task = slice_task(rewards, risk, trainer.rank * len(slices) + place, slices=len(slices) * trainer.world_size)
        last = place == len(slices) - 1
        records.append(slice_backward(config, setup, trainer, candidates, turns=turns, task=task, last=last))
    found = mean_records(records)
    metrics: Metrics = {**found, **rewards.log([scorer.card.name for scorer in setup.reward.scorers])}
    metrics["student_grad_norm"] = trainer.update(role)
    metrics["window_start"] = float(plan.start)
    follow(setup.old_role, role, decay=decay_now(config.policy.old, role.updates))
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
    turns: Sequence[ChunkTurn],
    task: SliceTask,
    last: bool,
) -> dict[str, Tensor]:
    """Add the student's gradients of one slice, chunk by chunk in the memory of one; returns what to log."""
    policy, role = config.policy, setup.causal.student_role
    advantages, risky = task.advantages.to(setup.device), task.risky.to(setup.device)
    probability = optimality_probability(advantages, max_advantage=policy.max_advantage)
    record: dict[str, Tensor] = {}
    for number, turn in enumerate(turns):
        with trainer.sync(role, last and number == len(turns) - 1):
            prediction = turn.call.predict(role.wrapped, candidates.window.tokens).x0
            parts = chunk_loss(turn, prediction, probability, risky, nft_beta=policy.nft_beta)
            penalty = task.penalty_factor * parts.penalty
            loss = parts.policy + config.penalty.weight * penalty
            trainer.check_finite("student loss", loss)
            trainer.backward(loss)
        moved = turn.share * (prediction - turn.old_x0).detach().square().mean()
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
