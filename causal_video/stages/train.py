"""The training loop of causal video students: stages on given videos, and self-forcing on rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

from torch import Tensor

from fewstep.causal_video.stages.batch import (
    ForcingStep,
    VideoBatch,
    context_of_batch,
    gives_image,
    noisy_context,
)
from fewstep.causal_video.stages.config import CausalConfig, FlowMapStage, JointConfig, VideoStage
from fewstep.causal_video.stages.consistency import check_tangent, tf_dcm_step, tf_scm_step
from fewstep.causal_video.stages.flow_map import check_flow_map, tf_flow_map_step
from fewstep.causal_video.stages.forcing import (
    diffusion_forcing_step,
    drop_captions,
    drop_controls,
    teacher_forcing_step,
)
from fewstep.causal_video.stages.ode import ode_step
from fewstep.causal_video.stages.redmd import RolloutReward
from fewstep.causal_video.stages.sections import (
    DiffusionForcingConfig,
    FlowConfig,
    OdeConfig,
    SelfForcingConfig,
    TeacherForcingConfig,
    TfAnyflowConfig,
    TfDcmConfig,
    TfMeanflowConfig,
    TfScmConfig,
)
from fewstep.causal_video.stages.self_forcing import fake_score_backward, plan_rollout, student_backward
from fewstep.causal_video.stages.setup import CausalData, CausalSetup, build_setup
from fewstep.causal_video.stages.watch import VideoWatch, describe_run
from fewstep.core.randomness import Draw
from fewstep.core.training.metrics import mean_records
from fewstep.core.training.run import open_run
from fewstep.core.training.trainer import Trainer
from fewstep.dmd.config import matching_at
from fewstep.evaluation.scorers.failure import keeping_failures
from fewstep.evaluation.scorers.scorer import Scorer

Metrics = dict[str, float | Tensor]


def train_causal_video(config: CausalConfig, *, scorers: Sequence[Scorer] | None = None) -> int:
    """Train a causal student; returns the exit code (0, or 128 + signal after SIGTERM or Ctrl-C, with a checkpoint).

    The stages of Causal-rCM (arXiv:2606.25473) are runs of their own, each starting from the one before
    (`student.init`): flow matching under teacher or diffusion forcing, consistency on clean context, self-forcing.
    `scorers` take the place of those that `redmd.scorers` names.

    Raises:
        ValueError: a setting, file or model does not fit. NonFiniteError: a loss or gradient is not finite.
        RewardError: a scorer failed; the step's start is saved first.
    """
    check_flow_map(config)
    data = CausalData.read(config)
    with open_run(config) as run:
        config, trainer = run.config, run.trainer
        # A scorer that is not there fails before the teacher is loaded.
        weigh = None
        if config.redmd is not None:
            captions = () if data.real is None else data.real.prompts
            weigh = RolloutReward(config.redmd, trainer, (*data.prompts, *captions), scorers).weigh
        setup = build_setup(config, data, trainer, weigh=weigh)
        setup.teacher.free_after_setup(config.data)
        notes: list[Callable[[], str | None]] = [partial(describe_run, config, setup, trainer)]
        section = config.stage if isinstance(config.stage, FlowMapStage) else config.consistency
        if section is not None and not isinstance(section, TfDcmConfig):
            name = "joint.tf_scm" if config.joint is not None else config.method
            notes.append(partial(check_tangent, section, setup, trainer, section=name))
        samples, guidance = config.data.sample_count, config.teacher.guidance
        watch = VideoWatch(setup, trainer, sample_count=samples, guidance=guidance, is_flow=config.is_flow)
        for _ in run.steps(watch, *notes, beside=setup.save_settings):
            with keeping_failures(run):
                run.finish_step(train_step(config, setup, trainer))
    return run.exit_code


def train_step(config: CausalConfig, setup: CausalSetup, trainer: Trainer) -> Metrics:
    """One step of the configured stage. Returns its metrics."""
    config = matching_at(config, setup.student_role.updates)
    step = rollout_step if isinstance(config.stage, SelfForcingConfig) else video_step
    return step(config, setup, trainer)


def video_step(config: CausalConfig, setup: CausalSetup, trainer: Trainer) -> Metrics:
    """One step of the student on given videos or trajectories. Returns its metrics."""
    slices = trainer.micro_batches(trainer.local_indices(trainer.step, config.run.batch_size))
    records: list[dict[str, Tensor]] = []
    for number, indices in enumerate(slices):
        draw = Draw(config.run.seed, indices, trainer.device)
        with trainer.sync(setup.student_role, number == len(slices) - 1):
            step = stage_step(config, setup, draw, trainer)
            trainer.check_finite(f"{config.method} loss", step.loss)
            trainer.backward(step.loss)
        records.append({"forcing_loss": step.loss.detach(), **step.record})
    return {**mean_records(records), "student_grad_norm": trainer.update(setup.student_role)}


def stage_step(config: CausalConfig, setup: CausalSetup, draw: Draw, trainer: Trainer) -> ForcingStep:
    """The loss of the configured stage on one slice."""
    stage, networks = config.stage, setup.networks
    assert networks is not None
    if isinstance(stage, OdeConfig):
        assert setup.pairs is not None
        return ode_step(setup.pairs.batch(draw, setup.settings), networks, stage)
    assert isinstance(stage, VideoStage)
    batch = video_batch(config, stage, setup, draw=draw, step=trainer.step)
    match stage:
        case TeacherForcingConfig():
            return teacher_forcing_step(batch, networks, draw=draw, stage=stage)
        case DiffusionForcingConfig():
            return diffusion_forcing_step(batch, networks, draw=draw, stage=stage)
        case TfDcmConfig():
            return tf_dcm_step(batch, networks, draw=draw, stage=stage)
        case TfScmConfig():
            return tf_scm_step(batch, networks, draw=draw, stage=stage)
        case TfMeanflowConfig() | TfAnyflowConfig():
            how = {"teacher": setup.teacher, "guidance": config.teacher.guidance}
            mean = trainer.mean_over_ranks
            return tf_flow_map_step(batch, networks, draw=draw, stage=stage, **how, mean_over_processes=mean)


def video_batch(config: CausalConfig, stage: VideoStage, setup: CausalSetup, *, draw: Draw, step: int) -> VideoBatch:
    """Videos of one slice with their noise and captions, and in a share of the steps a given first frame."""
    x0, condition = setup.videos(draw.indices, draw.device)
    if isinstance(stage, FlowConfig):
        condition = drop_captions(condition, setup.teacher.null_condition, draw, stage.condition_drop)
        condition = drop_controls(condition, draw, stage.control_drop)
    # Under diffusion forcing context is the noisy video itself.
    largest = 0.0 if isinstance(stage, DiffusionForcingConfig) else stage.context_noise
    is_noisy = isinstance(stage, TfDcmConfig | TfScmConfig) and stage.noisy_context
    if is_noisy:
        context, context_time = noisy_context(x0, draw, setup.settings)
    else:
        context, context_time = context_of_batch(x0, draw, largest)
    image = x0[:, :, :1] if gives_image(config.data.image_share, config.run.seed, step) else None
    eps = draw.noise(tuple(x0.shape[1:]), "forcing_noise")
    return VideoBatch(x0, eps, condition, context, context_time, image, step, teacher_sees_clean=is_noisy)


def joint_backward(
    config: CausalConfig, joint: JointConfig, setup: CausalSetup, trainer: Trainer, *, draw: Draw
) -> dict[str, Tensor]:
    """Add the student's gradients of consistency on given videos for one slice; returns what to log.

    Its graph is built when that of the rollouts is gone.
    """
    stage, networks = joint.stage, setup.networks
    assert networks is not None
    batch = video_batch(config, stage, setup, draw=draw, step=trainer.step)
    if isinstance(stage, TfScmConfig):
        step = tf_scm_step(batch, networks, draw=draw, stage=stage)
    else:
        step = tf_dcm_step(batch, networks, draw=draw, stage=stage)
    trainer.check_finite("joint consistency loss", step.loss)
    trainer.backward(joint.weight * step.loss)
    return {"joint_loss": step.loss.detach(), **step.record}


def rollout_step(config: CausalConfig, setup: CausalSetup, trainer: Trainer) -> Metrics:
    """One step of self-forcing: the student's, or that of the fake score and the discriminator. Returns its metrics."""
    plan, scores = plan_rollout(config, setup.settings, trainer.step), setup.scores
    assert scores is not None
    role = setup.student_role if plan.student_due else scores.fake_role
    backward = student_backward if plan.student_due else fake_score_backward
    discriminator = None if plan.student_due else scores.discriminator_role
    slices = trainer.micro_batches(trainer.local_indices(trainer.step, config.run.batch_size))
    records: list[dict[str, Tensor]] = []
    for number, indices in enumerate(slices):
        draw = Draw(config.run.seed, indices, trainer.device)
        with ExitStack() as stack:
            for trained in (role, discriminator):
                if trained is not None:
                    stack.enter_context(trainer.sync(trained, number == len(slices) - 1))
            records.append(backward(config, setup, trainer, plan=plan, draw=draw))
            if plan.student_due and config.joint is not None:
                records[-1] |= joint_backward(config, config.joint, setup, trainer, draw=draw)
    metrics: Metrics = {**mean_records(records)}
    metrics["student_grad_norm" if plan.student_due else "fake_grad_norm"] = trainer.update(role)
    # After the last exit there is nothing to compare, and the discriminator has no gradient.
    if discriminator is not None and "discriminator_loss" in metrics:
        metrics["discriminator_grad_norm"] = trainer.update(discriminator)
    return metrics
