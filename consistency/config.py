"""Settings of a consistency run. No torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fewstep.consistency.mcm.config import McmConfig
from fewstep.consistency.sana_sprint.config import SprintConfig
from fewstep.core.config import RunConfig
from fewstep.core.settings import DataConfig, FakeScoreConfig, StudentConfig, TeacherConfig
from fewstep.dmd.config import LossConfig

# Objectives of networks with two times, u(x_t, t, r).
FLOW_MAPS = ("meanflow", "imf", "alphaflow", "dmf", "anyflow")


@dataclass(frozen=True, kw_only=True)
class ConsistencyLossConfig:
    """What the student minimises on noised data."""

    objective: Literal["scm", "dcm", "ect", "meanflow", "imf", "alphaflow", "dmf", "anyflow"] = "scm"
    """'scm' follows the tangent of the consistency function (continuous time), 'dcm' a step of the teacher, 'ect' one
    of the noise and no teacher; the others learn average velocities u(x, t, r): 'meanflow', 'imf' (improved),
    'alphaflow' (a schedule towards it), 'dmf' (decoupled), 'anyflow'."""
    coordinates: Literal["trigflow", "rf"] = "trigflow"
    """Coordinates of scm: TrigFlow's angle (arXiv:2410.11081), or rectified flow's own time (arXiv:2606.25473)."""
    tangent: Literal["jvp", "central"] = "jvp"
    """How the derivative along the teacher's path is taken: forward mode, or central differences of two calls."""
    central_step: float = 0.005
    """Step of the central difference along the path, in radians (trigflow) or in time (others)."""
    check_tangent: bool = True
    """Compare the network's tangent with central differences before the first step (jvp only)."""
    time_mean: float = -0.8
    """Mean of log tan of the angle at which the student is trained, which is log(t / (1 - t))."""
    time_std: float = 1.6
    """Standard deviation of it."""
    max_time_share: float = 0.0
    """Share of samples trained at the student's first time instead, t = 1 for one step."""
    tangent_warmup: int = 0
    """Steps over which the derivative term of scm grows from 0 to its full weight."""
    normalizer: float = 0.1
    """The c of g / (|g| + c)."""
    learned_weight: bool = False
    """Fit a weight of each time beside the student (method scm): exp(w(t)) error - w(t), as the sCM paper does. It is
    trained with the student's optimizer settings."""
    grid_steps: int = 48
    """Steps of the teacher's grid that dcm walks by one."""
    grid_shift: float = 5.0
    """Time shift of that grid."""
    ect_q: float = 2.0
    """The q of ect: each stage brings r nearer to t by this factor."""
    ect_stage_steps: int = 200
    """Steps of one stage of ect."""
    ect_largest_time: float = 0.99
    """Largest time of ect, whose weights are stated for the finite ratio t / (1 - t)."""
    huber: float = 0.06
    """The c of ect's metric sqrt(|d|^2 + c^2) - c."""
    velocity: Literal["teacher", "data"] = "teacher"
    """What a flow map averages: the guided teacher's velocity, or that of the data, eps - x0, as in the papers, with
    teacher.guidance brought in by the student's own conditional and unconditional outputs."""
    pairs: Literal["ordered", "partition"] = "ordered"
    """Times (t, r) of a flow map: 'ordered' takes two logit-normal times and r = t for a share, 'partition' two
    shifted uniform ones, half of the samples with r = t and a quarter with r = 0 (AnyFlow)."""
    equal_share: float = 0.5
    """Share of r = t of 'ordered' (MeanFlow: 0.75, from scratch)."""
    pair_shift: float = 5.0
    """Time shift of 'partition'."""
    power: float = 1.0
    """The p of the weight (error + c)^-p of meanflow and imf."""
    constant: float = 1e-2
    """The c of that weight and of alphaflow's; of log(error + c) in dmf."""
    kappa: float = 0.0
    """Share of the student's own conditional output in the guided velocity of the data (not imf, not anyflow); the
    data enter with teacher.guidance (1 - kappa)."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times in which the velocity of the data is guided (not imf, not anyflow)."""
    condition_drop: float = 0.1
    """Share of samples without their prompt where the velocity of the data is guided."""
    alpha_start: float = 0.0
    """Share of the run at which alphaflow's alpha begins to leave 1."""
    alpha_end: float = 1.0
    """Share of the run at which it has reached 0; it is cut to 0 before, at 0.71 of the way, where the derivative
    form begins."""
    dmd_weight: float = 0.0
    """Weight lambda of distribution matching beside the consistency loss (rCM: 0.01); 0 needs no fake score."""
    dmd_start: int = 0
    """Steps before distribution matching begins."""
    rollout_steps: tuple[int, ...] = (2, 4, 8, 16, 50)
    """Numbers of steps of the rollouts that anyflow imitates for distribution matching, by three jumps each."""


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """Consistency distillation of a teacher into a few-step student, alone or with distribution matching (rCM)."""

    method: Literal["scm", "dcm", "ect", "rcm", "meanflow", "imf", "alphaflow", "dmf", "anyflow", "sana_sprint", "mcm"]
    """Name of the method, kept with the export; 'rcm' is 'scm' or 'dcm' with loss.dmd_weight > 0, 'sana_sprint' is
    'scm' with the section sprint, 'mcm' is 'dcm' with the section mcm, for teachers of videos."""
    teacher: TeacherConfig
    """The model to distil."""
    data: DataConfig
    """What the run reads; `latents` are the data that are noised."""
    run: RunConfig
    """Where and how long the run goes."""
    student: StudentConfig
    """The few-step generator."""
    loss: ConsistencyLossConfig = field(default_factory=ConsistencyLossConfig)
    """What the student minimises on noised data."""
    second_time: Literal["none", "gate", "sum", "decoupled"] = "none"
    """How the network is told the r of u(x, t, r): a second time embedding mixed into the first ('gate', AnyFlow), one
    of t - r added to it ('sum', MeanFlow), or the late blocks see r ('decoupled', no new weights, no export)."""
    fake_score: FakeScoreConfig | None = None
    """The network that follows the student's distribution; rcm and the second stage of anyflow need it."""
    matching: LossConfig = field(default_factory=LossConfig)
    """Times of distribution matching; its objective is 'dmd'."""
    sprint: SprintConfig | None = None
    """The adversarial half of sana_sprint and the guidance that its student is told; teacher.guidance is then the one
    that sample grids and exports tell it."""
    mcm: McmConfig | None = None
    """What mcm compares of videos, and its discriminator of frames."""

    def __post_init__(self) -> None:
        check_settings(self)


def check_settings(config: ConsistencyConfig) -> None:
    """Raise ValueError for settings that cannot work together, with what to change."""
    loss, student = config.loss, config.student
    if config.data.latents is None:
        raise ValueError("data.latents is empty; consistency needs data to noise: a folder from encode_latents.py")
    if student.steps < 1:
        raise ValueError(f"student.steps is {student.steps}; it must be at least 1")
    if loss.dmd_weight < 0 or loss.normalizer <= 0 or loss.time_std <= 0 or loss.central_step <= 0:
        raise ValueError("loss.dmd_weight must be >= 0; loss.normalizer, time_std and central_step must be > 0")
    if not 0 <= loss.max_time_share <= 1:
        raise ValueError(f"loss.max_time_share is {loss.max_time_share}; it is a share from 0 to 1")
    if loss.ect_stage_steps < 1 or not 0 < loss.ect_largest_time < 1 or loss.ect_q <= 1 or loss.huber < 0:
        raise ValueError("loss.ect_stage_steps must be >= 1, ect_largest_time in (0, 1), ect_q > 1 and huber >= 0")
    if loss.max_time_share > 0 and loss.objective == "scm" and loss.coordinates == "trigflow":
        raise ValueError(
            "loss.max_time_share trains at t = 1, where TrigFlow's tangent is zero and teaches nothing; set "
            "loss.coordinates to 'rf', or the share to 0"
        )
    if loss.learned_weight and (config.method != "scm" or loss.objective != "scm"):
        raise ValueError(
            f"loss.learned_weight with method {config.method!r}: it is part of 'scm'; beside another loss it would "
            "change their ratio while it learns. Set it to false"
        )
    if loss.grid_steps < 2:
        raise ValueError(f"loss.grid_steps is {loss.grid_steps}; dcm walks a grid of at least 2 steps")
    check_matching(config)
    check_sprint(config)
    check_mcm(config)
    if loss.objective in FLOW_MAPS:
        check_flow_map(config)
        return
    if student.sampler != "sde":
        raise ValueError(
            f"student.sampler is {student.sampler!r}; a consistency function predicts x0 and is sampled with 'sde'"
        )
    if config.second_time != "none":
        raise ValueError(
            f"second_time is {config.second_time!r} with loss.objective {loss.objective!r}, which has one time; set it "
            f"to 'none', or train one of {', '.join(FLOW_MAPS)}"
        )


def check_matching(config: ConsistencyConfig) -> None:
    """Raise ValueError where the method, its objective, the fake score and its settings do not fit together."""
    loss = config.loss
    if config.method == "rcm" and loss.objective not in ("scm", "dcm"):
        raise ValueError(
            f"method 'rcm' with loss.objective {loss.objective!r}: rcm distils a teacher; choose 'scm' or 'dcm'"
        )
    if config.method not in ("rcm", "sana_sprint", "mcm") and config.method != loss.objective:
        raise ValueError(f"method {config.method!r} with loss.objective {loss.objective!r}: set both to the same")
    matched = loss.dmd_weight > 0
    if matched != (config.fake_score is not None) or matched > (config.method in ("rcm", "anyflow")):
        raise ValueError(
            f"method {config.method!r} with loss.dmd_weight {loss.dmd_weight} and "
            f"{'a' if config.fake_score is not None else 'no'} fake_score: rcm needs a positive weight and the section "
            "fake_score, anyflow has both (second stage) or neither (first stage), the others have neither"
        )
    if config.method == "rcm" and not matched:
        raise ValueError("method 'rcm' with loss.dmd_weight 0: rcm needs a positive weight and the section fake_score")
    if config.fake_score is not None and config.fake_score.updates_per_student_update < 2:
        raise ValueError(
            "fake_score.updates_per_student_update is the length of a cycle, one step of which is the student's: below "
            "2 the fake score would never learn"
        )
    if config.matching.objective != "dmd" or config.matching.gan_weight > 0 or config.matching.regression_weight > 0:
        raise ValueError(
            "matching.objective must be 'dmd' without GAN and regression; use scripts/train_dmd.py for those"
        )


def check_sprint(config: ConsistencyConfig) -> None:
    """Raise ValueError for settings that cannot work together with SANA-Sprint."""
    loss, student, sprint = config.loss, config.student, config.sprint
    if (config.method == "sana_sprint") != (sprint is not None):
        raise ValueError(
            f"method {config.method!r} with{'out' if sprint is None else ''} the section sprint: 'sana_sprint' needs "
            "it, the other methods have none"
        )
    if sprint is None:
        return
    if (loss.objective, loss.coordinates) != ("scm", "trigflow"):
        raise ValueError(
            f"method 'sana_sprint' with loss.objective {loss.objective!r} and loss.coordinates {loss.coordinates!r}: "
            "its consistency half is 'scm' in 'trigflow'"
        )
    if student.lora_rank > 0 or student.shift != 1:
        raise ValueError(
            f"student.lora_rank is {student.lora_rank} and student.shift {student.shift}; sana_sprint trains all "
            "weights and steps at the angles of its pipeline: set rank 0 and shift 1"
        )
    lowest, highest = min(sprint.guidance_scales), max(sprint.guidance_scales)
    if not lowest <= config.teacher.guidance <= highest:
        raise ValueError(
            f"teacher.guidance is {config.teacher.guidance}, which the student is told in samples and exports; it is "
            f"trained with sprint.guidance_scales from {lowest} to {highest}: choose one between"
        )


def check_mcm(config: ConsistencyConfig) -> None:
    """Raise ValueError for settings that cannot work together with MCM."""
    if (config.method == "mcm") != (config.mcm is not None):
        raise ValueError(
            f"method {config.method!r} with{'out' if config.mcm is None else ''} the section mcm: 'mcm' needs it, the "
            "other methods have none"
        )
    if config.mcm is None:
        return
    if config.loss.objective != "dcm":
        raise ValueError(f"method 'mcm' with loss.objective {config.loss.objective!r}: it walks the grid of 'dcm'")
    if config.mcm.motion == "learned" and config.run.mixed_precision == "fp16":
        raise ValueError(
            "mcm.motion 'learned' with run.mixed_precision 'fp16': student and motion head have one backward pass and "
            "two optimizers, between which fp16 would change the loss scale; use 'bf16' or 'no'"
        )


def check_flow_map(config: ConsistencyConfig) -> None:
    """Raise ValueError for settings of a network with two times that cannot work together."""
    loss = config.loss
    if config.second_time == "none":
        raise ValueError(
            f"loss.objective {loss.objective!r} learns u(x, t, r); set second_time to 'gate', 'sum' or 'decoupled'"
        )
    if (loss.objective == "dmf") != (config.second_time == "decoupled"):
        raise ValueError(
            f"second_time {config.second_time!r} with loss.objective {loss.objective!r}: 'decoupled' is the network of "
            "dmf (decoupled MeanFlow); the others have 'gate' or 'sum'"
        )
    if config.student.sampler != "flow_map":
        raise ValueError(
            f"student.sampler is {config.student.sampler!r}; a network of two times is sampled with 'flow_map'"
        )
    if not 0 <= loss.equal_share <= 1 or not 0 <= loss.condition_drop < 1 or not loss.pair_shift > 0:
        raise ValueError("loss.equal_share must lie in [0, 1], loss.condition_drop in [0, 1), pair_shift must be > 0")
    if loss.power < 0 or loss.constant <= 0 or not 0 <= loss.kappa < 1:
        raise ValueError("loss.power must be >= 0, loss.constant > 0, loss.kappa in [0, 1)")
    if not loss.alpha_start < loss.alpha_end:
        raise ValueError(f"loss.alpha_start {loss.alpha_start} must be below loss.alpha_end {loss.alpha_end}")
    if len(loss.rollout_steps) == 0 or min(loss.rollout_steps) < 1:
        raise ValueError(f"loss.rollout_steps is {loss.rollout_steps}; give at least one number of steps, from 1 on")
