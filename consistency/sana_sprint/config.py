"""Settings of SANA-Sprint beside those of sCM. No torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.core.config import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class SprintConfig:
    """The adversarial half of SANA-Sprint (arXiv:2503.09641) and its embedded guidance.

    The times of the sCM half are those of `ConsistencyLossConfig`, whose `time_mean` is the mean of log tan of an angle
    for data of variance one: SANA-Sprint's (0, 1.6), stated for sigma_data 1/2, is time_mean 0.693, time_std 1.6.
    """

    optimizer: OptimizerConfig
    """Optimizer of the discriminator's heads."""
    adversarial_weight: float = 0.5
    """Weight lambda of the adversarial loss beside the consistency loss; 0 trains without a discriminator."""
    consistency_weight: float = 1.0
    """Weight of the consistency loss; 0 leaves the adversarial loss alone (the paper's ablation)."""
    max_time_share: float = 0.5
    """Share of samples whose adversarial branch starts from pure noise and not from the sampled time."""
    guidance_scales: tuple[float, ...] = (4.0, 4.5, 5.0)
    """Scales of guidance that the student is told; one is drawn for each sample, and the teacher is guided by it."""
    noise_mean: float = -0.6
    """Mean of log(tan of the angle times sigma_data) to which the discriminator's inputs are noised."""
    noise_std: float = 1.0
    """Standard deviation of it."""
    sigma_data: float = 0.5
    """The sigma_data for which these two are stated."""
    misaligned: bool = True
    """Whether real latents with the wrong prompt are shown to the discriminator as fakes."""
    head_width: int = 64
    """Width of the discriminator's heads."""
    blocks: tuple[int, ...] | None = None
    """Blocks of the teacher that the heads read; None is the family's own choice."""
    control: str | None = None
    """Folder of the latents of the pictures that a teacher with a ControlNet follows, row by row those of data.latents;
    sample grids then show the first rows of the data. Such a student is told no guidance: give one scale."""

    def __post_init__(self) -> None:
        if min(self.adversarial_weight, self.consistency_weight) < 0 or not 0 <= self.max_time_share <= 1:
            raise ValueError(
                f"adversarial_weight is {self.adversarial_weight}, consistency_weight {self.consistency_weight} and "
                f"max_time_share {self.max_time_share}; use weights of 0 or more and a share from 0 to 1"
            )
        if self.adversarial_weight == self.consistency_weight == 0:
            raise ValueError("adversarial_weight and consistency_weight are both 0: nothing would be learnt")
        if not self.guidance_scales or min(self.guidance_scales) < 1:
            raise ValueError(f"guidance_scales is {self.guidance_scales}; give scales of 1 or more, at least one")
        if self.control is not None and len(self.guidance_scales) != 1:
            raise ValueError(
                f"guidance_scales is {self.guidance_scales} with a control: a student with a ControlNet has no "
                "guidance embedding, since its stock pipeline tells it none; give the one scale of its teacher"
            )
        if not (self.noise_std > 0 and self.sigma_data > 0 and self.head_width >= 1):
            raise ValueError("noise_std and sigma_data must be positive, head_width at least 1")
