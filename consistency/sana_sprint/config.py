"""Settings of SANA-Sprint. No torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fewstep.consistency.sections import ContinuousConfig
from fewstep.core.config import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class SprintConsistencyConfig(ContinuousConfig):
    """The half of SANA-Sprint that is sCM in TrigFlow."""

    weight: float = 1.0
    """Weight of the consistency loss."""
    learned_weight: bool = False
    """Fit a weight of time and guidance beside the student, as the paper does: exp(w) error / tan - w, with w linear in
    the network's own time embedding. It is trained with the student's optimizer settings. Without it the elements of a
    sample are summed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weight > 0:
            raise ValueError(f"weight: given {self.weight}, allowed is a number > 0; leave the section out for none")


@dataclass(frozen=True, kw_only=True)
class SprintDiscriminatorConfig:
    """The adversarial half of SANA-Sprint: heads on the features of the frozen teacher."""

    optimizer: OptimizerConfig
    """Optimizer of the heads."""
    weight: float = 0.5
    """Weight lambda of the adversarial loss beside the consistency loss."""
    max_time_share: float = 0.5
    """Share of samples whose adversarial branch starts from pure noise and not from the sampled time."""
    noise_mean: float = -0.6
    """Mean of log(tan of the angle times sigma_data) to which the discriminator's inputs are noised."""
    noise_std: float = 1.0
    """Standard deviation of it."""
    sigma_data: float = 0.5
    """The sigma_data for which these two are stated."""
    misaligned: bool = True
    """Whether real latents with the wrong prompt are shown to the discriminator as fakes."""
    head: Literal["mlp", "projected"] = "mlp"
    """Two layers on each position with one logit, or the paper's: StyleGAN-T's, with a logit at each position."""
    head_width: int = 64
    """Width of mlp heads."""
    blocks: tuple[int, ...] | None = None
    """Blocks of the teacher that the heads read; None is the family's own choice."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight: given {self.weight}, allowed is a number > 0; leave the section out for none")
        if not 0 <= self.max_time_share <= 1:
            raise ValueError(f"max_time_share: given {self.max_time_share}, allowed is a share from 0 to 1")
        if not (self.noise_std > 0 and self.sigma_data > 0 and self.head_width >= 1):
            raise ValueError(
                f"noise_std is {self.noise_std}, sigma_data {self.sigma_data} and head_width {self.head_width}; "
                "noise_std and sigma_data must be positive, head_width at least 1"
            )
        if self.head == "projected" and self.head_width != SprintDiscriminatorConfig.head_width:
            raise ValueError(f"head_width is {self.head_width}, which head 'projected' does not read: leave it out")


@dataclass(frozen=True, kw_only=True)
class SprintConfig:
    """SANA-Sprint (arXiv:2503.09641): sCM with guidance as an input, and a discriminator on the teacher's features.

    The paper's times (0, 1.6) are stated for sigma_data 1/2; for latents of variance one they are time_mean 0.693 and
    time_std 1.6. Both halves are sections of their own; one of them may be left out (the paper's ablations).
    """

    guidance_scales: tuple[float, ...] = (4.0, 4.5, 5.0)
    """Scales of guidance that the student is given; one is drawn for each sample, and the teacher is guided by it."""
    time_mean: float = -0.8
    """Mean of log tan of the angle at which the student is trained, which is log(t / (1 - t))."""
    time_std: float = 1.6
    """Standard deviation of it."""
    control: str | None = None
    """Folder of the latents of the pictures that a teacher with a ControlNet follows, row by row those of data.latents;
    sample grids then show the first rows of the data. Such a student has no guidance input: give one scale."""
    consistency: SprintConsistencyConfig | None = None
    """The consistency loss; leave it out for none."""
    discriminator: SprintDiscriminatorConfig | None = None
    """The adversarial loss; leave it out for none."""

    def __post_init__(self) -> None:
        if self.consistency is None and self.discriminator is None:
            raise ValueError(
                "neither the section consistency nor the section discriminator is there: nothing would be "
                "learnt; give both, or one of them"
            )
        if not self.guidance_scales or min(self.guidance_scales) < 1:
            raise ValueError(f"guidance_scales is {self.guidance_scales}; give scales of 1 or more, at least one")
        if not self.time_std > 0:
            raise ValueError(f"time_std: given {self.time_std}, allowed is a number > 0")
        if self.control is not None and len(self.guidance_scales) != 1:
            raise ValueError(
                f"guidance_scales is {self.guidance_scales} with a control: a student with a ControlNet has no "
                "guidance embedding, since its stock pipeline gives it none; give the one scale of its teacher"
            )
