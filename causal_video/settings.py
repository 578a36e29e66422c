"""What must be known beside the weights to run a causal video student, and its file.

The weights are an ordinary Wan transformer; without these numbers they are not usable as a student.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.policy import CachePolicy
from fewstep.causal_video.schedule import StepSchedule

FILE_NAME = "causal_video.json"
FORMAT = 1
# Of networks of one time, and those of `core.two_time` that Wan can have.
SecondTime = Literal["none", "gate", "sum"]
# Frames per second at which Wan's videos are shown.
STOCK_RATE = 16


@dataclass(frozen=True)
class StreamDefaults:
    """What a stream is opened with when nothing else is said; the part "stream" of the file.

    Attributes:
        height: pixels the student was trained at; None is Wan's own size.
        width: the same.
        frames_per_second: at which videos are shown.
        actions: name of each conditioning channel of a student that is steered, see `world.ActionSpace`.

    Raises:
        ValueError: a number below 1, or one side without the other.
    """

    height: int | None = None
    width: int | None = None
    frames_per_second: int = STOCK_RATE
    actions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sides = [side for side in (self.height, self.width) if side is not None]
        if len(sides) == 1 or min([*sides, self.frames_per_second]) < 1:
            raise ValueError(f"{self}: give height and width, or neither, and numbers from 1 on")
        object.__setattr__(self, "actions", tuple(self.actions))


@dataclass(frozen=True)
class CausalSettings:
    """One object for masks, rollouts, streaming and evaluation.

    Attributes:
        layout: chunks of the training videos.
        policy: what a chunk sees of earlier ones.
        schedule: times of each chunk.
        second_time: how the network is told where a step ends (`core.two_time`); such a flow map jumps from time to
            time, where a network of one time ("none") predicts the end and is noised afresh.

    Raises:
        ValueError: the policy does not fit the layout, or a flow map has noisy context.
    """

    layout: ChunkLayout
    policy: CachePolicy = field(default_factory=CachePolicy)
    schedule: StepSchedule = field(default_factory=lambda: StepSchedule.steps([4, 2]))
    second_time: SecondTime = "none"

    def __post_init__(self) -> None:
        self.policy.chunk_window(self.layout)
        if self.second_time not in get_args(SecondTime):
            raise ValueError(f"second_time is {self.second_time!r}; choose of {', '.join(get_args(SecondTime))}")
        if self.second_time != "none" and self.policy.noisy_from is not None:
            raise ValueError(
                f"noisy_from {self.policy.noisy_from} with second_time {self.second_time!r}: the last call of a flow "
                "map is told to end at 0, and its keys are not those of a context; leave noisy_from out"
            )

    @property
    def text(self) -> str:
        """Chunks and the times of each, in words."""
        times = "; ".join(", ".join(f"{t:.6g}" for t in each) for each in self.schedule.times)
        return f"chunks of {list(self.layout.lengths)} latent frames at t = {times} (the last one repeats)"

    def save(
        self, directory: str | Path, defaults: StreamDefaults | None = None, *, time_smoothing: float = 0.0
    ) -> Path:
        """Write `causal_video.json` beside the weights, with what streams are opened with if given; gives its path.

        `time_smoothing` is what is in the weights (`core.tangents.smooth`), for a stage that goes on from them.
        """
        content: dict[str, Any] = {
            "format": FORMAT,
            "layout": list(self.layout.lengths),
            "policy": asdict(self.policy),
            "times": [list(times) for times in self.schedule.times],
        }
        if self.second_time != "none":
            content["second_time"] = self.second_time
        if time_smoothing > 0:
            content["time_smoothing"] = time_smoothing
        if defaults is not None:
            content["stream"] = asdict(defaults)
        path = Path(directory) / FILE_NAME
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, directory: str | Path) -> CausalSettings:
        """Read what `save` wrote.

        Raises:
            ValueError: there is no such file, or keys are missing, unknown, or of another format.
        """
        content = read_file(Path(directory) / FILE_NAME)
        return cls(
            ChunkLayout(tuple(content["layout"])),
            CachePolicy(**content["policy"]),
            StepSchedule(tuple(tuple(times) for times in content["times"])),
            content.get("second_time", "none"),
        )


def load_defaults(directory: str | Path) -> StreamDefaults:
    """What streams of an export are opened with. Raises ValueError as `CausalSettings.load`."""
    return StreamDefaults(**read_file(Path(directory) / FILE_NAME).get("stream", {}))


def read_file(path: Path) -> dict[str, Any]:
    """The checked content of `causal_video.json`. Raises ValueError as `CausalSettings.load`."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: the directory holds no causal video student")
    content = json.loads(path.read_text(encoding="utf-8"))
    known = {"format", "layout", "policy", "times"}
    policy_fields = {f.name for f in fields(CachePolicy)}
    stream_fields = {f.name for f in fields(StreamDefaults)}
    is_known = (
        set(content) - {"stream", "second_time", "time_smoothing"} == known
        and set(content.get("stream", stream_fields)) == stream_fields
    )
    if not is_known or content["format"] != FORMAT or set(content["policy"]) != policy_fields:
        raise ValueError(
            f"{path} is no file of format {FORMAT}: it needs the keys {sorted(known)}, in `policy` "
            f"{sorted(policy_fields)}, and in `stream`, where there is one, {sorted(stream_fields)}"
        )
    return content
