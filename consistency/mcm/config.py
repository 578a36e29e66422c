"""Settings of the motion consistency model. No torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fewstep.consistency.sections import GridConfig, require_unset
from fewstep.core.config import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class McmDiscriminatorConfig:
    """MCM's discriminator of single frames, heads on features of the frozen teacher."""

    optimizer: OptimizerConfig
    """Optimizer of the heads."""
    weight: float = 1.0
    """Weight of the discriminator in the student's loss."""
    frames: int = 2
    """Latent frames of a video that are judged, one at random from each of as many equal parts; without pictures."""
    judged_times: tuple[float, float] = (0.02, 0.5)
    """Smallest and largest time to which frames are noised before the frozen teacher's features of them are judged."""
    blocks: tuple[int, ...] | None = None
    """Blocks of the teacher whose features are judged; empty is the family's own choice."""
    head_width: int = 64
    """Width of the discriminator's heads."""
    pictures: str | None = None
    """Folder of latents of pictures [N, C, 1, h, w] that show how frames are to look, of which the first alone is then
    judged; empty takes the data's frames."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight: given {self.weight}, allowed is a number > 0; leave the section out for none")
        if self.frames < 1 or self.head_width < 1 or not 0 <= self.judged_times[0] <= self.judged_times[1] <= 1:
            raise ValueError(
                f"frames is {self.frames}, head_width {self.head_width} and judged_times {self.judged_times}; use at "
                "least 1, at least 1, and 0 <= smallest <= largest <= 1"
            )
        if self.pictures is not None:
            require_unset(self, ["frames"], "a discriminator without pictures")


@dataclass(frozen=True, kw_only=True)
class McmConfig(GridConfig):
    """Motion by consistency, appearance by a discriminator of single frames (MCM, arXiv:2406.06890).

    The public code walks a grid of 50 steps.
    """

    motion: Literal["raw", "difference", "low", "high", "correlation", "learned"] = "learned"
    """What of a video the consistency loss compares: see consistency/mcm/motion.py; 'learned' is a small network on
    each frame, trained with the student, whose moving average maps the target."""
    constant: float = 1e-3
    """The c of sqrt(d^2 + c^2) - c, elementwise."""
    cutoff: float = 0.25
    """Largest frequency of 'low', as a share of the highest there is; 'high' has the others."""
    motion_width: int = 64
    """Channels of the learned motion head, a multiple of 32."""
    motion_ema_decay: float = 0.95
    """Decay per update of the learned head's average."""
    mixed_share: float = 0.5
    """Share of the steps in which noise is added to the student's own one-step videos and not to the data."""
    discriminator: McmDiscriminatorConfig | None = None
    """The discriminator of frames; leave it out for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.constant < 0 or not 0 <= self.cutoff <= 1 or not 0 <= self.motion_ema_decay < 1:
            raise ValueError(
                f"constant is {self.constant}, cutoff {self.cutoff} and motion_ema_decay {self.motion_ema_decay}; they "
                "must be >= 0, in [0, 1] and in [0, 1)"
            )
        if self.motion_width < 32 or self.motion_width % 32:
            raise ValueError(f"motion_width is {self.motion_width}; use a multiple of 32, for its 32 groups")
        if not 0 <= self.mixed_share <= 1:
            raise ValueError(f"mixed_share: given {self.mixed_share}, allowed is a share from 0 to 1")
        if self.motion != "learned":
            require_unset(self, ["motion_width", "motion_ema_decay"], "motion 'learned'")
        if self.motion not in ("low", "high"):
            require_unset(self, ["cutoff"], "motion 'low' or 'high'")
