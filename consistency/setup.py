"""What a consistency run is made of, built from the settings: teacher, student, data, and perhaps a fake score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from fewstep.consistency.config import ConsistencyConfig, ConsistencyDataConfig, FlowMapSettings
from fewstep.consistency.mcm.setup import McmParts, build_mcm
from fewstep.consistency.sana_sprint.config import SprintConfig
from fewstep.consistency.sana_sprint.setup import (
    CYCLE,
    add_heads,
    build_sprint_student,
    check_control,
    check_sprint_teacher,
)
from fewstep.consistency.sections import PairsConfig
from fewstep.consistency.time_weight import EmbeddingWeight, build_time_weight
from fewstep.core.config import require_one_method
from fewstep.core.data import (
    REAL_SEED,
    LatentDataset,
    LatentSource,
    PromptConditions,
    PromptsWithGuidance,
    embedded_prompts,
    find_prompt_pictures,
    read_prompts,
)
from fewstep.core.denoiser import Denoiser
from fewstep.core.export.sana import sprint_times
from fewstep.core.export.schedulers import exportable_times, student_times
from fewstep.core.fake_score import FakeScore
from fewstep.core.networks.adapters import load_adapters, merge_stored_adapters
from fewstep.core.networks.build import build_denoiser, build_fake_score, find_fake_score
from fewstep.core.networks.other_models import check_models
from fewstep.core.networks.perceptual import Distance, PixelDistance, load_lpips, squared_distance
from fewstep.core.networks.shared import frozen_twin
from fewstep.core.networks.tiny_vae import tiny_decoder
from fewstep.core.student import Student
from fewstep.core.tangents.network import use_jvp_attention
from fewstep.core.tangents.smooth import smooth_time
from fewstep.core.teacher import Teacher
from fewstep.core.teacher_files import require_told_pictures
from fewstep.core.training.ema import EmaSettings
from fewstep.core.training.roles import Role
from fewstep.core.training.trainer import Trainer
from fewstep.core.two_time import SITES, add_second_time
from fewstep.core.weights import StoredWeights, find_weights, load_weights


@dataclass(frozen=True)
class ConsistencyData:
    """What is read from disk, before any network is loaded: a mistake here costs seconds."""

    prompts: tuple[str, ...]
    init: StoredWeights | None
    real: LatentDataset
    pictures: LatentDataset | None
    control: LatentDataset | None
    fake_score: StoredWeights | None
    told: tuple[Path, ...] = ()

    @classmethod
    def read(cls, config: ConsistencyConfig) -> ConsistencyData:
        """Read the files that the settings name. Raises ValueError that names a missing or broken one."""
        check_models(config.teacher, student=config.student, fake_score=config.fake_score)
        init = None if config.student.init is None or config.run.resume else find_weights(config.student.init)
        judged = None if config.mcm is None else config.mcm.discriminator
        pictures = None if judged is None or judged.pictures is None else LatentDataset.load(judged.pictures)
        followed = None if config.sana_sprint is None else config.sana_sprint.control
        control = None if followed is None else LatentDataset.load(followed)
        fake_score = None if config.run.resume else find_fake_score(config.fake_score)
        real = LatentDataset.load(config.data.latents)
        if config.pairs is not None:
            real.require_noise("data.latents")
        prompts = read_prompts(config.data.prompts)
        told = find_prompt_pictures(config.data.pictures, prompts)
        require_told_pictures(config.teacher, told)
        return cls(prompts, init, real, pictures, control, fake_score, told)


@dataclass(frozen=True)
class ConsistencySetup:
    """Everything the loop calls. `latent_shape` is (C, h, w), or (C, F, h, w) for videos.

    Fake score and its role match distributions; `heads_role` is the discriminator of sana_sprint, `weight_role` the
    learned weight of a time, which is trained in the steps of the student. `frozen_student` is the student with the
    very same weights and without gradients, in anyflow's second stage, `distance` that of pairs.
    """

    teacher: Teacher
    student: Student
    student_role: Role
    prompts: PromptConditions
    latent_shape: tuple[int, ...]
    real: LatentSource
    fake_score: FakeScore | None
    fake_role: Role | None
    heads_role: Role | None = None
    weight_role: Role | None = None
    mcm: McmParts | None = None
    frozen_student: Denoiser | None = None
    distance: Distance | None = None


def build_setup(config: ConsistencyConfig, data: ConsistencyData, trainer: Trainer) -> ConsistencySetup:
    """Load the teacher, copy it into the student (and the fake score), and hand these to the trainer.

    Raises ValueError when a component or size does not fit, or the network has no tangent where one is needed.
    """
    teacher = Teacher.of(config.teacher, device=trainer.device)
    settings, sprint = config.student, config.sana_sprint
    shape = run_shape(config.data, data.real, teacher)
    if sprint is not None:
        check_sprint_teacher(teacher, controlled=data.control is not None)
        check_control(data.control, data.real)
    denoiser = build_student(config, teacher, data.init)
    prepare_tangent(config, denoiser)
    student_role = trainer.add_role(
        "student",
        denoiser,
        settings.optimizer,
        ema=EmaSettings.of_student(settings),
        every=student_role_every(sprint),
    )
    fake_score = fake_role = None
    if config.fake_score is not None:
        fake_score = build_fake_score(config.fake_score, teacher, data.fake_score, seed=config.run.seed)
        fake_role = trainer.add_role("fake_score", fake_score, config.fake_score.optimizer)
        student_role.total_updates, fake_role.total_updates = updates_of_roles(config)

    mcm = None
    if config.mcm is not None:
        mcm = build_mcm(
            config.mcm,
            trainer,
            student_optimizer=settings.optimizer,
            teacher=teacher,
            shape=shape,
            pictures=data.pictures,
            embed=partial(run_prompts, config, teacher, control=None),
        )
    followed = None if data.control is None else data.control.latents
    captions = run_prompts(config, teacher, data.real.prompts, followed, data.real.pictures)
    real = LatentSource(data.real, captions, config.run.seed + REAL_SEED)
    times = times_of_student(config, teacher)
    return ConsistencySetup(
        teacher=teacher,
        student=Student(denoiser, times, config.student_settings.sampler),
        student_role=student_role,
        prompts=run_prompts(config, teacher, data.prompts, None, data.told)
        if data.control is None
        else real.conditions,
        latent_shape=shape,
        real=real,
        fake_score=fake_score,
        fake_role=fake_role,
        heads_role=None if sprint is None else add_heads(sprint, teacher, trainer),
        weight_role=add_time_weight(config, trainer, denoiser),
        mcm=mcm,
        distance=None if config.pairs is None else build_distance(config.pairs, teacher),
        frozen_student=None if config.anyflow is None or config.matching is None else frozen_twin(denoiser),
    )


def times_of_student(config: ConsistencyConfig, teacher: Teacher) -> tuple[float, ...]:
    """The times of the student's calls. Raises ValueError for those of one grid that no export could step on."""
    settings, run = config.student, config.student_settings
    if config.sana_sprint is not None:
        return sprint_times(settings.steps)
    if run.any_steps or run.sampler == "flow_map":
        # A student of all times can be exported on another grid than that of its samples, a flow map on any.
        return student_times(teacher.pipeline, settings)
    return exportable_times(teacher.pipeline, teacher.family, settings, run.sampler)


def student_role_every(sprint: SprintConfig | None) -> int:
    """In which steps the student learns: in each, or in turns with a discriminator."""
    return 1 if sprint is None or sprint.discriminator is None else CYCLE


def build_distance(settings: PairsConfig, teacher: Teacher) -> Distance:
    """The distance of pairs. Raises ValueError when a file is missing or is of another network."""
    if settings.metric == "latent":
        return squared_distance
    assert settings.lpips is not None
    device = teacher.null_condition.device
    decode = teacher.decode if settings.autoencoder is None else tiny_decoder(settings.autoencoder, device)
    return PixelDistance(load_lpips(settings.lpips, mean_pooling=settings.mean_pooling).to(device), decode)


def updates_of_roles(config: ConsistencyConfig) -> tuple[int, int]:
    """Updates of student and fake score in the whole run, where they take turns."""
    assert config.matching is not None
    assert config.fake_score is not None
    alone = min(config.matching.start, config.run.steps)
    shared = config.run.steps - alone
    students = -(-shared // (config.fake_score.ratio + 1))
    return alone + students, max(1, shared - students)


def add_time_weight(config: ConsistencyConfig, trainer: Trainer, denoiser: Denoiser) -> Role | None:
    """The role of the learned weight of a time, where one is configured."""
    sprint = config.sana_sprint
    if sprint is not None and sprint.consistency is not None and sprint.consistency.learned_weight:
        (width,) = set(denoiser.family.feature_channels(denoiser.network, None))
        weight = EmbeddingWeight(width)
        return trainer.add_role("time_weight", weight, config.student.optimizer, every=student_role_every(sprint))
    if config.scm is None or not config.scm.learned_weight:
        return None
    return trainer.add_role("time_weight", build_time_weight(config.run.seed), config.student.optimizer)


def run_prompts(
    config: ConsistencyConfig,
    teacher: Teacher,
    prompts: Sequence[str],
    control: Tensor | None,
    pictures: Sequence[Path] = (),
) -> PromptConditions:
    """The conditions of prompts; for sana_sprint with the guidance, and with what a ControlNet follows."""
    settings = config.data
    cache, height, width = settings.cache_prompts, settings.height, settings.width
    if config.sana_sprint is None:
        return embedded_prompts(teacher, settings, prompts, pictures)
    guidance = config.teacher.guidance
    return PromptsWithGuidance(
        teacher, prompts, cache=cache, height=height, width=width, guidance=guidance, control=control
    )


def run_shape(settings: ConsistencyDataConfig, real: LatentDataset, teacher: Teacher) -> tuple[int, ...]:
    """(C, h, w) or (C, F, h, w) of what the run makes. Raises ValueError where the data are of another shape."""
    shape = teacher.latent_shape(settings.height, settings.width, frames=settings.frames)
    real.require_shape(shape, "data.latents")
    real.require_pictures(teacher, "data.latents")
    return shape


def takes_tangent(config: ConsistencyConfig) -> bool:
    """Whether this run differentiates its student in forward mode."""
    return config.tangent is not None and config.tangent.tangent == "jvp"


def prepare_tangent(config: ConsistencyConfig, denoiser: Denoiser) -> None:
    """Let the network be differentiated in forward mode, in place, if this run does that.

    Raises:
        ValueError: the network cannot be.
    """
    # SANA-Sprint without its consistency half is to differ by the loss alone, and not by the rounding of attention.
    is_ablation = config.sana_sprint is not None and config.sana_sprint.consistency is None
    if not takes_tangent(config) and not is_ablation:
        return
    try:
        use_jvp_attention(denoiser.network)
    except ValueError as error:
        section = require_one_method(config)
        section = section if config.sana_sprint is None else f"{section}.consistency"
        raise ValueError(f"{error}: set {section}.tangent to 'central'") from error


def build_student(config: ConsistencyConfig, teacher: Teacher, init: StoredWeights | None) -> Denoiser:
    """A trainable fp32 copy of the teacher's network, with a second time and adapters where they are configured.

    `init` may be a network of one time or of two, or the adapters of a run with either. Layers of the second time are
    trained beside adapters, or have adapters of their own where those of the first have (`student.lora_targets`).

    Raises:
        ValueError: `init` does not fit the network, or cannot start adapters.
    """
    settings, method, seed = config.student, config.settings, config.run.seed
    if isinstance(method, SprintConfig):
        return build_sprint_student(settings, teacher, init)
    if not isinstance(method, FlowMapSettings):
        return smoothed(build_denoiser(settings, teacher, init, seed=seed), config, init)
    two_times = init if init is not None and holds_second_time(init) else None
    if two_times is not None and settings.lora_rank > 0 and not two_times.holds_adapters:
        raise ValueError(
            f"student.init {two_times.source} holds a whole network of two times, which cannot start adapters; train "
            "all weights, or give the run of adapters"
        )
    if two_times is not None and two_times.stated("second_time") not in (None, "none", method.second_time):
        # Both kinds have layers of the same names and sizes, so that their weights would fit and mean another network.
        raise ValueError(
            f"student.init {two_times.source} holds a network whose second time is "
            f"{two_times.stated('second_time')!r}, and this method has {method.second_time!r}: set second_time to the "
            "same, or start from the teacher"
        )
    denoiser = build_denoiser(settings, teacher, init if two_times is None else None, seed=seed)
    add_second_time(denoiser.network, method.second_time)
    if two_times is None:
        return smoothed(denoiser, config, init)
    if not two_times.holds_adapters:
        load_weights(denoiser.network, two_times)
    elif settings.lora_rank > 0:
        load_adapters(denoiser.network, two_times, alpha=settings.lora_alpha)
    else:
        merge_stored_adapters(denoiser.network, two_times)
    return smoothed(denoiser, config, two_times)


def smoothed(denoiser: Denoiser, config: ConsistencyConfig, init: StoredWeights | None) -> Denoiser:
    """The same, whose time is smoothed in place where the run says so; `init` may have been smoothed before."""
    if config.tangent is not None and config.tangent.time_smoothing > 0:
        before = 0.0 if init is None else float(init.stated("time_smoothing") or 0.0)
        scale = denoiser.family.time_scale
        smooth_time(denoiser.network, config.tangent.time_smoothing, time_scale=scale, already=before)
    return denoiser


def holds_second_time(weights: StoredWeights) -> bool:
    """Whether these are weights of a network of two times. Raises ValueError when they cannot be read."""
    layers = tuple(f"{site.layers}.{half}." for site in SITES.values() for half in ("first", "second"))
    return any(name.startswith(layers) for name in weights.names())
