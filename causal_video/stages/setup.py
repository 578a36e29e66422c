"""What a run of a causal student is made of: teacher, student, data, and what its stage needs beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from fewstep.causal_video.layout import TEMPORAL_STRIDE
from fewstep.causal_video.model import masks
from fewstep.causal_video.model.controls import FrameControls, with_controls
from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.settings import CausalSettings, StreamDefaults
from fewstep.causal_video.stages.asd import StepDiscriminator
from fewstep.causal_video.stages.batch import CausalDenoiser, CausalTeacher, ForcingNetworks, causal_settings
from fewstep.causal_video.stages.config import CausalConfig
from fewstep.causal_video.stages.ode import OdePairs, OdeSource, PairSources, pairs_of_run
from fewstep.causal_video.stages.sections import OdeConfig, SelfForcingConfig, TfDcmConfig
from fewstep.causal_video.stages.student import (
    build_student,
    check_names,
    load_stage,
    smoothing_of,
    steer_teacher,
    with_channels,
)
from fewstep.core.condition import Condition
from fewstep.core.data import (
    INPUT_SEED,
    PAIR_SEED,
    REAL_SEED,
    LatentDataset,
    LatentSource,
    PromptConditions,
    read_prompts,
)
from fewstep.core.fake_score import FakeScore
from fewstep.core.networks.build import HEAD_WIDTH, build_fake_score, find_fake_score
from fewstep.core.networks.other_models import check_models, check_source
from fewstep.core.networks.quantised import dequantise
from fewstep.core.networks.shared import averaged_twin, beside
from fewstep.core.teacher import Teacher
from fewstep.core.training.ema import EmaSettings
from fewstep.core.training.roles import Role
from fewstep.core.training.trainer import Trainer
from fewstep.core.weights import StoredWeights, find_weights
from fewstep.dmd.discriminator import build_gan_heads
from fewstep.dmd.matching import SampleWeights


@dataclass(frozen=True)
class CausalData:
    """What is read from disk, before any network is loaded: a mistake here costs seconds."""

    prompts: tuple[str, ...]
    real: LatentDataset | None
    pairs: OdePairs | None
    init: StoredWeights | None
    controls: FrameControls | None
    steered_teacher: StoredWeights | None
    fake_score: StoredWeights | None
    judged: LatentDataset | None = None
    causal_teacher: StoredWeights | None = None

    @classmethod
    def read(cls, config: CausalConfig) -> CausalData:
        """Read the files that the settings name. Raises ValueError that names a missing or broken one."""
        check_models(config.teacher, student=config.student, fake_score=config.fake_score)
        data, stage, settings = config.data, config.stage, causal_settings(config.student)
        if isinstance(stage, SelfForcingConfig) and (stage.scores == "causal" or stage.input == "noised_data"):
            # One masked call for the video; a cache can do more.
            masks.expressible_window(settings.layout, settings.policy)
        real = None if data.latents is None else LatentDataset.load(data.latents)
        if real is not None:
            if real.latents.ndim != 5:
                raise ValueError(f"data.latents holds {tuple(real.latents.shape)}; videos are [N, C, F, h, w]")
            check_frames("data.latents", real.latents, settings)
        judged = None if config.gan is None else LatentDataset.load(config.gan.latents)
        if judged is not None:
            if judged.latents.ndim != 5:
                raise ValueError(f"gan.latents holds {tuple(judged.latents.shape)}; videos are [N, C, F, h, w]")
            check_frames("gan.latents", judged.latents, settings)
        pairs = read_pairs(stage, settings) if isinstance(stage, OdeConfig) else None
        init = None if config.student.init is None else find_weights(config.student.init)
        steered = None
        if isinstance(stage, SelfForcingConfig) and stage.steered_teacher is not None:
            steered = find_weights(stage.steered_teacher, "self_forcing.steered_teacher")
        controls = None
        if data.controls is not None:
            assert real is not None
            controls = FrameControls.load(data.controls)
            controls.check(real.latents)
            if config.student.controls_in == "layers" and controls.values.ndim != 3:
                raise ValueError(
                    f"data.controls holds {list(controls.values.shape)}, and student.controls_in 'layers' is told one "
                    "number for a whole frame: give [N, K, F], or controls_in 'channels'"
                )
            for weights in (init, steered):
                if weights is not None:
                    check_names(weights, controls.names)
        fake_score = None if config.run.resume else find_fake_score(config.fake_score)
        prompts = read_prompts(data.prompts)
        if isinstance(stage, SelfForcingConfig) and stage.prompt_switches != "none" and len(set(prompts)) < 2:
            raise ValueError(f"self_forcing.prompt_switches needs two prompts, and {data.prompts} has one")
        causal = None
        if config.causal_teacher is not None:
            causal = find_weights(config.causal_teacher.weights, "causal_teacher.weights")
            check_source(config.teacher, config.causal_teacher.path, "causal_teacher.path")
        return cls(prompts, real, pairs, init, controls, steered, fake_score, judged, causal)


def read_pairs(stage: OdeConfig, settings: CausalSettings) -> OdePairs | None:
    """The trajectories that the settings name, if they do. Raises ValueError for those of another teacher."""
    if stage.pairs is None:
        return None
    pairs = OdePairs.load(stage.pairs)
    check_frames("ode.pairs", pairs.latents, settings)
    if (pairs.context is None) != (stage.source == "bidirectional"):
        raise ValueError(f"ode.pairs were not made by the {stage.source} teacher of ode.source")
    return pairs


def check_frames(key: str, latents: Tensor, settings: CausalSettings) -> None:
    """Raise ValueError unless videos [N, C, F, h, w] have the frames of the layout."""
    if latents.shape[2] != settings.layout.frames:
        raise ValueError(
            f"{key} holds videos of {latents.shape[2]} latent frames, and student.layout "
            f"{list(settings.layout.lengths)} cuts {settings.layout.frames}: the layout must fit exactly"
        )


@dataclass(frozen=True, eq=False)
class JudgedRollouts:
    """How rollouts weigh, and what to log."""

    weights: SampleWeights
    record: dict[str, Tensor]


Weigh = Callable[[Teacher, Tensor, Tensor, list[str]], JudgedRollouts]


@dataclass(frozen=True)
class ScoreNetworks:
    """What self-forcing trains beside the student: the fake score, and the discriminator of ASD where there is one; and
    the teacher as the real score where it sees videos otherwise than by itself."""

    fake: FakeScore
    fake_role: Role
    discriminator: StepDiscriminator | None
    discriminator_role: Role | None
    real: Teacher | None = None


@dataclass(frozen=True)
class CausalSetup:
    """What the loop of a causal student calls, in the stages and in rewards of streams.

    Attributes:
        teacher: the bidirectional one.
        student: bare.
        student_role: as the trainer has it.
        settings: layout, policy and schedule.
        prompts: of rollouts and of the contact sheet.
        latent_shape: (C, F, h, w).
        real: videos with captions, where the stage reads some.
        controls: those of the videos of `real`, row for row.
        networks: calls and masks of the stages on given videos.
        pairs: trajectories, in ode.
        scores: in self_forcing.
        judged: real videos with captions, for a discriminator.
        weigh: how rollouts of self_forcing weigh, of (teacher, latents, frames that learn, prompts).
        time_smoothing: what is in the student's weights.
    """

    teacher: Teacher
    student: CausalWan
    student_role: Role
    settings: CausalSettings
    prompts: PromptConditions
    latent_shape: tuple[int, int, int, int]
    real: LatentSource | None = None
    controls: FrameControls | None = None
    networks: ForcingNetworks | None = None
    pairs: OdeSource | None = None
    scores: ScoreNetworks | None = None
    judged: LatentSource | None = None
    weigh: Weigh | None = None
    time_smoothing: float = 0.0

    def save_settings(self, directory: Path) -> None:
        """Write what must be known beside the weights, with the names of the controls if there are any."""
        names = () if self.controls is None else self.controls.names
        stream = StreamDefaults(actions=names) if names else None
        self.settings.save(directory, stream, time_smoothing=self.time_smoothing)

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
        return with_controls(condition, self.controls.rows(rows, size, condition.device))


def build_setup(config: CausalConfig, data: CausalData, trainer: Trainer, *, weigh: Weigh | None = None) -> CausalSetup:
    """Load the teacher, copy it into the student (and the fake score), and hand these to the trainer.

    `weigh` is that of `CausalSetup`. Raises ValueError when a component, a size or a file of weights does not fit.
    """
    stage, settings = config.stage, causal_settings(config.student)
    teacher = Teacher.of(config.teacher, device=trainer.device)
    stored = data.real.latents if data.real is not None else data.pairs.latents if data.pairs is not None else None
    shape = latent_shape((config.data.height, config.data.width), stored, teacher, settings)
    channels = 0 if data.controls is None else data.controls.channels
    how = {"seed": config.run.seed, "controls": channels, "smoothing": config.time_smoothing}
    student = build_student(config.student, teacher, data.init, **how)
    if data.steered_teacher is not None:
        steer_teacher(teacher, data.steered_teacher, channels, config.student.controls_in)
    frozen = causal_teacher(config, student, teacher, data, controls=channels)
    teacher.control_guidance = config.data.control_guidance
    student_role = trainer.add_role(
        "student",
        student,
        config.student.optimizer,
        ema=EmaSettings.of_student(config.student),
        every=1 if config.fake_score is None else config.fake_score.ratio + 1,
    )

    def embed(prompts: Sequence[str]) -> PromptConditions:
        return PromptConditions(teacher, prompts, cache=config.data.cache_prompts)

    prompts, real, pairs, networks, scores, judged = embed(data.prompts), None, None, None, None, None
    if data.judged is not None:
        data.judged.require_shape(shape, "gan.latents")
        judged = LatentSource(data.judged, embed(data.judged.prompts), config.run.seed + INPUT_SEED)
    if data.real is not None:
        real = LatentSource(data.real, embed(data.real.prompts), config.run.seed + REAL_SEED)
    if isinstance(stage, SelfForcingConfig):
        scores = build_scores(config, data, teacher, settings, trainer, shape=shape)
    if scores is None or config.joint is not None:
        networks = forcing_networks(config, student_role, student, frozen, settings, shape=shape)
    if isinstance(stage, OdeConfig):
        assert networks is not None
        guidance, seed = config.teacher.guidance, config.run.seed
        sources = PairSources(teacher, guidance, networks, real, prompts, settings, shape, seed)
        found = pairs_of_run(stage, sources, trainer) if data.pairs is None else data.pairs
        pairs = OdeSource(found, embed(found.prompts), seed + PAIR_SEED)
    return CausalSetup(
        teacher=teacher,
        student=student,
        student_role=student_role,
        settings=settings,
        prompts=prompts,
        latent_shape=shape,
        real=real,
        controls=data.controls,
        networks=networks,
        pairs=pairs,
        scores=scores,
        judged=judged,
        weigh=weigh,
        time_smoothing=max(config.time_smoothing, smoothing_of(data.init)),
    )


def latent_shape(
    size: tuple[int | None, int | None], stored: Tensor | None, teacher: Teacher, settings: CausalSettings
) -> tuple[int, int, int, int]:
    """(C, F, h, w) of the training videos: that of stored ones, else that of the layout and the configured size.

    Args:
        size: (height, width) in pixels; None is not configured.
        stored: latents [N, C, F, h, w] of videos, or None.
        teacher: says how many channels there are, and its own size.
        settings: whose layout says F.

    Raises ValueError where both sizes are known and differ, or the videos are not the network's.
    """
    frames = 1 + TEMPORAL_STRIDE * (settings.layout.frames - 1)
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


def causal_teacher(
    config: CausalConfig, student: CausalWan, teacher: Teacher, data: CausalData, *, controls: int = 0
) -> CausalTeacher | None:
    """A frozen copy of the student as it starts, where the stage distils a causal teacher; or that of the section
    causal_teacher, in the teacher's dtype, of the student's model or of its own."""
    said, weights = config.causal_teacher, data.causal_teacher
    if data.pairs is not None:
        # Its trajectories are made.
        return None
    if weights is None and config.has_causal_teacher and config.time_smoothing > 0:
        # A copy of a smoothed student would be smoothed, too.
        weights = data.init
    if weights is not None:
        path = config.student.path if said is None or said.path is None else said.path
        network = teacher.base(path).copy().network.eval()
        assert isinstance(network, WanTransformer3DModel)
        dequantise(network)
        if controls > 0:
            network = with_channels(network, controls, config.student.controls_in).eval()
        load_stage(network, weights, config.student.second_time)
        guidance = config.teacher.guidance if said is None or said.guidance is None else said.guidance
        held = CausalWan(network.requires_grad_(False))
        return CausalTeacher(held, teacher.null_condition, guidance, config.data.control_guidance)
    if not config.has_causal_teacher:
        return None
    # Adapters start at zero, so this is the stage before, with or without them; frozen weights are shared.
    network = beside(student.transformer).requires_grad_(False)
    scales = (config.teacher.guidance, config.data.control_guidance)
    return CausalTeacher(CausalWan(network), teacher.null_condition, *scales)


def forcing_networks(
    config: CausalConfig,
    role: Role,
    student: CausalWan,
    frozen: CausalTeacher | None,
    settings: CausalSettings,
    *,
    shape: tuple[int, int, int, int],
) -> ForcingNetworks:
    """Masks of the layout beside the networks, and the average of the student where it is the target.

    Raises ValueError for a policy that no mask expresses.
    """
    height, width = shape[2:]
    tokens = student.tokens_per_frame(torch.empty(0, shape[0], 1, height, width))
    policy, device = settings.policy, student.transformer.patch_embedding.weight.device
    packed = masks.teacher_forcing(settings.layout, tokens, policy, clean_is_constant=True, device=device)
    causal = masks.block_causal(settings.layout, tokens, policy, device=device)
    average, tf_dcm = None, config.consistency
    if isinstance(tf_dcm, TfDcmConfig) and tf_dcm.target == "ema":
        assert role.ema is not None
        average = averaged_twin(student, role.ema.state_dict())
    return ForcingNetworks(student, role.wrapped, settings.layout, packed, causal, frozen, average)


def build_scores(
    config: CausalConfig,
    data: CausalData,
    teacher: Teacher,
    settings: CausalSettings,
    trainer: Trainer,
    *,
    shape: tuple[int, int, int, int],
) -> ScoreNetworks:
    """The fake score, with a discriminator's heads on it, or with ASD heads for every n with an n + 1 on its middle
    block."""
    assert config.fake_score is not None
    assert config.self_forcing is not None
    seed, optimizer = config.run.seed, config.fake_score.optimizer
    fake = build_fake_score(config.fake_score, teacher, data.fake_score, seed=seed, exits=config.told_exits)
    real = None
    if config.self_forcing.scores == "causal":
        causal = CausalDenoiser(fake.denoiser, settings.layout, settings.policy)
        fake = FakeScore(causal, exit_shift=fake.exit_shift)
        real = teacher.with_denoiser(CausalDenoiser(teacher.denoiser, settings.layout, settings.policy))
    if config.gan is not None:
        null = teacher.with_first_frames(teacher.null_condition, torch.zeros((1, *shape)))
        heads = build_gan_heads(config.gan, fake.denoiser, shape=shape, null=null, seed=seed)
        fake = FakeScore(fake.denoiser, heads=heads, blocks=config.gan.chosen_blocks, exit_shift=fake.exit_shift)
    fake_role = trainer.add_role("fake_score", fake, optimizer)
    # All steps but the first of each cycle.
    fake_role.total_updates = max(1, config.run.steps - -(-config.run.steps // (config.fake_score.ratio + 1)))
    if config.asd is None:
        return ScoreNetworks(fake, fake_role, None, None, real)
    channels = fake.denoiser.family.feature_channels(fake.denoiser.network, None)
    longest = max([settings.schedule.longest, *map(max, config.self_forcing.rollout_schedules)])
    discriminator = StepDiscriminator(channels, width=HEAD_WIDTH, pairs=longest - 1, seed=seed)
    return ScoreNetworks(
        fake, fake_role, discriminator, trainer.add_role("discriminator", discriminator, optimizer), real
    )
