"""Sections that the settings of several methods share. No torch here, so that `--help` is quick."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from fewstep.core.config import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class TrainedConfig:
    """A network that is trained: all its weights, or adapters on the frozen ones that it shares with its teacher."""

    optimizer: OptimizerConfig
    """Optimizer of the network, and of what is trained with it (discriminator heads)."""
    path: str | None = None
    """Pipeline of the same kind and latent space whose network is the start, such as a 1.3B under a teacher of 14B;
    empty is the teacher's."""
    lora_rank: int = 0
    """Rank of the adapters, which sit on the weights of the teacher in memory; 0 trains a copy of all weights."""
    lora_alpha: float = 64.0
    """Scale of the adapters, which are multiplied by lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = ()
    """Layers that get adapters, by the ends of their names such as to_q or ff.net.2; the one word all is every linear
    layer and convolution; empty is attention and feed-forward of the family."""
    lora_start: Literal["uniform", "gaussian"] = "uniform"
    """First weights of an adapter's inner layer: uniform within 1 / sqrt(inputs), or normal with deviation 1 / rank."""
    gradient_checkpointing: bool = False
    """Save memory by computing activations again in the backward pass."""

    def __post_init__(self) -> None:
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank is {self.lora_rank}; it must be 0 (no adapters) or more")
        if self.lora_rank > 0 and not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"lora_alpha is {self.lora_alpha}; it must be positive")
        for name in ("lora_alpha", "lora_targets", "lora_start"):
            value = getattr(self, name)
            if "" in self.lora_targets or ("all" in self.lora_targets and len(self.lora_targets) > 1):
                raise ValueError(
                    f"lora_targets is {list(self.lora_targets)}; give ends of names of layers, or all alone"
                )
            if self.lora_rank == 0 and value != getattr(TrainedConfig, name):
                raise ValueError(f"{name} is {value} with lora_rank 0, where there are no adapters: leave it out")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a pipeline is. The token for models behind an agreement is read from the environment (HF_TOKEN)."""

    path: str
    """Diffusers directory or hub id of the pipeline."""
    variant: str | None = None
    """Which files of weights to read, such as fp16; empty is the plain ones, or the only ones that are there."""
    revision: str | None = None
    """Branch, tag or commit of a model of the hub."""
    subfolder: str | None = None
    """Folder of the pipeline inside the directory or repository."""
    lora: str | None = None
    """A LoRA of the pipeline's network that is merged into it first: a .safetensors file, a folder or a hub id, in any
    layout that diffusers knows (its own, kohya's, ComfyUI's)."""
    lora_scale: float = 1.0
    """Its scale."""
    pipeline: str | None = None
    """Class of the pipeline, where it is another than its model_index.json says: WanImageToVideoPipeline for the image
    mode of Wan 2.2 TI2V-5B."""
    embedded_guidance: float | None = None
    """The guidance that a guidance-distilled network is told in every call (FLUX.1-dev, FLUX.2-dev, HunyuanVideo);
    empty is the stock pipeline's own. The student is trained at it and called with it. Guidance by a second call on top
    of it is guidance, and mostly 1 there."""
    told_picture: bool = False
    """Whether a network that makes pictures from text and edits them as well (FLUX.2) is told one with each prompt,
    from data.pictures; its students then need one in every call. Models that always need one do without this
    setting."""

    def __post_init__(self) -> None:
        told = self.embedded_guidance
        if told is not None and not (math.isfinite(told) and told > 0):
            raise ValueError(f"embedded_guidance is {told}; it must be a positive number")
        if self.lora is None and self.lora_scale != 1.0:
            raise ValueError(f"lora_scale is {self.lora_scale}, and there is no lora: leave it out")
        if not math.isfinite(self.lora_scale) or self.lora_scale == 0:
            raise ValueError(f"lora_scale is {self.lora_scale}; it must be a number other than 0")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(ModelSource):
    """The model to distil."""

    guidance: float = 1.0
    """Guidance weight w of the real score, u + w (c - u); 1 is no guidance."""
    guidance_low: float | None = None
    """The same for the expert of little noise of Wan 2.2 A14B; empty is guidance."""
    negative_prompt: str | None = None
    """What u is told; empty is the stock pipeline's own (the empty prompt; zeros for SDXL). Recipes of Wan have one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision in which the frozen teacher is kept."""
    quantise: Literal["none", "int8", "float8"] = "none"
    """Keep the linear layers of the network's blocks in 8 bits (torchao: pip install 'fewstep[quantise]'); what is
    trained on it are adapters, or networks of another path."""
    lora_apart: bool = False
    """Keep `lora` as adapters of the teacher alone: student and fake score start from the weights under them, and may
    start from those adapters (init). Without it they start from the sum."""
    vae_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of its autoencoder, whose rounding is seen in sample grids and in what rewards judge."""

    def of_run(self) -> dict[str, Any]:
        """What `RunSettings` keeps of the teacher."""
        return {
            "teacher_path": self.path,
            "teacher_variant": self.variant,
            "teacher_revision": self.revision,
            "teacher_subfolder": self.subfolder,
            # What lies under the student, which adapters of the teacher alone do not.
            "teacher_lora": None if self.lora_apart else self.lora,
            "teacher_lora_scale": 1.0 if self.lora_apart else self.lora_scale,
            "teacher_pipeline": self.pipeline,
            "teacher_embedded_guidance": self.embedded_guidance,
            "teacher_told_picture": self.told_picture,
            "teacher_dtype": self.dtype,
            "teacher_quantise": self.quantise,
            "guidance": self.guidance,
            "negative_prompt": self.negative_prompt,
        }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance is {self.guidance}; it must be a number")
        if self.guidance_low is not None and not math.isfinite(self.guidance_low):
            raise ValueError(f"guidance_low is {self.guidance_low}; it must be a number")
        if self.lora_apart and self.lora is None:
            raise ValueError("lora_apart is set, and there is no lora: leave it out")


@dataclass(frozen=True, kw_only=True)
class StudentConfig(TrainedConfig):
    """A generator of few steps."""

    ema_kind: Literal["constant", "power"] = "constant"
    """Of the weight average: exponential with one decay, or a power function of the update (EDM2), whose window grows
    with the run."""
    ema_decay: float = 0.99
    """Decay of the exponential average per student update; 0 keeps the live weights."""
    ema_length: float = 0.1
    """Relative length of the power average: its standard deviation as a share of the run so far."""
    ema_start: int = 0
    """Student updates before averaging begins."""
    ema_every: int = 1
    """Student updates from one that the average takes in to the next."""
    init: str | None = None
    """Weights to start from: a run directory or checkpoint (its average), an export, the folder of a network, or a
    .safetensors file; empty is the teacher."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ema_decay < 1 or self.ema_start < 0:
            raise ValueError(f"ema_decay {self.ema_decay} must lie in [0, 1), ema_start {self.ema_start} must be >= 0")
        if self.ema_every < 1:
            raise ValueError(f"ema_every is {self.ema_every}; it must be at least 1, which takes in every update")
        if self.ema_every > 1 and self.ema_kind == "constant" and self.ema_decay == 0:
            raise ValueError(
                f"ema_every is {self.ema_every} with ema_decay 0, which keeps the live weights: leave ema_every out"
            )
        if not 0 < self.ema_length < 0.28:
            raise ValueError(f"ema_length is {self.ema_length}; it must lie between 0 and 0.28")
        unread = "ema_length" if self.ema_kind == "constant" else "ema_decay"
        if getattr(self, unread) != getattr(StudentConfig, unread):
            raise ValueError(
                f"{unread} is given, which an average of the kind {self.ema_kind} does not read: leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class GridStudentConfig(StudentConfig):
    """The few-step generator, called at the times of one grid."""

    steps: int = 1
    """Network calls per sample, on an even grid of times."""
    shift: float = 1.0
    """Time shift of the step grid."""
    times: tuple[float, ...] | None = None
    """The times of the calls in place of that grid, falling in (0, 1] where 1 is noise, such as [1, 0.757, 0.522]."""
    timesteps: tuple[float, ...] | None = None
    """The same in the units of the teacher's network, such as DMD2's [999, 749, 499, 249] of SDXL."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be at least 1")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift is {self.shift}; it must be positive")
        if self.times is not None and self.timesteps is not None:
            raise ValueError("times and timesteps are both given; they say the same in two units: leave one out")
        if self.times is not None:
            self._take_grid("times", self.times, highest=1)
        if self.timesteps is not None:
            self._take_grid("timesteps", self.timesteps, highest=math.inf)

    def _take_grid(self, name: str, values: tuple[float, ...], *, highest: float) -> None:
        """`steps` becomes the number of the given times. Raises ValueError for those that are no grid."""
        falls = all(a > b for a, b in pairwise(values))
        if len(values) == 0 or not falls or not values[-1] > 0 or not values[0] <= highest or values[0] == math.inf:
            told = "falling numbers above 0" + (", at most 1" if highest == 1 else "")
            raise ValueError(f"{name} is {list(values)}; give one or more {told} (the 0 at the end is implied)")
        if self.steps not in (1, len(values)) or self.shift != 1:
            raise ValueError(
                f"steps is {self.steps} and shift {self.shift} beside {len(values)} {name}, which say both: leave "
                "steps and shift out"
            )
        object.__setattr__(self, "steps", len(values))


@dataclass(frozen=True, kw_only=True)
class SteppingStudentConfig(GridStudentConfig):
    """A student of the times of one grid, whose step between two of them can be chosen."""

    sampler: Literal["sde", "ode"] = "sde"
    """'sde' re-noises the prediction with fresh noise at each step, 'ode' takes Euler steps."""


@dataclass(frozen=True, kw_only=True)
class FakeScoreConfig(TrainedConfig):
    """The network that follows the student's distribution."""

    init: str | None = None
    """Weights to start from: the fake score of a run (directory or checkpoint), or a network; empty is the model's own,
    and in rewards the fake score of the run that student.init names."""
    ratio: int = 5
    """Fake-score updates for each update of the student (two-time-scale rule of DMD2, 5). In train_dmd and rewards they
    are made on the student's samples of the same step; beside consistency and in self_forcing a step is either the
    student's or the fake score's, so that a cycle has ratio + 1 steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio < 1:
            raise ValueError(f"ratio is {self.ratio}; it must be at least 1 (DMD2 uses 5)")


@dataclass(frozen=True, kw_only=True)
class ToldFakeScoreConfig(FakeScoreConfig):
    """The network that follows the student's distribution, on rollouts that stop at different steps."""

    told_exit: bool = False
    """Tell it at which step the student's samples stopped (ours): one that is told nothing follows the mixture of all
    steps, which pulls the last one away from the teacher."""


@dataclass(frozen=True, kw_only=True)
class TimeLawConfig:
    """How random times are drawn at which networks are compared or trained."""

    law: Literal["uniform", "logit_normal", "beta"] = "uniform"
    """Uniform, the sigmoid of a normal number, or a beta distribution (before the shift)."""
    mean: float = 0.0
    """Mean of that normal number."""
    std: float = 1.0
    """Standard deviation of that normal number."""
    alpha: float = 4.0
    """First parameter of the beta distribution; above the second, times lie towards noise."""
    beta: float = 1.5
    """Second parameter of it."""
    anneal_steps: int = 0
    """Updates of the student over which a beta distribution becomes the uniform one, by half a cosine; 0 leaves it."""
    shift: float = 1.0
    """Time shift of the times."""
    unit: Literal["time", "timestep"] = "time"
    """What min and max count: times from 0 to 1, or whole timesteps of the network, all equally likely (DMD2)."""
    min: float = 0.02
    """Smallest value."""
    max: float = 0.98
    """Largest value."""
    ends: Literal["clamp", "truncate"] = "clamp"
    """Values outside are moved to the ends, or never drawn."""

    def __post_init__(self) -> None:
        highest = 1.0 if self.unit == "time" else math.inf
        if not 0.0 <= self.min < self.max <= highest or self.max == math.inf:
            raise ValueError(f"min {self.min} and max {self.max} must satisfy 0 <= min < max <= {highest:g}")
        if not 0 < self.shift < math.inf or not 0 < self.std < math.inf or not math.isfinite(self.mean):
            raise ValueError(f"shift {self.shift} and std {self.std} must be positive, mean {self.mean} a number")
        if not 0 < self.alpha < math.inf or not 0 < self.beta < math.inf or self.anneal_steps < 0:
            raise ValueError(
                f"alpha {self.alpha} and beta {self.beta} must be positive, anneal_steps {self.anneal_steps} 0 or more"
            )
        defaults = TimeLawConfig.__dataclass_fields__
        unread: dict[str, str] = dict.fromkeys(("law", "shift", "ends"), "timestep") if self.unit == "timestep" else {}
        unread |= dict.fromkeys(("mean", "std"), self.law) if self.law != "logit_normal" else {}
        unread |= dict.fromkeys(("alpha", "beta", "anneal_steps"), self.law) if self.law != "beta" else {}
        for name in unread:
            if getattr(self, name) != defaults[name].default:
                is_unit = unread[name] == "timestep"
                told = "unit timestep draws whole timesteps evenly" if is_unit else f"law is {self.law}"
                raise ValueError(f"{name} is {getattr(self, name)}, and {told}: leave it out")
        if self.unit == "timestep" and (self.min % 1 or self.max % 1):
            raise ValueError(f"min {self.min} and max {self.max} must be whole timesteps")

    def at(self, updates: int) -> TimeLawConfig:
        """The law after so many updates of the student."""
        if self.anneal_steps == 0:
            return self
        left = 0.5 * (1.0 + math.cos(math.pi * min(1.0, updates / self.anneal_steps)))
        alpha, beta = 1.0 + (self.alpha - 1.0) * left, 1.0 + (self.beta - 1.0) * left
        return dataclasses.replace(self, alpha=alpha, beta=beta, anneal_steps=0)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the run reads."""

    prompts: str
    """Text file, one prompt a line."""
    cache_prompts: bool = True
    """Encode every prompt once before training; turn off when the embeddings do not fit into memory."""
    height: int | None = None
    """Pixel height of the samples; empty is the teacher's own."""
    width: int | None = None
    """Pixel width of the samples; empty is the teacher's own."""
    sample_count: int = 10
    """Columns of the sample grid: the first prompts of the file, with fixed seeds."""

    def __post_init__(self) -> None:
        if self.sample_count < 1:
            raise ValueError(f"sample_count is {self.sample_count}; the sample grid needs at least 1 prompt")
        for name, side in (("height", self.height), ("width", self.width)):
            if side is not None and side < 1:
                raise ValueError(f"{name} is {side}; it must be at least 1 pixel")


@dataclass(frozen=True, kw_only=True)
class SampleDataConfig(DataConfig):
    """What a run reads whose teacher makes pictures or videos."""

    frames: int | None = None
    """Pixel frames of a video, for teachers of videos; empty is the teacher's own."""
    pictures: str | None = None
    """Folder with a picture for each prompt, in the order of their names, for teachers that are told one, such as the
    first frame of a video. Latents of real videos bring their own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"frames is {self.frames}; it must be at least 1")
