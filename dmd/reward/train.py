"""The training loop of the reward methods: roll out, score, compare within prompts, update."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fewstep.core.randomness import Draw
from fewstep.core.training.metrics import mean_records
from fewstep.core.training.roles import Role, inject_student
from fewstep.core.training.run import open_run
from fewstep.core.training.trainer import Trainer
from fewstep.dmd.reward.chain import Plan, Prepared, Rollout
from fewstep.dmd.reward.config import DecayConfig, RewardRunConfig
from fewstep.dmd.reward.groups import group_samples, require_whole_groups
from fewstep.dmd.reward.matching import fake_step
from fewstep.dmd.reward.methods.nft import ramped_decay
from fewstep.dmd.reward.methods.table import build_method, needs_of
from fewstep.dmd.reward.monitor import RewardWatch, describe_run
from fewstep.dmd.reward.pixel_discriminator import discriminator_step
from fewstep.dmd.reward.rollout import draw_rollout
from fewstep.dmd.reward.scores import Pending, StepRewards, collect, compare, rewards_of_slice
from fewstep.dmd.reward.setup import RewardData, RewardSetup, build_setup
from fewstep.dmd.reward.student_step import RewardMethod, joined_loss
from fewstep.dmd.validation import build_validation, check_validation, rehearsal, watched
from fewstep.evaluation.scorers.failure import RewardError, agree, keeping_failures
from fewstep.evaluation.scorers.scorer import Scorer

Metrics = dict[str, float | Tensor]


def train_reward(config: RewardRunConfig, *, scorers: Sequence[Scorer] | None = None) -> int:
    """Make a few-step student better by a reward; returns the exit code (0, or 128 + signal with a checkpoint written).

    Each step draws whole groups of samples from the policy, scores them in the background, trains the fake score on
    them meanwhile, and then updates the student by the loss of the method whose section is given. `scorers` takes the
    place of those that `reward.scorers` names.

    Raises:
        ValueError: a setting, file or model does not fit. NonFiniteError: a loss or gradient is not finite.
        RewardError: a scorer failed; where no weight had changed yet, the step's start is saved first.
    """
    needs = needs_of(config)
    check_validation(config.validation)
    data = RewardData.read(config, needs)
    with open_run(config) as run:
        config, trainer = run.config, run.trainer
        require_whole_groups(config.reward.group_size, config.run, trainer)
        setup = build_setup(config, needs, data, trainer, scorers=scorers)
        validation = build_validation(config.validation, config.data, setup, trainer)
        setup.teacher.free_after_setup(config.data)
        run.on_close(setup.reward.close)
        method = build_method(config, setup)
        watch = watched(RewardWatch(config, setup, trainer), validation)
        notes = (partial(describe_run, config, setup, trainer), partial(rehearsal, validation, dry=config.run.dry_run))
        for _ in run.steps(watch, *notes, beside=config.student_settings.save):
            with keeping_failures(run):
                run.finish_step(train_step(method, trainer))
    return run.exit_code


def train_step(method: RewardMethod, trainer: Trainer) -> Metrics:
    """One step: rollout, rewards beside the fake score's update, then discriminator and student; its metrics."""
    setup, plan, updates = method.setup, method.plan(trainer.step), method.config.student.updates_per_rollout
    rollouts, pending = sample(method, trainer, plan)
    first = [method.prepare(rollout, inner_draw(rollout, 0, updates)) for rollout in rollouts]
    metrics: Metrics = {}
    if setup.fake_role is not None:
        metrics |= fake_backward(method, trainer, setup.fake_role, rollouts, number=0)
    rewards = judge(method, trainer, rollouts, pending=pending) if plan.judged else None
    # Nothing has changed up to here: a reward that fails leaves the state at the start of the step.
    if rewards is not None:
        metrics |= rewards.log([scorer.card.name for scorer in setup.reward.scorers])
    if setup.fake_role is not None:
        metrics["fake_grad_norm"] = trainer.update(setup.fake_role)
        for number in range(1, fake_updates(method.config)):
            metrics |= fake_backward(method, trainer, setup.fake_role, rollouts, number=number)
            metrics["fake_grad_norm"] = trainer.update(setup.fake_role)
    if setup.pixel_role is not None and plan.gan_step is not None:
        metrics |= discriminator_backward(setup, trainer, setup.pixel_role, rollouts, call=plan.gan_step)
        metrics["discriminator_grad_norm"] = trainer.update(setup.pixel_role)
    for number in range(updates):
        prepared = first
        if number:
            prepared = [method.prepare(rollout, inner_draw(rollout, number, updates)) for rollout in rollouts]
        metrics |= rewarded_backward(method, trainer, rollouts, rewards=rewards, prepared=prepared)
        metrics["student_grad_norm"] = trainer.update(setup.student_role)
    move_snapshots(setup, plan)
    return metrics


def sample(method: RewardMethod, trainer: Trainer, plan: Plan) -> tuple[list[Rollout], list[Pending]]:
    """The rollouts of this process's slices, each handed to the scorers as soon as it is there."""
    setup, rollouts = method.setup, list[Rollout]()
    pending: list[Pending] = []
    failure: RewardError | None = None
    slices = trainer.micro_batches(trainer.local_indices(trainer.step, method.config.run.batch_size))
    try:
        for indices in slices:
            rollouts.append(draw_rollout(method, indices, plan))
            trainer.check_finite("samples", rollouts[-1].x0)
            if plan.judged:
                with torch.no_grad():
                    pixels = setup.teacher.decode(rollouts[-1].x0)
                pending.append(setup.reward.submit(pixels, rollouts[-1].prompts))
    except RewardError as error:
        # Euphonium asks the scorers on the way, and latent judges are asked there, when nothing has changed yet.
        failure = error
    agree(failure, setup.processes, step=trainer.step)
    return rollouts, pending


def judge(
    method: RewardMethod, trainer: Trainer, rollouts: Sequence[Rollout], *, pending: Sequence[Pending]
) -> StepRewards:
    """Wait for the rewards of all slices and compare them within their groups, over all processes."""
    setup, config = method.setup, method.config
    parts = collect(pending, setup.processes, step=trainer.step)
    values = torch.cat([setup.reward.normalised(part) for part in parts], dim=1)
    count = len(rollouts[0].process_rewards)
    process = torch.cat([torch.stack(r.process_rewards) for r in rollouts], dim=1) if count else values[:0]
    size, batch = config.reward.group_size, config.run.batch_size
    numbers = range(trainer.step * batch, (trainer.step + 1) * batch)
    groups = group_samples(numbers, size, prompts=len(setup.prompts), seed=config.run.seed).groups
    return compare(setup.reward, values, process, groups, processes=setup.processes)


def fake_updates(config: RewardRunConfig) -> int:
    """Updates of the fake score on each rollout."""
    return 0 if config.fake_score is None else config.fake_score.ratio


def fake_backward(
    method: RewardMethod, trainer: Trainer, role: Role, rollouts: Sequence[Rollout], *, number: int
) -> dict[str, Tensor]:
    """Add the fake score's gradients of its update `number` on these samples; returns what to log."""
    records = []
    for place, rollout in enumerate(rollouts):
        draw = inner_draw(rollout, number, fake_updates(method.config))
        with trainer.sync(role, place == len(rollouts) - 1):
            loss, record = fake_step(method.config, method.setup, rollout, draw=draw)
            trainer.check_finite("fake score loss", loss)
            trainer.backward(loss)
        records.append(record)
    return mean_records(records)


def discriminator_backward(
    setup: RewardSetup, trainer: Trainer, role: Role, rollouts: Sequence[Rollout], *, call: int
) -> dict[str, Tensor]:
    """Add the pixel discriminator's gradients on the outputs of one call; returns what to log."""
    assert setup.pixel_real is not None
    records = []
    for place, rollout in enumerate(rollouts):
        with trainer.sync(role, place == len(rollouts) - 1):
            with torch.no_grad():
                fake = setup.teacher.decode(rollout.predictions[call])
            real = setup.pixel_real.pixels(rollout.draw.indices, setup.teacher, device=setup.device)
            loss, record = discriminator_step(role.wrapped, fake, real)
            trainer.check_finite("discriminator loss", loss)
            trainer.backward(loss)
        records.append(record)
    return mean_records(records)


def rewarded_backward(
    method: RewardMethod,
    trainer: Trainer,
    rollouts: Sequence[Rollout],
    *,
    rewards: StepRewards | None,
    prepared: Sequence[Prepared],
) -> dict[str, Tensor]:
    """Add the student's gradients of one update on these samples; returns what to log."""
    records, size = [], len(rollouts[0].prompts)
    for place, rollout in enumerate(rollouts):
        own = None
        if rewards is not None:
            first = (trainer.rank * len(rollouts) + place) * size
            own = rewards_of_slice(rewards, first, size, device=trainer.device)
        with trainer.sync(method.setup.student_role, place == len(rollouts) - 1):
            try:
                loss, record = joined_loss(method, rollout, prepared[place], own)
            except RewardError as error:
                # The direct term calls the scorers again, after the fake score has moved.
                raise RewardError(f"step {trainer.step}: {error}", clean=False) from error
            trainer.check_finite("student loss", loss)
            trainer.backward(loss)
        records.append(record)
    return mean_records(records)


def inner_draw(rollout: Rollout, number: int, count: int) -> Draw:
    """Random numbers of update `number` of `count` on one rollout; those of the samples themselves for one update."""
    draw = rollout.draw
    return draw if count == 1 else Draw(draw.seed, [index * count + number for index in draw.indices], draw.device)


@torch.no_grad()
def move_snapshots(setup: RewardSetup, plan: Plan) -> None:
    """After the student's update: older policies follow it, and as planned it is mixed into the fake score."""
    student = [parameter for _, parameter in setup.student_role.parameters]
    for name, role in setup.snapshots.items():
        kept = decay_now(setup.decays[name], setup.student_role.updates)
        inject_student([parameter for _, parameter in role.parameters], student, decay=kept)
    if plan.keep_fake < 1:
        assert setup.fake_role is not None
        inject_student([parameter for _, parameter in setup.fake_role.parameters], student, decay=plan.keep_fake)


def decay_now(decay: DecayConfig, updates: int) -> float:
    """The share of a snapshot that stays."""
    return ramped_decay(updates, start=decay.start, delay=decay.delay, slope=decay.slope, ceiling=decay.ceiling)
