"""Settings of a consistency run. No torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fewstep.core.config import RunConfig
from fewstep.dmd.config import DataConfig, FakeScoreConfig, LossConfig, StudentConfig, TeacherConfig


@dataclass(frozen=True, kw_only=True)
class ConsistencyLossConfig:
    """What the student minimises on noised data."""

    objective: Literal["scm", "dcm", "ect"] = "scm"
    """'scm' follows the tangent of the consistency function (continuous time), 'dcm' a step of the teacher, 'ect' one
    of the noise and no teacher."""
    coordinates: Literal["trigflow", "rf"] = "trigflow"
    """Coordinates of scm: TrigFlow's angle (arXiv:2410.11081), or rectified flow's own time (arXiv:2606.25473)."""
    tangent: Literal["jvp", "central"] = "jvp"
    """How the derivative along the teacher's path is taken: forward mode, or central differences of two calls."""
    central_step: float = 0.005
    """Step of the central difference along the path, in radians (trigflow) or in time (rf)."""
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
    dmd_weight: float = 0.0
    """Weight lambda of distribution matching beside the consistency loss (rCM: 0.01); 0 needs no fake score."""
    dmd_start: int = 0
    """Steps before distribution matching begins."""


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """Consistency distillation of a teacher into a few-step student, alone or with distribution matching (rCM)."""

    method: Literal["scm", "dcm", "ect", "rcm"]
    """Name of the method, kept with the export; 'rcm' is 'scm' or 'dcm' with loss.dmd_weight > 0."""
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
    fake_score: FakeScoreConfig | None = None
    """The network that follows the student's distribution; rcm needs it."""
    matching: LossConfig = field(default_factory=LossConfig)
    """Times of distribution matching (rcm); its objective is 'dmd'."""

    def __post_init__(self) -> None:
        check_settings(self)


def check_settings(config: ConsistencyConfig) -> None:
    """Raise ValueError for settings that cannot work together, with what to change."""
    loss, student = config.loss, config.student
    if config.data.latents is None:
        raise ValueError("data.latents is empty; consistency needs data to noise: a folder from encode_latents.py")
    if student.steps < 1:
        raise ValueError(f"student.steps is {student.steps}; it must be at least 1")
    if student.sampler != "sde":
        raise ValueError("student.sampler is 'ode'; a consistency function predicts x0 and is sampled with 'sde'")
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
    if config.method == "rcm" and loss.objective == "ect":
        raise ValueError("method 'rcm' with loss.objective 'ect': rcm distils a teacher; choose 'scm' or 'dcm'")
    if loss.grid_steps < 2:
        raise ValueError(f"loss.grid_steps is {loss.grid_steps}; dcm walks a grid of at least 2 steps")
    matched = loss.dmd_weight > 0
    if matched != (config.method == "rcm") or matched != (config.fake_score is not None):
        raise ValueError(
            f"method {config.method!r} with loss.dmd_weight {loss.dmd_weight} and "
            f"{'a' if config.fake_score is not None else 'no'} fake_score: rcm needs a positive weight and the section "
            "fake_score, the others have neither"
        )
    if not matched and config.method != loss.objective:
        raise ValueError(f"method {config.method!r} with loss.objective {loss.objective!r}: set both to the same")
    if config.matching.objective != "dmd" or config.matching.gan_weight > 0 or config.matching.regression_weight > 0:
        raise ValueError(
            "matching.objective must be 'dmd' without GAN and regression; use scripts/train_dmd.py for those"
        )
