"""Settings of scorers in training runs. No torch here, so that `--help` is quick."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """One scorer: weight * (score - mean) / std enters the reward, with the sign that makes higher better."""

    name: str
    """A name of docs/rewards.md, such as digit_log_probability."""
    weight: float = 1.0
    """Factor in the sum."""
    weights: str | None = None
    """Folder or file of its weights, or the address of a remote scorer."""
    clip: str | None = None
    """The CLIP under the aesthetic head."""
    model: str | None = None
    """open_clip architecture of a bare file."""
    frames: float | None = None
    """Share of the best frames that counts where a scorer of pictures judges videos; empty is all."""
    mean: float = 0.0
    """Subtracted from the score."""
    std: float = 1.0
    """Divides the score."""
    prompt_prefix: str | None = None
    """Text before each prompt that it is shown, with a blank between them; empty is none."""

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"scorer {self.name}: std is {self.std}; it must be above 0")
        if not math.isfinite(self.weight) or self.weight == 0 or not math.isfinite(self.mean):
            raise ValueError(
                f"scorer {self.name}: weight is {self.weight} and mean {self.mean}; give finite numbers, and a weight "
                "other than 0"
            )
        if self.prompt_prefix is not None and not self.prompt_prefix.strip():
            raise ValueError(f"scorer {self.name}: prompt_prefix is blank; give a text, or leave it out")


@dataclass(frozen=True, kw_only=True)
class ScorerListConfig:
    """What is rewarded."""

    scorers: tuple[ScorerConfig, ...]
    """The trained reward: a list of scorers with their weights."""
    chunk: int | None = None
    """Samples scored at a time, and decoded where a reward's own gradient is followed; empty is the whole slice."""

    def __post_init__(self) -> None:
        # The reader of YAML hands entries of a list over as its own namespaces.
        object.__setattr__(self, "scorers", tuple(read_scorer(entry) for entry in self.scorers))
        if not self.scorers:
            raise ValueError("scorers is empty; name at least one scorer")
        names = [entry.name for entry in self.scorers]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"scorers names {twice[0]} twice, and each is logged by its name: give each once")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk is {self.chunk}; it must be at least 1, or empty for the whole slice")


def read_scorer(entry: Any) -> ScorerConfig:
    """A scorer as the reader of YAML hands it over: itself, a mapping, or a namespace."""
    if isinstance(entry, ScorerConfig):
        return entry
    values = dict(entry if isinstance(entry, Mapping) else vars(entry))
    # In a section that may be left out, the reader names the class beside the values.
    values = values.get("init_args", values)
    return ScorerConfig(**(values if isinstance(values, Mapping) else vars(values)))
