"""VBench's prompts: which videos its dimensions need, how they are named, and where their numbers come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.evaluation.vbench.constants import DIMENSIONS, FLICKERING, FLICKERING_VIDEOS, VIDEOS

FULL_INFO = "VBench_full_info.json"
# Of file systems, in bytes.
LONGEST_NAME = 255


@dataclass(frozen=True)
class Video:
    """Video `number` of a prompt: `index` is its place in a store, `name` that of its file for VBench."""

    prompt: str
    number: int
    index: int

    @property
    def name(self) -> str:
        return f"{self.prompt}-{self.number}.mp4"


@dataclass(frozen=True)
class Suite:
    """The prompts of a VBench_full_info.json in their order, with the dimensions that each is for.

    The number of a video in a store follows from the prompt's place in this file and from its own number, so it is the
    same whatever dimensions are asked for.
    """

    file: Path
    prompts: tuple[str, ...]
    dimensions: dict[str, tuple[str, ...]]

    @classmethod
    def read(cls, root: str | Path) -> Suite:
        """From a checkout of VBench, the folder of the installed package, or the file itself.

        Raises ValueError when there is no such file, or when a prompt cannot be the name of a file.
        """
        file = find_full_info(root)
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))
            pairs = [(str(entry["prompt_en"]), [str(name) for name in entry["dimension"]]) for entry in entries]
            if not pairs:
                raise ValueError("it is empty")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no list of prompt_en and dimension: {error!r}") from error
        found: dict[str, list[str]] = {}
        for prompt, names in pairs:
            require_name(prompt)
            found.setdefault(prompt, []).extend(name for name in names if name not in found.get(prompt, ()))
        unknown = sorted({name for names in found.values() for name in names} - DIMENSIONS.keys())
        if unknown:
            raise ValueError(f"{file} has the dimension {unknown[0]!r}; known are {', '.join(DIMENSIONS)}")
        return cls(file, tuple(found), {prompt: tuple(names) for prompt, names in found.items()})

    def videos(
        self, dimensions: Sequence[str], *, count: int = VIDEOS, flickering: int = FLICKERING_VIDEOS
    ) -> list[Video]:
        """All videos that these dimensions need: `count` a prompt, and `flickering` where the static filter chooses.

        Raises ValueError for counts below 1 or above VBench's own.
        """
        if not 1 <= count <= VIDEOS or not 1 <= flickering <= FLICKERING_VIDEOS:
            raise ValueError(
                f"{count} videos a prompt and {flickering} for {FLICKERING}; VBench takes 1 to {VIDEOS}, and 1 to "
                f"{FLICKERING_VIDEOS}"
            )
        wanted = set(dimensions)
        found = []
        for place, prompt in enumerate(self.prompts):
            own = wanted & set(self.dimensions[prompt])
            if own:
                numbers = range(max(flickering if FLICKERING in own else 0, count if own - {FLICKERING} else 0))
                found += [Video(prompt, number, place * FLICKERING_VIDEOS + number) for number in numbers]
        return found

    def of_dimension(self, dimension: str) -> list[str]:
        """The prompts of a dimension, in their order."""
        return [prompt for prompt in self.prompts if dimension in self.dimensions[prompt]]


def find_full_info(root: str | Path) -> Path:
    """The file of prompts below a root. Raises ValueError when there is none."""
    place = Path(root)
    for file in (place, place / FULL_INFO, place / "vbench" / FULL_INFO):
        if file.is_file():
            return file
    raise ValueError(
        f"{place} has no {FULL_INFO}: give a checkout of github.com/Vchitect/VBench, or the folder of the installed "
        "package (make vbench-env prints it)"
    )


def require_name(prompt: str) -> None:
    """Raises ValueError unless a prompt can be a file's name, which VBench reads the prompt from."""
    bad = "/" in prompt or "\0" in prompt or prompt.strip() in ("", ".", "..") or prompt.startswith(".")
    if bad or len(f"{prompt}-{FLICKERING_VIDEOS}.mp4".encode()) > LONGEST_NAME:
        raise ValueError(
            f"the prompt {prompt[:60]!r} cannot be the name of a file: VBench's names are its prompts, without '/', "
            f"not hidden, and at most {LONGEST_NAME} bytes with '-24.mp4'"
        )


def parse_dimensions(text: str) -> list[str]:
    """Names from "all", or from a list with commas, in VBench's order. Raises ValueError for unknown ones."""
    if text == "all":
        return list(DIMENSIONS)
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in DIMENSIONS]
    if unknown or not names:
        raise ValueError(
            f"dimension {(unknown or [text])[0]!r} is unknown; use all, or some of {', '.join(DIMENSIONS)}"
        )
    return [name for name in DIMENSIONS if name in names]


def read_extended(file: str | Path | None, prompts: Sequence[str]) -> dict[str, str]:
    """What the pipeline is asked in place of each prompt: lines of JSON with `prompt` and `extended`, or a text file
    with as many lines as there are prompts, in their order. None: the prompts themselves.

    Raises ValueError when a prompt has no text of its own.
    """
    if file is None:
        return {prompt: prompt for prompt in prompts}
    place = Path(file)
    if not place.is_file():
        raise ValueError(f"there is no file {place} of extended prompts")
    lines = [line for line in place.read_text(encoding="utf-8").split("\n") if line.strip()]
    if place.suffix == ".jsonl":
        try:
            pairs = [(record["prompt"], record["extended"]) for record in map(json.loads, lines)]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{place} needs lines of JSON with prompt and extended: {error!r}") from error
        found = dict(pairs)
    else:
        if len(lines) != len(prompts):
            raise ValueError(
                f"{place} has {len(lines)} lines for {len(prompts)} prompts; give one each, in that of {FULL_INFO}, or "
                "lines of JSON with prompt and extended"
            )
        found = dict(zip(prompts, lines, strict=True))
    missing = [prompt for prompt in prompts if not str(found.get(prompt, "")).strip()]
    if missing:
        raise ValueError(f"{place} has no extended text for {len(missing)} prompts, the first is {missing[0]!r}")
    return {prompt: str(found[prompt]) for prompt in prompts}
