"""Folders of pictures as the judges of GenEval, DPG-Bench and T2I-CompBench read them, from a store of samples.

Their judges run elsewhere, in environments of their own; what they need is prompts, counts and names.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fewstep.core.media.pictures import natural_order, open_picture
from fewstep.evaluation.samples.atomic import link_file, write_text
from fewstep.evaluation.samples.store import SampleStore

LONGEST_NAME = 255


@dataclass(frozen=True)
class PictureSuite:
    """What a benchmark asks: prompt p has `count` pictures, of which number n is sample p * count + n of a store.

    `records` are what is kept of each prompt beside its text: GenEval's metadata, or DPG-Bench's file name.
    """

    kind: str
    prompts: tuple[str, ...]
    count: int
    records: tuple[Any, ...] = field(repr=False)

    @property
    def asked(self) -> tuple[str, ...]:
        """The prompt of each sample."""
        return tuple(prompt for prompt in self.prompts for _ in range(self.count))


def read_suite(kind: str, place: str | Path, *, count: int | None = None) -> PictureSuite:
    """Prompts of a benchmark: `geneval` from evaluation_metadata.jsonl, `dpg` from its folder of .txt files,
    `t2i_compbench` from one of its lists, a prompt a line.

    `count` None is what the benchmark asks for: 4, 4 and 10. Raises ValueError for an unknown benchmark, and for files
    that are not its prompts.
    """
    if kind not in SUITES:
        raise ValueError(f"suite {kind!r} is unknown; known are {', '.join(SUITES)}")
    reader, _, own = SUITES[kind]
    chosen = own if count is None else count
    if chosen < 1 or (kind == "dpg" and chosen != own):
        raise ValueError(f"count is {chosen}; use at least 1, and for dpg the {own} pictures of its grids")
    if not Path(place).exists():
        raise ValueError(f"there is no {place} with the prompts of {kind}")
    pairs = reader(Path(place))
    if not pairs:
        raise ValueError(f"{place} holds no prompts of {kind}")
    return PictureSuite(kind, tuple(prompt for prompt, _ in pairs), chosen, tuple(record for _, record in pairs))


def write_suite(suite: PictureSuite, store: SampleStore, output: str | Path) -> Path:
    """Write the benchmark's folder anew, in place of an earlier one. Raises ValueError for missing samples."""
    final = Path(output)
    samples = store.require(len(suite.asked))
    files = [store.folder / sample.file for sample in samples]
    target = final.with_name(f".{final.name}.draft")
    shutil.rmtree(target, ignore_errors=True)
    for number, (prompt, record) in enumerate(zip(suite.prompts, suite.records, strict=True)):
        own = files[number * suite.count : (number + 1) * suite.count]
        SUITES[suite.kind][1](target, number, prompt, record, own)
    shutil.rmtree(final, ignore_errors=True)
    target.rename(final)
    return final


def _read_geneval(place: Path) -> list[tuple[str, Any]]:
    pairs = []
    for number, line in enumerate(place.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            pairs.append((str(record["prompt"]), record))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{place} line {number} is no metadata of GenEval with a prompt: {error!r}") from error
    return pairs


def _write_geneval(target: Path, number: int, prompt: str, record: Any, files: Sequence[Path]) -> None:
    """00000/metadata.jsonl, one object, and 00000/samples/0000.png."""
    folder = target / f"{number:05d}"
    write_text(folder / "metadata.jsonl", json.dumps(record) + "\n")
    for place, file in enumerate(files):
        link_file(file, folder / "samples" / f"{place:04d}.png")


def _read_dpg(place: Path) -> list[tuple[str, Any]]:
    if not place.is_dir():
        raise ValueError(f"{place} is no folder; DPG-Bench has a .txt file for each prompt")
    files = sorted(place.glob("*.txt"), key=lambda path: natural_order(path.name))
    return [(" ".join(file.read_text(encoding="utf-8").split()), file.stem) for file in files]


def _write_dpg(target: Path, number: int, prompt: str, record: Any, files: Sequence[Path]) -> None:
    """One picture of two by two, named like the prompt's file."""
    tiles = [np.asarray(open_picture(file)) for file in files]
    grid = np.concatenate([np.concatenate(tiles[:2], axis=1), np.concatenate(tiles[2:], axis=1)], axis=0)
    file = target / f"{record}.png"
    target.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid).save(file, format="PNG")


def _read_compbench(place: Path) -> list[tuple[str, Any]]:
    prompts = [line.strip() for line in place.read_text(encoding="utf-8").splitlines() if line.strip()]
    for prompt in prompts:
        name = f"{prompt}_000000.png"
        if "/" in prompt or "\0" in prompt or prompt.startswith(".") or len(name.encode()) > LONGEST_NAME:
            raise ValueError(
                f"the prompt {prompt[:60]!r} cannot be the name of a file, which T2I-CompBench reads it from"
            )
    return [(prompt, None) for prompt in prompts]


def _write_compbench(target: Path, number: int, prompt: str, record: Any, files: Sequence[Path]) -> None:
    """samples/PROMPT_000000.png, numbered through all prompts."""
    for place, file in enumerate(files):
        link_file(file, target / "samples" / f"{prompt}_{number * len(files) + place:06d}.png")


Reader = Callable[[Path], list[tuple[str, Any]]]
Writer = Callable[[Path, int, str, Any, Sequence[Path]], None]
SUITES: dict[str, tuple[Reader, Writer, int]] = {
    "geneval": (_read_geneval, _write_geneval, 4),
    "dpg": (_read_dpg, _write_dpg, 4),
    "t2i_compbench": (_read_compbench, _write_compbench, 10),
}
