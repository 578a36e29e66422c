"""What a run of a causal student is made of: teacher, student, data, and what its stage needs beside them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.causal_video.layout import TEMPORAL_STRIDE
from fewstep.causal_video.model import masks
from fewstep.causal_video.model.controls import FrameControls, with_controls
from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.settings import CausalSettings, StreamDefaults
from fewstep.causal_video.stages.asd import StepDiscriminator
from fewstep.causal_video.stages.batch import CausalTeacher, PackedNetwork, VideoBatch, causal_settings
from fewstep.causal_video.stages.config import CausalConfig
from fewstep.causal_video.stages.forcing import ForcingNetworks
from fewstep.causal_video.stages.ode import OdePairs, OdeSource, bidirectional_pairs, causal_pairs
from fewstep.causal_video.stages.student import build_student, check_names, find_weights, steer_teacher
from fewstep.core.condition import Condition
from fewstep.core.data import PAIR_SEED, REAL_SEED, LatentDataset, LatentSource, PromptConditions, read_prompts
from fewstep.core.fake_score import FakeScore
from fewstep.core.networks import HEAD_WIDTH, build_fake_score
from fewstep.core.teacher import Teacher, check_teacher_path
from fewstep.core.training.roles import Role
from fewstep.core.training.trainer import Trainer
from fewstep.kernels.check_jvp import check_jvp

PAIRS_FOLDER = "ode_pairs"
# Of the two samples on which the tangent is checked before the first step.
CHECKED_TIMES = (0.3, 0.7)


@dataclass(frozen=True)
class CausalData:
    """What is read from disk, before any network is loaded: a mistake here costs seconds."""

    prompts: tuple[str, ...]
    real: LatentDataset | None
    pairs: OdePairs | None
    init: Path | None
    controls: FrameControls | None
    steered_teacher: Path | None

    @classmethod
    def read(cls, config: CausalConfig) -> CausalData:
        """Read the files that the settings name. Raises ValueError that names a missing or broken one."""
        check_teacher_path(config.teacher.path)
        data, settings = config.data, causal_settings(config.student)
        real = None if data.latents is None else LatentDataset.load(data.latents)
        if real is not None:
            if real.latents.ndim != 5:
                raise ValueError(f"data.latents holds {tuple(real.latents.shape)}; videos are [N, C, F, h, w]")
            check_frames("data.latents", real.latents, settings)
        pairs = OdePairs.load(data.pairs) if config.method == "ode" and data.pairs is not None else None
        if pairs is not None:
            check_frames("data.pairs", pairs.latents, settings)
            if (pairs.context is None) != (config.loss.ode_source == "bidirectional"):
                raise ValueError(f"data.pairs were not made by the {config.loss.ode_source} teacher of loss.ode_source")
        init = None if config.student.init is None else find_weights(config.student.init)
        controls, steered = read_controls(config, real), None
        if config.steered_teacher is not None:
            steered = find_weights(config.steered_teacher, "steered_teacher")
        return cls(read_prompts(data.prompts), real, pairs, init, controls, steered)


def read_controls(config: CausalConfig, real: LatentDataset | None) -> FrameControls | None:
    """What the settings name, checked against the videos and the stages before. Raises ValueError."""
    if config.data.controls is None:
        return None
    assert real is not None
    controls = FrameControls.load(config.data.controls)
    controls.check(real.latents)
    for key, source in (("student.init", config.student.init), ("steered_teacher", config.steered_teacher)):
        if source is not None:
            check_names(source, controls.names, key)
    return controls


def check_frames(key: str, latents: Tensor, settings: CausalSettings) -> None:
    """Raise ValueError unless videos [N, C, F, h, w] have the frames of the layout."""
    if latents.shape[2] != settings.layout.frames:
        raise ValueError(
            f"{key} holds videos of {latents.shape[2]} latent frames, and student.layout "
            f"{list(settings.layout.lengths)} cuts {settings.layout.frames}: the layout must fit exactly"
        )


@dataclass(frozen=True)
class CausalSetup:
    """Everything the loop calls. `latent_shape` is (C, F, h, w); the last four belong to self_forcing alone.

    `controls` are those of the videos of `real`, row for row.
    """

    teacher: Teacher
    student: CausalWan
    student_role: Role
    settings: CausalSettings
    prompts: PromptConditions
    latent_shape: tuple[int, int, int, int]
    real: LatentSource | None
    controls: FrameControls | None
    networks: ForcingNetworks
    pairs: OdeSource | None
    fake_score: FakeScore | None
    fake_role: Role | None
    discriminator: StepDiscriminator | None
    discriminator_role: Role | None

    def save_settings(self, directory: Path) -> None:
        """Write what must be known beside the weights, with the names of the controls if there are any."""
        names = () if self.controls is None else self.controls.names
        self.settings.save(directory, StreamDefaults(actions=names) if names else None)

    def videos(self, samples: Sequence[int], device: torch.device) -> tuple[Tensor, Condition]:
        """Latents [B, C, F, h, w] in fp32 and captions of these sample numbers, with the controls if there are any."""
        assert self.real is not None
        rows, x0, condition = self.real.rows(samples, device)
        return x0.float(), self.controlled(condition, rows)

    def controlled(self, condition: Condition, rows: Sequence[int]) -> Condition:
        """A condition with the controls of these rows; as it is where there are none."""
        if self.controls is None:
            return condition
        size = (self.latent_shape[2], self.latent_shape[3])
        return with_controls(condition, self.controls.rows(rows, size, condition.tokens.device))


def build_setup(config: CausalConfig, data: CausalData, trainer: Trainer) -> CausalSetup:
    """Load the teacher, copy it into the student (and the fake score), and hand these to the trainer.

    Raises ValueError when a component, a size or a file of weights does not fit.
    """
    teacher = Teacher.load(config.teacher.path, device=trainer.device, dtype=getattr(torch, config.teacher.dtype))
    settings = causal_settings(config.student)
    shape = latent_shape(config, data, teacher, settings)
    channels = 0 if data.controls is None else data.controls.channels
    student = build_student(config.student, teacher, data.init, seed=config.run.seed, controls=channels)
    if data.steered_teacher is not None:
        steer_teacher(teacher, data.steered_teacher, channels)
    student_role = trainer.add_role(
        "student",
        student,
        config.student.optimizer,
        ema_decay=config.student.ema_decay,
        ema_start=config.student.ema_start,
        every=1 if config.fake_score is None else config.fake_score.updates_per_student_update,
    )

    def embed(prompts: Sequence[str]) -> PromptConditions:
        return PromptConditions(teacher, prompts, cache=config.data.cache_prompts)

    real = None
    if data.real is not None:
        real = LatentSource(data.real, embed(data.real.prompts), config.run.seed + REAL_SEED)
    networks = forcing_networks(config, student_role, student, teacher, settings, shape=shape)
    pairs = None
    if config.method == "ode":
        found = data.pairs
        if found is None:
            sources = PairSources(teacher, networks, real, embed(data.prompts), shape)
            found = pairs_of_run(config, settings, sources, trainer)
        pairs = OdeSource(found, embed(found.prompts), config.run.seed + PAIR_SEED)
    fake_score = fake_role = discriminator = discriminator_role = None
    if config.fake_score is not None:
        fake_score = build_fake_score(config.fake_score, teacher, seed=config.run.seed, with_heads=False)
        fake_role = trainer.add_role("fake_score", fake_score, config.fake_score.optimizer)
        if config.loss.asd_weight > 0:
            discriminator = build_discriminator(config, fake_score, settings)
            discriminator_role = trainer.add_role("discriminator", discriminator, config.fake_score.optimizer)
    return CausalSetup(
        teacher=teacher,
        student=student,
        student_role=student_role,
        settings=settings,
        prompts=embed(data.prompts),
        latent_shape=shape,
        real=real,
        controls=data.controls,
        networks=networks,
        pairs=pairs,
        fake_score=fake_score,
        fake_role=fake_role,
        discriminator=discriminator,
        discriminator_role=discriminator_role,
    )


def latent_shape(
    config: CausalConfig, data: CausalData, teacher: Teacher, settings: CausalSettings
) -> tuple[int, int, int, int]:
    """(C, F, h, w) of the training videos: that of the data, else that of the layout and the configured size.

    Raises ValueError where both are known and differ, or the data are not the network's.
    """
    frames = 1 + TEMPORAL_STRIDE * (settings.layout.frames - 1)
    stored = data.real.latents if data.real is not None else data.pairs.latents if data.pairs is not None else None
    size = (config.data.height, config.data.width)
    if stored is None or size != (None, None):
        channels, count, height, width = teacher.latent_shape(*size, frames=frames)
        if stored is not None and tuple(stored.shape[1:]) != (channels, count, height, width):
            raise ValueError(
                f"data.latents holds {tuple(stored.shape[1:])}, and data.height/width say "
                f"{(channels, count, height, width)}: leave the size out, or encode the videos at it"
            )
        return channels, count, height, width
    channels, count, height, width = stored.shape[1:]
    needed = teacher.denoiser.network.config["in_channels"]  # pyright: ignore[reportIndexIssue, reportArgumentType]
    if channels != needed:
        raise ValueError(f"data.latents has {channels} channels, and the teacher's network takes {needed}")
    return channels, count, height, width


def forcing_networks(
    config: CausalConfig,
    role: Role,
    student: CausalWan,
    teacher: Teacher,
    settings: CausalSettings,
    *,
    shape: tuple[int, int, int, int],
) -> ForcingNetworks:
    """Masks of the layout, and where the stage distils a causal teacher, a frozen copy of the student as it starts.

    Raises ValueError for a policy that no mask expresses, in stages that need one.
    """
    height, width = shape[2:]
    tokens = student.tokens_per_frame(torch.empty(0, shape[0], 1, height, width))
    policy, device = settings.policy, role_device(student)
    if config.method == "self_forcing":
        return ForcingNetworks(student, role.wrapped, settings.layout, None, None)
    packed = masks.teacher_forcing(settings.layout, tokens, policy, clean_is_constant=True, device=device)
    causal = masks.block_causal(settings.layout, tokens, policy, device=device)
    frozen = None
    if config.method in ("tf_dcm", "tf_scm") or (config.method == "ode" and config.loss.ode_source == "causal"):
        # Adapters start at zero, so the copy is the stage before, with or without them.
        network = copy.deepcopy(student.transformer).requires_grad_(False)
        frozen = CausalTeacher(CausalWan(network), teacher.null_condition, config.teacher.guidance)
    return ForcingNetworks(student, role.wrapped, settings.layout, packed, causal, frozen)


def role_device(student: CausalWan) -> torch.device:
    """Where the student's weights are."""
    return student.transformer.patch_embedding.weight.device


def build_discriminator(config: CausalConfig, fake_score: FakeScore, settings: CausalSettings) -> StepDiscriminator:
    """Heads for every n with an n + 1, on the middle block of the fake score."""
    trunk = fake_score.denoiser
    channels = trunk.family.feature_channels(trunk.network, None)
    longest = max([settings.schedule.longest, *(max(counts) for counts in config.loss.rollout_schedules)])
    return StepDiscriminator(channels, width=HEAD_WIDTH, pairs=longest - 1, seed=config.run.seed)


@dataclass(frozen=True, eq=False)
class PairSources:
    """What trajectories are made from; `shape` is (C, F, h, w)."""

    teacher: Teacher
    networks: ForcingNetworks
    real: LatentSource | None
    prompts: PromptConditions
    shape: tuple[int, int, int, int]


def pairs_of_run(config: CausalConfig, settings: CausalSettings, sources: PairSources, trainer: Trainer) -> OdePairs:
    """The trajectories in the run directory, made by process 0 if they are not there."""
    folder = trainer.directory.path / PAIRS_FOLDER
    if trainer.is_main and not folder.is_dir():
        make_pairs(config, settings, sources).save(folder)
    trainer.accelerator.wait_for_everyone()
    return OdePairs.load(folder)


def make_pairs(config: CausalConfig, settings: CausalSettings, sources: PairSources) -> OdePairs:
    """Trajectories of the teacher that `loss.ode_source` names."""
    loss, teacher = config.loss, sources.teacher
    if loss.ode_source == "bidirectional":
        return bidirectional_pairs(
            teacher,
            sources.prompts,
            settings,
            shape=sources.shape,
            count=loss.ode_pairs,
            steps=loss.ode_steps,
            guidance=config.teacher.guidance,
            seed=config.run.seed,
        )
    networks = sources.networks
    assert networks.teacher is not None
    assert networks.packed is not None
    assert sources.real is not None
    return causal_pairs(
        networks.teacher,
        sources.real,
        settings,
        grid=teacher.family.teacher_grid(teacher.pipeline, loss.ode_steps),
        mask=networks.packed,
        count=loss.ode_pairs,
        seed=config.run.seed,
    )


def check_tangent(config: CausalConfig, setup: CausalSetup, trainer: Trainer) -> str | None:
    """Compare the packed network's tangent with differences; what was found, as text, or None where none is taken.

    Raises:
        ValueError: the tangent is not the derivative of the network.
    """
    if config.method != "tf_scm" or config.loss.tangent != "jvp" or not config.loss.check_tangent:
        return None
    assert setup.networks.packed is not None
    x0, condition = setup.videos(list(range(len(CHECKED_TIMES))), trainer.device)
    t = torch.tensor(CHECKED_TIMES, device=trainer.device)
    batch = VideoBatch(x0, x0, condition, x0, None, None, 0)
    packed = PackedNetwork(setup.student, batch, setup.networks.packed)
    found = []
    # Steps of time are small, since the network is told a thousand times as much.
    for name, tangents, step, halvings in (
        ("the state", (x0.flip(0), None), 2.0**-3, 12),
        ("time", (None, torch.ones_like(t)), 2.0**-8, 10),
    ):
        try:
            check = check_jvp(
                lambda x, time: packed(x, time, condition), (x0, t), tangents, largest_step=step, halvings=halvings
            )
        except ValueError as error:
            raise ValueError(f"along {name}: {error}: set loss.tangent to 'central'") from error
        found.append(f"{check.error:.1e} along {name}")
    return f"tangent of the packed network against differences: off by {', '.join(found)}"
