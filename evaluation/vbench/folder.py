"""The folder of videos that VBench reads, made of links to a store, with a manifest of where each came from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from fewstep.evaluation.samples.atomic import link_file, write_text
from fewstep.evaluation.samples.store import SampleStore
from fewstep.evaluation.vbench.suite import Video

MANIFEST = "manifest.jsonl"


def write_folder(store: SampleStore, videos: Sequence[Video], *, extended: Mapping[str, str], output: Path) -> Path:
    """Link every video of a store under its name for VBench, which is the ORIGINAL prompt, and write the manifest.

    Nothing else may lie in the folder: VBench takes the ending of all files from the first it finds. Returns the
    folder.
    Raises ValueError when samples are missing, and for other files.
    """
    samples = store.require_indices([video.index for video in videos])
    output.mkdir(parents=True, exist_ok=True)
    expected = {video.name for video in videos}
    strangers = sorted(path.name for path in output.iterdir() if path.name not in expected)
    if strangers:
        raise ValueError(f"{output} holds {strangers[0]!r}, which is no video of this run; name an empty folder")
    lines = []
    for video, sample in zip(videos, samples, strict=True):
        target, source = output / video.name, (store.folder / sample.file).resolve()
        if not target.exists():
            link_file(source, target)
        record = {
            "file": video.name,
            "prompt": video.prompt,
            "asked": extended[video.prompt],
            "number": video.number,
            "index": video.index,
            "sha256": sample.sha256,
            **asdict(store.plan),
        }
        lines.append(json.dumps(record) + "\n")
    write_text(output.parent / f"{output.name}.{MANIFEST}", "".join(lines))
    return output


def missing_videos(folder: Path, videos: Sequence[Video]) -> list[str]:
    """Names of videos that are not there, or are empty."""
    return [
        video.name
        for video in videos
        if not (folder / video.name).is_file() or (folder / video.name).stat().st_size == 0
    ]
