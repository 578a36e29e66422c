"""Settings of the motion consistency model beside those of discrete consistency. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fewstep.core.config import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class McmConfig:
    """Motion by consistency, appearance by a discriminator of single frames (MCM, arXiv:2406.06890).

    The grid of the teacher's steps is that of `ConsistencyLossConfig` (grid_steps, 50 in the public code, and
    grid_shift).
    """

    optimizer: OptimizerConfig
    """Optimizer of the discriminator's heads."""
    motion: Literal["raw", "difference", "low", "high", "correlation", "learned"] = "learned"
    """What of a video the consistency loss compares: see consistency/motion.py; 'learned' is a small network on each
    frame, trained with the student, whose moving average maps the target."""
    constant: float = 1e-3
    """The c of sqrt(d^2 + c^2) - c, elementwise."""
    cutoff: float = 0.25
    """Largest frequency of 'low', as a share of the highest there is."""
    motion_width: int = 64
    """Channels of the learned motion head, a multiple of 32."""
    motion_ema_decay: float = 0.95
    """Decay per update of the learned head's average."""
    adversarial_weight: float = 1.0
    """Weight of the discriminator in the student's loss; 0 leaves it out."""
    frames: int = 2
    """Latent frames of a video that are judged, one at random from each of as many equal parts. With pictures it is the
    first alone."""
    mixed_share: float = 0.5
    """Share of the steps in which noise is added to the student's own one-step videos and not to the data."""
    judged_times: tuple[float, float] = (0.02, 0.5)
    """Smallest and largest time to which frames are noised before the frozen teacher's features of them are judged."""
    blocks: tuple[int, ...] | None = None
    """Blocks of the teacher whose features are judged; empty is the family's own choice."""
    head_width: int = 64
    """Width of the discriminator's heads."""
    pictures: str | None = None
    """Folder of latents of pictures [N, C, 1, h, w] that show how frames are to look; empty takes the data's frames."""

    def __post_init__(self) -> None:
        if self.constant < 0 or not 0 <= self.cutoff <= 1 or not 0 <= self.motion_ema_decay < 1:
            raise ValueError("mcm.constant must be >= 0, mcm.cutoff in [0, 1] and mcm.motion_ema_decay in [0, 1)")
        if self.motion_width < 32 or self.motion_width % 32:
            raise ValueError(f"mcm.motion_width is {self.motion_width}; use a multiple of 32, for its 32 groups")
        if self.adversarial_weight < 0 or not 0 <= self.mixed_share <= 1:
            raise ValueError(
                f"mcm.adversarial_weight is {self.adversarial_weight} and mcm.mixed_share {self.mixed_share}; use a "
                "weight of 0 or more and a share from 0 to 1"
            )
        if self.frames < 1 or self.head_width < 1 or not 0 <= self.judged_times[0] <= self.judged_times[1] <= 1:
            raise ValueError(
                f"mcm.frames is {self.frames}, mcm.head_width {self.head_width} and mcm.judged_times "
                f"{self.judged_times}; use at least 1, at least 1, and 0 <= smallest <= largest <= 1"
            )
        if self.pictures is not None and self.adversarial_weight == 0:
            raise ValueError("mcm.pictures are for the discriminator: set mcm.adversarial_weight above 0")
