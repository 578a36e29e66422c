"""What must be known beside the weights to run a causal video student, and its file.

The weights are an ordinary Wan transformer; without these numbers they are not usable as a student.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.policy import CachePolicy
from fewstep.causal_video.schedule import StepSchedule

FILE_NAME = "causal_video.json"
FORMAT = 1


@dataclass(frozen=True)
class CausalSettings:
    """One object for masks, rollouts, streaming and evaluation.

    Raises:
        ValueError: the policy does not fit the layout.
    """

    layout: ChunkLayout
    policy: CachePolicy = field(default_factory=CachePolicy)
    schedule: StepSchedule = field(default_factory=lambda: StepSchedule.steps([4, 2]))

    def __post_init__(self) -> None:
        self.policy.chunk_window(self.layout)

    def save(self, directory: str | Path) -> Path:
        """Write `causal_video.json` beside the weights; gives its path."""
        content = {
            "format": FORMAT,
            "layout": list(self.layout.lengths),
            "policy": asdict(self.policy),
            "times": [list(times) for times in self.schedule.times],
        }
        path = Path(directory) / FILE_NAME
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, directory: str | Path) -> CausalSettings:
        """Read what `save` wrote.

        Raises:
            ValueError: there is no such file, or keys are missing, unknown, or of another format.
        """
        path = Path(directory) / FILE_NAME
        if not path.is_file():
            raise ValueError(f"{path} does not exist: the directory holds no causal video student")
        content = json.loads(path.read_text(encoding="utf-8"))
        known = {"format", "layout", "policy", "times"}
        policy_fields = {f.name for f in fields(CachePolicy)}
        if set(content) != known or content["format"] != FORMAT or set(content["policy"]) != policy_fields:
            raise ValueError(
                f"{path} is no file of format {FORMAT}: it needs the keys {sorted(known)}, and in `policy` "
                f"{sorted(policy_fields)}"
            )
        return cls(
            ChunkLayout(tuple(content["layout"])),
            CachePolicy(**content["policy"]),
            StepSchedule(tuple(tuple(times) for times in content["times"])),
        )
