"""Samples on disk: pictures or films with a manifest, made once by any number of processes, and scored at will.

A store is a folder:

    store.json                what is drawn: pipeline, call, seed, prompts
    manifest.jsonl            a line per finished sample, sorted
    manifest.<rank>.jsonl     lines of a process that are not merged yet
    0000/000000.png           a thousand samples per folder

A file is written under another name and renamed, and its line follows: whatever stands in a manifest is whole. A sample
without a line is made again. Samples are functions of their index, so a store may grow.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor

from fewstep.core.media.videos import write_film
from fewstep.evaluation.samples.atomic import write_text

STORE_FILE, MANIFEST = "store.json", "manifest.jsonl"
PER_FOLDER = 1000
# Of zlib: larger by a few per cent than 6, and written in a third of the time.
PNG_LEVEL = 2


@dataclass(frozen=True)
class SamplePlan:
    """What the samples of a store are. Two plans that differ in anything are different stores.

    `pipeline` is a name without the folders above it, `fingerprint` tells its files apart, `call` holds the arguments
    of the stock call, `prompts` is the digest of the list that sample i takes number i modulo its length of.
    """

    pipeline: str
    fingerprint: str
    call: dict[str, Any]
    dtype: str
    seed: int
    prompts: str
    kind: Literal["pictures", "videos"] = "pictures"
    rate: int | None = None


@dataclass(frozen=True)
class Sample:
    """A finished sample: its place in the store, its prompt, and digest and length of its file."""

    index: int
    file: str
    prompt: str
    sha256: str
    length: int


def prompts_digest(prompts: Sequence[str]) -> str:
    """The digest of a list of prompts in its order."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


class SampleStore:
    """The samples in `folder`, which is made, or continued if its plan is the same.

    Raises ValueError when the folder holds samples of another plan, naming the first difference, or other files.
    """

    def __init__(self, folder: str | Path, plan: SamplePlan) -> None:
        self.folder, self.plan = Path(folder), plan
        file = self.folder / STORE_FILE
        if file.is_file():
            self._require_same(_read_plan(file))
        elif self.folder.is_dir() and any(not path.name.startswith(".") for path in self.folder.iterdir()):
            raise ValueError(f"{self.folder} holds other files and no {STORE_FILE}; name a new folder for samples")
        else:
            write_text(file, json.dumps(asdict(plan), indent=1) + "\n")

    @classmethod
    def open(cls, folder: str | Path) -> SampleStore:
        """A store that is there. Raises ValueError when it is not."""
        file = Path(folder) / STORE_FILE
        if not file.is_file():
            raise ValueError(f"{folder} is no store of samples: it has no {STORE_FILE}")
        return cls(folder, SamplePlan(**_read_plan(file)))

    def _require_same(self, known: dict[str, Any]) -> None:
        own = json.loads(json.dumps(asdict(self.plan)))
        for key in sorted(own.keys() | known.keys()):
            if own.get(key) != known.get(key):
                raise ValueError(
                    f"{self.folder} holds samples with {key} = {known.get(key)!r}, and {own.get(key)!r} is asked for; "
                    "give another --output, or remove that folder"
                )

    def samples(self) -> dict[int, Sample]:
        """All finished samples by index whose files are there, and as long as they were."""
        found: dict[int, Sample] = {}
        for manifest in sorted(self.folder.glob("manifest*.jsonl")):
            for line in manifest.read_text(encoding="utf-8").split("\n"):
                try:
                    sample = Sample(**json.loads(line))
                except (ValueError, TypeError):
                    # An empty line, or the last one of a process that was killed in the middle of it.
                    continue
                file = self.folder / sample.file
                if file.is_file() and file.stat().st_size == sample.length:
                    found[sample.index] = sample
        return found

    def require(self, count: int) -> list[Sample]:
        """Samples 0 ... count - 1. Raises ValueError when some are missing."""
        return self.require_indices(range(count))

    def require_indices(self, indices: Sequence[int]) -> list[Sample]:
        """The samples of these indices. Raises ValueError when some are missing."""
        found = self.samples()
        missing = [index for index in indices if index not in found]
        if missing:
            raise ValueError(
                f"{self.folder} lacks {len(missing)} of {len(indices)} samples (the first is {missing[0]}); draw them "
                "first, by the same command"
            )
        return [found[index] for index in indices]

    def require_unchanged(self, samples: Sequence[Sample]) -> None:
        """Raises ValueError for a file that is another one than was drawn."""
        for sample in samples:
            with (self.folder / sample.file).open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != sample.sha256:
                    raise ValueError(
                        f"{self.folder / sample.file} was changed after it was drawn; delete it, and the same command "
                        "draws it again"
                    )

    def path(self, index: int) -> Path:
        """Where sample `index` lies."""
        suffix = ".png" if self.plan.kind == "pictures" else ".mp4"
        return self.folder / f"{index // PER_FOLDER:04d}" / f"{index:06d}{suffix}"

    def add(self, index: int, prompt: str, pixels: Tensor | Iterable[np.ndarray], *, rank: int = 0) -> None:
        """Write a picture [3, H, W] or a film [3, T, H, W] in [0, 1], and then its line.

        A film may also come as uint8 frames [H, W, 3] one by one, so that its length does not matter to memory.
        """
        target = self.path(index)
        target.parent.mkdir(parents=True, exist_ok=True)
        bytes_ = to_bytes(pixels) if isinstance(pixels, Tensor) else pixels
        if self.plan.kind == "pictures":
            assert isinstance(bytes_, np.ndarray)
            partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
            Image.fromarray(bytes_).save(partial, format="PNG", compress_level=PNG_LEVEL)
            partial.replace(target)
        else:
            assert self.plan.rate is not None, "stores of videos have a frame rate"
            write_film(bytes_, target, rate=self.plan.rate)
        with target.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        place, length = str(target.relative_to(self.folder)), target.stat().st_size
        line = json.dumps(asdict(Sample(index, place, prompt, digest, length)))
        with (self.folder / f"manifest.{rank}.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(("" if stream.tell() == 0 else "\n") + line)

    def merge(self) -> None:
        """Join the lines of all processes, sorted. One process calls it, when all have finished."""
        found = self.samples()
        lines = "".join(json.dumps(asdict(found[index])) + "\n" for index in sorted(found))
        write_text(self.folder / MANIFEST, lines)
        for part in self.folder.glob("manifest.*.jsonl"):
            part.unlink()


def _read_plan(file: Path) -> dict[str, Any]:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        SamplePlan(**known)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file} says no longer what the samples beside it are ({error}); remove that folder"
        ) from error
    return known


def to_bytes(pixels: Tensor) -> np.ndarray:
    """Pixels [3, H, W] or [3, T, H, W] in [0, 1] as uint8 [H, W, 3] or [T, H, W, 3].

    Raises ValueError for numbers that are not finite, which would become black or white.
    """
    if not bool(pixels.isfinite().all()):
        raise ValueError("a sample has pixels that are not finite: the pipeline's weights or its dtype are broken")
    bytes_ = (pixels.float().clamp(0.0, 1.0) * 255.0).round().byte().cpu()
    return bytes_.movedim(0, -1).contiguous().numpy()
