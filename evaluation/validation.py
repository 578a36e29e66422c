"""Settings of measures that are taken while a run goes on. No torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewstep.evaluation.scorers.settings import ScorerConfig, read_scorer


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Measures of the student's averaged weights while it trains; those of the best are kept in best/.

    Choosing by pictures is a kind of training on them: hold the final evaluation against others.
    """

    every: int
    """Measure every so many steps, and at the start and the end."""
    measures: tuple[str, ...] = ()
    """kid, fid, fd_dinov2, cmmd, prc, dc, or classes for the digits; kid serves few samples. The first figure decides
    which weights are best, or that of the first scorer where nothing stands here."""
    scorers: tuple[ScorerConfig, ...] = ()
    """Scorers of docs/rewards.md, a list as in a reward run."""
    samples: int = 256
    """Samples of each time, with the same prompts and noise."""
    batch_size: int = 16
    """Samples at a time on each process."""
    seed: int = 1
    """Of their noise; give final evaluations another one."""
    prompts: str | None = None
    """Their prompts, one a line; empty takes those of the run."""
    reference: str | None = None
    """Real pictures: a folder, an .npz of their statistics, or digits:train. Other ones than a final evaluation's."""
    inception: str | None = None
    """Weights of Inception, for fid, kid, prc and dc of own pictures."""
    dinov2: str | None = None
    """Folder of DINOv2, for fd_dinov2."""
    clip_vision: str | None = None
    """Folder of CLIP, for cmmd."""
    classifier: str | None = None
    """Folder of the digits classifier, for digits."""
    protocol: str = "clean"
    """How pictures become what Inception takes: clean, torch-fidelity, legacy-tensorflow or legacy-pytorch."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "scorers", tuple(read_scorer(entry) for entry in self.scorers))
        for name in ("every", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must be at least 0, and below 2^63")
        if not self.measures and not self.scorers:
            raise ValueError("nothing to measure: name measures, such as [kid], or scorers")
        for entry in self.scorers:
            if (entry.weight, entry.mean, entry.std) != (1.0, 0.0, 1.0):
                raise ValueError(
                    f"scorer {entry.name} has weight {entry.weight}, mean {entry.mean} and std {entry.std}: they are "
                    "for a reward, and each scorer is a figure of its own here; leave them out"
                )
        names = [*self.measures, *(entry.name for entry in self.scorers)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{twice[0]} is named twice; give each measure and scorer once")
        for name in ("prompts", "reference", "inception", "dinov2", "clip_vision", "classifier"):
            place = getattr(self, name)
            is_split = name == "reference" and str(place).partition(":")[0] == "digits"
            if place is not None and not is_split and not Path(place).exists():
                raise ValueError(f"{name} is {place}; there is no such file or folder")

    def identity(self) -> dict[str, Any]:
        """What the deciding figure depends on: under other values figures do not compare."""
        names = (
            "samples",
            "seed",
            "prompts",
            "reference",
            "inception",
            "dinov2",
            "clip_vision",
            "classifier",
            "protocol",
        )
        first = self.measures[0] if self.measures else asdict(self.scorers[0])
        return {"first": first, **{name: getattr(self, name) for name in names}}

    @property
    def weights(self) -> dict[str, str]:
        """Where weights of features are, by name."""
        found = {"inception": self.inception, "dinov2": self.dinov2, "clip_vision": self.clip_vision}
        return {name: place for name, place in found.items() if place is not None}
