"""Settings of a run that trains a causal video student. No torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal

from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.policy import CachePolicy
from fewstep.core.config import OptimizerConfig, RunConfig
from fewstep.core.settings import FakeScoreConfig, TeacherConfig
from fewstep.dmd.config import LossConfig

# Stages that minimise a loss of given videos; self_forcing minimises one of its own.
FORCING_METHODS = ("teacher_forcing", "diffusion_forcing", "tf_dcm", "tf_scm", "ode")
# Stages whose students take many steps of an ODE, with guidance; the others take those of their schedule.
FLOW_METHODS = ("teacher_forcing", "diffusion_forcing")


@dataclass(frozen=True, kw_only=True)
class CausalDataConfig:
    """What the run reads."""

    prompts: str
    """Text file, one prompt a line: what rollouts are asked for, and the rows of the contact sheet."""
    cache_prompts: bool = True
    """Encode every prompt once before training; turn off when the embeddings do not fit into memory."""
    latents: str | None = None
    """Folder of video latents with captions (scripts/encode_videos.py); self_forcing without images needs none."""
    controls: str | None = None
    """File of what each frame of data.latents is told beside its caption, such as actions or features of sound
    (`FrameControls`, safetensors); the student gets an input channel for each."""
    pairs: str | None = None
    """Folder of teacher trajectories for ode; empty makes them in the run directory."""
    height: int | None = None
    """Pixel height, where no latents say it."""
    width: int | None = None
    """Pixel width, where no latents say it."""
    image_share: float = 0.0
    """Share of steps in which the first latent frame is given, from data.latents with their captions."""
    sample_count: int = 6
    """Prompts of the contact sheet: the first of the file, with fixed seeds."""


@dataclass(frozen=True, kw_only=True)
class CausalStudentConfig:
    """The causal generator."""

    optimizer: OptimizerConfig
    """Optimizer of the student."""
    layout: tuple[int, ...]
    """Latent frames of each chunk; their sum is the length of the training videos. Streams repeat the last one."""
    policy: CachePolicy = field(default_factory=CachePolicy)
    """What a chunk sees of earlier ones, and how it is kept."""
    steps: tuple[int, ...] = (4, 2)
    """Network calls of each chunk; later chunks repeat the last number. More for the first chunk than for others is
    the first-frame enhancement of ASD."""
    shift: float = 5.0
    """Time shift of the step grids."""
    times: tuple[tuple[float, ...], ...] | None = None
    """Times of each chunk in place of the grids of steps and shift, such as [[1, 0.9375, 0.83, 0.625], [1, 0.625]]."""
    lora_rank: int = 0
    """Rank of the adapters; 0 trains all weights."""
    lora_alpha: float = 64.0
    """Scale of the adapters, which are multiplied by lora_alpha / lora_rank."""
    gradient_checkpointing: bool = False
    """Save memory by computing activations again in the backward pass."""
    ema_decay: float = 0.99
    """Decay of the weight average per student update."""
    ema_start: int = 0
    """Student updates before averaging begins."""
    init: str | None = None
    """Where the weights come from: the run directory or a checkpoint of an earlier stage (their average), or a
    safetensors file of a Wan transformer; empty is the teacher."""


@dataclass(frozen=True, kw_only=True)
class CausalLossConfig:
    """What the student minimises."""

    frames: Literal["mean", "sum"] = "mean"
    """How the losses on given videos are taken together over latent frames, each being a mean over its numbers."""
    shift: float = 5.0
    """Time shift of the uniform times of teacher_forcing and diffusion_forcing."""
    weight: Literal["bell", "none"] = "bell"
    """Weight of a time in these two: a bell around 1/2 as in Causal-rCM's teacher forcing, or none as in its diffusion
    forcing."""
    condition_drop: float = 0.1
    """Share of samples without their caption in these two, for guidance later."""
    context_noise: float = 0.0
    """Largest time to which the clean half is noised in teacher_forcing, tf_dcm and tf_scm; the network is told."""
    grid_steps: int = 48
    """Steps of the grid that the teacher of tf_dcm walks by one."""
    grid_shift: float = 3.0
    """Time shift of that grid."""
    time_mean: float = -0.8
    """Mean of log(t / (1 - t)) in tf_scm."""
    time_std: float = 1.6
    """Standard deviation of it."""
    max_time_share: float = 0.0
    """Share of samples of tf_scm that are trained at t = 1 instead, where generation begins (ours)."""
    tangent: Literal["jvp", "central"] = "jvp"
    """How tf_scm differentiates along the teacher's path: forward mode, or central differences of two calls."""
    central_step: float = 0.005
    """Step of the central difference in time."""
    check_tangent: bool = True
    """Compare the network's tangent with central differences before the first step (tf_scm with jvp)."""
    tangent_warmup: int = 0
    """Steps over which the derivative term of tf_scm grows from 0 to its full weight."""
    normalizer: float = 0.1
    """The c of g / (|g| + c)."""
    ode_source: Literal["bidirectional", "causal"] = "bidirectional"
    """Whose trajectories ode regresses on: the bidirectional teacher's, or those of the causal student that it starts
    from, on clean context."""
    ode_pairs: int = 64
    """Trajectories that are made when data.pairs is empty."""
    ode_steps: int = 48
    """Steps of the teacher on such a trajectory, at least."""
    exit: Literal["cycled", "random"] = "cycled"
    """Where rollouts stop: each exit in turn (Causal-rCM), or a random one (Self-Forcing)."""
    rollout_schedules: tuple[tuple[int, ...], ...] = ()
    """Numbers of steps per chunk, one such list drawn for each rollout in place of student.steps (AnyFlow's mixture of
    step counts); they use student.shift."""
    replay: bool = False
    """Roll out without a graph and make each exit call again in the backward pass: the same gradient in the memory of
    one chunk."""
    longest_frames: int | None = None
    """Latent frames of the longest rollout; the teacher judges the last ones. Empty is the length of the layout."""
    new_frames: int | None = None
    """Latent frames at the end of a longer rollout that learn; empty is all but the first chunk of the window."""
    asd_weight: float = 0.0
    """Weight of adversarial self-distillation between n and n + 1 steps; 0 has no discriminator."""
    asd_penalty: float = 1.0
    """Weight of the R1 and R2 penalties of that discriminator."""


@dataclass(frozen=True, kw_only=True)
class CausalConfig:
    """A stage on the way from a bidirectional teacher to a causal student of a few steps per chunk."""

    method: Literal["teacher_forcing", "diffusion_forcing", "tf_dcm", "tf_scm", "ode", "self_forcing"]
    """The stage: flow matching on clean context (teacher_forcing) or on noisy one (diffusion_forcing), consistency on
    clean context (tf_dcm, tf_scm), regression on trajectories (ode), distribution matching on rollouts."""
    teacher: TeacherConfig
    """The bidirectional video model; in tf_dcm and tf_scm its guidance is that of the causal teacher."""
    data: CausalDataConfig
    """What the run reads."""
    run: RunConfig
    """Where and how long the run goes."""
    student: CausalStudentConfig
    """The causal generator."""
    loss: CausalLossConfig = field(default_factory=CausalLossConfig)
    """What the student minimises."""
    fake_score: FakeScoreConfig | None = None
    """The bidirectional network that follows the student's distribution; self_forcing needs it."""
    matching: LossConfig = field(default_factory=LossConfig)
    """Times and form of distribution matching."""
    steered_teacher: str | None = None
    """Weights of a bidirectional network that knows data.controls, which self_forcing with controls needs: the run of a
    diffusion_forcing stage whose layout is one chunk, one of its checkpoints, or a safetensors file."""

    def __post_init__(self) -> None:
        check_settings(self)


def check_settings(config: CausalConfig) -> None:
    """Raise ValueError for settings that cannot work together, with what to change."""
    check_student(config.student)
    check_data(config)
    check_forcing(config.loss)
    if (config.method == "self_forcing") != (config.fake_score is not None):
        raise ValueError(
            f"method {config.method!r} with {'a' if config.fake_score is not None else 'no'} fake_score: self_forcing "
            "needs that section, the other stages have none"
        )
    causal_teacher = config.method in ("tf_dcm", "tf_scm") or (
        config.method == "ode" and config.loss.ode_source == "causal"
    )
    if causal_teacher and config.student.init is None:
        raise ValueError(
            f"method {config.method!r} distils a causal teacher, and student.init is empty: give the run directory "
            "of a teacher_forcing stage; the bidirectional teacher's weights know no causal mask"
        )
    if config.method == "self_forcing":
        check_rollouts(config)
    elif config.loss.asd_weight > 0 or config.loss.longest_frames is not None or config.loss.rollout_schedules:
        raise ValueError(
            "loss.asd_weight, loss.longest_frames and loss.rollout_schedules belong to method 'self_forcing', which "
            f"rolls out; this is {config.method!r}"
        )


def check_student(student: CausalStudentConfig) -> None:
    """Raise ValueError unless layout, policy and steps fit together."""
    try:
        layout = ChunkLayout(student.layout)
    except ValueError as error:
        raise ValueError(f"student.layout: {error}") from error
    try:
        student.policy.chunk_window(layout)
    except ValueError as error:
        raise ValueError(f"student.policy: {error}") from error
    if len(student.steps) == 0 or min(student.steps) < 1:
        raise ValueError(f"student.steps is {list(student.steps)}; give a number of calls, from 1 on, for each chunk")
    if not student.shift > 0:
        raise ValueError(f"student.shift is {student.shift}; it must be positive")
    if student.times is not None and (len(student.times) == 0 or min(map(len, student.times)) == 0):
        raise ValueError("student.times is empty; give the times of at least one chunk, or leave it out")


def check_data(config: CausalConfig) -> None:
    """Raise ValueError where the stage lacks something to read."""
    data = config.data
    if not 0 <= data.image_share <= 1:
        raise ValueError(f"data.image_share is {data.image_share}; it is a share from 0 to 1")
    if data.sample_count < 1:
        raise ValueError(f"data.sample_count is {data.sample_count}; the contact sheet needs a prompt")
    needs_latents = config.method in ("teacher_forcing", "diffusion_forcing", "tf_dcm", "tf_scm") or (
        config.method == "ode" and config.loss.ode_source == "causal" and data.pairs is None
    )
    if (needs_latents or data.image_share > 0) and data.latents is None:
        raise ValueError(
            f"data.latents is empty; method {config.method!r} with image_share {data.image_share} needs videos: a "
            "folder from scripts/encode_videos.py"
        )
    if config.method == "ode" and data.image_share > 0:
        raise ValueError("data.image_share is no part of ode: its chunks at t = 0 are given as a whole")
    check_controls(config)


def check_controls(config: CausalConfig) -> None:
    """Raise ValueError where a stage cannot be told something of each frame."""
    steered = config.steered_teacher
    if steered is not None and (config.data.controls is None or config.method != "self_forcing"):
        raise ValueError("steered_teacher belongs to method 'self_forcing' with data.controls: leave it out")
    if config.data.controls is None:
        return
    if config.data.latents is None:
        raise ValueError("data.controls without data.latents: they are rows for the videos of that folder")
    if config.method == "ode":
        raise ValueError("data.controls is no part of ode, whose trajectories have none: go on with tf_dcm or tf_scm")
    if config.method == "self_forcing" and steered is None:
        raise ValueError(
            "method 'self_forcing' with data.controls, and steered_teacher is empty: the bidirectional teacher knows "
            "no controls, and its scores would pull the student to videos that ignore them. Train one with them "
            "(method diffusion_forcing, a layout of one chunk), and give its run"
        )
    if config.loss.longest_frames is not None:
        raise ValueError("loss.longest_frames with data.controls: controls end where their videos do")
    if config.student.lora_rank > 0 and config.student.init is None:
        raise ValueError(
            "student.lora_rank with data.controls and without student.init: adapters would leave the new input "
            "channels at zero. Train all weights in the first stage, or start from weights that know the controls"
        )


def check_forcing(loss: CausalLossConfig) -> None:
    """Raise ValueError for numbers that the losses on given videos cannot use."""
    if not loss.shift > 0 or not loss.grid_shift > 0 or loss.grid_steps < 2:
        raise ValueError("loss.shift and loss.grid_shift must be positive, loss.grid_steps at least 2")
    if not loss.time_std > 0 or not loss.central_step > 0 or not loss.normalizer > 0 or loss.tangent_warmup < 0:
        raise ValueError("loss.time_std, central_step and normalizer must be > 0, tangent_warmup >= 0")
    if not 0 <= loss.condition_drop < 1 or not 0 <= loss.context_noise < 1 or not 0 <= loss.max_time_share <= 1:
        raise ValueError("loss.condition_drop and loss.context_noise must lie in [0, 1), max_time_share in [0, 1]")
    if loss.ode_pairs < 1 or loss.ode_steps < 1:
        raise ValueError(f"loss.ode_pairs {loss.ode_pairs} and ode_steps {loss.ode_steps} must be at least 1")


def check_rollouts(config: CausalConfig) -> None:
    """Raise ValueError for rollouts, windows and matching that cannot be."""
    loss, student, fake_score = config.loss, config.student, config.fake_score
    assert fake_score is not None
    if fake_score.updates_per_student_update < 2:
        raise ValueError(
            "fake_score.updates_per_student_update is the length of a cycle, one step of which is the student's: below "
            "2 the fake score would never learn"
        )
    if config.matching.objective not in ("dmd", "sid") or config.matching.gan_weight > 0:
        raise ValueError("matching.objective must be 'dmd' or 'sid' without GAN in self_forcing")
    if config.matching.regression_weight > 0:
        raise ValueError("matching.regression_weight belongs to one-step students of images; the stage ode regresses")
    if any(len(counts) == 0 or min(counts) < 1 for counts in loss.rollout_schedules):
        raise ValueError(f"loss.rollout_schedules is {loss.rollout_schedules}; each is a list of counts from 1 on")
    if loss.rollout_schedules and student.times is not None:
        raise ValueError("loss.rollout_schedules count steps on grids; leave student.times out")
    if loss.asd_weight < 0 or loss.asd_penalty < 0:
        raise ValueError("loss.asd_weight and loss.asd_penalty must be 0 or more")
    longest = max(map(len, student.times)) if student.times is not None else max(student.steps)
    if loss.asd_weight > 0 and max([longest, *(max(counts) for counts in loss.rollout_schedules)]) < 2:
        raise ValueError("loss.asd_weight compares n with n + 1 steps, and no chunk has two: raise student.steps")
    check_long_rollouts(loss, ChunkLayout(student.layout))


def check_long_rollouts(loss: CausalLossConfig, layout: ChunkLayout) -> None:
    """Raise ValueError unless longer rollouts are whole chunks, and so are their new frames."""
    chunk = layout.lengths[-1]
    if loss.longest_frames is None:
        if loss.new_frames is not None:
            raise ValueError("loss.new_frames without loss.longest_frames: rollouts of the layout learn as a whole")
        return
    extra = loss.longest_frames - layout.frames
    if extra < chunk or extra % chunk:
        raise ValueError(
            f"loss.longest_frames is {loss.longest_frames}; it must be the {layout.frames} frames of student.layout "
            f"and one or more chunks of {chunk}"
        )
    equal = sum(1 for _ in takewhile(lambda length: length == chunk, reversed(layout.lengths)))
    new = new_frames(loss, layout)
    if not chunk <= new < layout.frames or new % chunk or new > equal * chunk:
        raise ValueError(
            f"loss.new_frames is {new}; it must be whole chunks of {chunk} frames, fewer than the {layout.frames} of "
            f"the teacher's window, and among the {equal} equal chunks at the end of student.layout"
        )


def new_frames(loss: CausalLossConfig, layout: ChunkLayout) -> int:
    """Latent frames at the end of a longer rollout that learn."""
    return layout.frames - layout.lengths[0] if loss.new_frames is None else loss.new_frames
