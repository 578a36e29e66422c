"""Settings of SANA-Sprint beside those of sCM. No torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SprintConfig:
    """The adversarial half of SANA-Sprint (arXiv:2503.09641) and its embedded guidance.

    The times of the sCM half are those of `ConsistencyLossConfig`, whose `time_mean` is the mean of log tan of an angle
    for data of variance one: SANA-Sprint's (0, 1.6), stated for sigma_data 1/2, is time_mean 0.693, time_std 1.6.
    """

    adversarial_weight: float = 0.5
    """Weight lambda of the adversarial loss beside the consistency loss."""
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

    def __post_init__(self) -> None:
        if self.adversarial_weight < 0 or not 0 <= self.max_time_share <= 1:
            raise ValueError(
                f"adversarial_weight is {self.adversarial_weight} and max_time_share {self.max_time_share}; use a "
                "weight of 0 or more and a share from 0 to 1"
            )
        if not self.guidance_scales or min(self.guidance_scales) < 1:
            raise ValueError(f"guidance_scales is {self.guidance_scales}; give scales of 1 or more, at least one")
        if not (self.noise_std > 0 and self.sigma_data > 0 and self.head_width >= 1):
            raise ValueError("noise_std and sigma_data must be positive, head_width at least 1")
