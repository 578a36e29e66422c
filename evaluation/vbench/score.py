"""Scoring with VBench in its own environment: all is looked for first, then a process and a file per dimension."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.evaluation.samples.atomic import write_text
from fewstep.evaluation.vbench.constants import DIGESTS, DIMENSIONS, FILTER_WEIGHTS, FLICKERING, VIDEOS
from fewstep.evaluation.vbench.folder import missing_videos
from fewstep.evaluation.vbench.suite import Suite, Video, find_full_info

WORKER = Path(__file__).with_name("worker.py")
RESULTS, PROTOCOL = "results", "protocol.json"


@dataclass(frozen=True)
class Scoring:
    """What is scored and how.

    python: the interpreter of VBench's environment. cache: the folder of its weights (VBENCH_CACHE_DIR). root: where
    its prompts are, of VBench-Long a checkout. partial: score what is there although videos are missing; there is then
    no total. filtered: choose static videos for temporal_flickering by VBench's filter.
    """

    videos: Path
    output: Path
    python: str
    root: str
    cache: Path
    device: str = "cuda"
    count: int = VIDEOS
    partial: bool = False
    filtered: bool = True
    long: bool = False


def require_everything(scoring: Scoring, suite: Suite, dimensions: Sequence[str]) -> dict[str, str]:
    """Look for videos, weights and VBench itself, and give the digests of all weights by name.

    Raises ValueError that lists all that is missing, before anything is scored.
    """
    wrong: list[str] = []
    videos = _expected(scoring, suite, dimensions)
    if not scoring.partial:
        gone = missing_videos(scoring.videos, videos)
        if gone:
            wrong.append(f"{len(gone)} of {len(videos)} videos in {scoring.videos}, the first is {gone[0]!r}")
    digests = {}
    for name in _weights(scoring, dimensions):
        file = scoring.cache / name
        if not file.is_file():
            wrong.append(f"weights {file}")
            continue
        with file.open("rb") as stream:
            digests[name] = hashlib.file_digest(stream, "sha256").hexdigest()
        if not digests[name].startswith(DIGESTS.get(name, "")):
            wrong.append(f"{file} is another file: its SHA-256 is {digests[name]}, and starts with {DIGESTS[name]}")
    wrong += _broken_imports(scoring, dimensions)
    if scoring.long and not (find_full_info(scoring.root).parent.parent / "vbench2_beta_long").is_dir():
        wrong.append(f"{scoring.root} is no checkout of VBench with vbench2_beta_long, which VBench-Long needs")
    if wrong:
        raise ValueError("nothing was scored; missing are:\n  " + "\n  ".join(wrong))
    return digests


def _expected(scoring: Scoring, suite: Suite, dimensions: Sequence[str]) -> list[Video]:
    flickering = None if scoring.filtered else scoring.count
    extra = {} if flickering is None else {"flickering": flickering}
    return suite.videos(dimensions, count=scoring.count, **extra)


def _weights(scoring: Scoring, dimensions: Sequence[str]) -> list[str]:
    names = [name for dimension in dimensions for name in DIMENSIONS[dimension].weights]
    if FLICKERING in dimensions and scoring.filtered:
        names.append(FILTER_WEIGHTS)
    return list(dict.fromkeys(names))


def _broken_imports(scoring: Scoring, dimensions: Sequence[str]) -> list[str]:
    """What VBench's environment cannot import."""
    try:
        done = subprocess.run(
            [scoring.python, str(WORKER), "check"],
            env=_environment(scoring),
            input="\n".join(dimensions),
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        return [f"the interpreter {scoring.python} ({error}); make vbench-env makes one"]
    if done.returncode:
        return [f"VBench in {scoring.python}: {done.stderr.strip().splitlines()[-1:]}"]
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return [f"{name} in {scoring.python}: {reason}" for name, reason in found.items() if reason]


def score_suite(scoring: Scoring, suite: Suite, dimensions: Sequence[str]) -> Path:
    """Score the dimensions that have no result yet, one process each; returns the folder of results.

    Raises ValueError when anything is missing, and RuntimeError when a dimension fails; others are kept.
    """
    digests = require_everything(scoring, suite, dimensions)
    folder = scoring.output / RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    failures = []
    for dimension in dimensions:
        result = folder / f"{dimension}.json"
        if result.is_file():
            continue
        failure = _score_one(scoring, suite, dimension, result)
        if failure is not None:
            failures.append(f"{dimension}: {failure}")
    write_protocol(scoring, digests)
    if failures:
        raise RuntimeError("these dimensions failed, others are kept:\n  " + "\n  ".join(failures))
    return folder


def write_protocol(scoring: Scoring, digests: Mapping[str, str]) -> None:
    """Note how the scores came about, beside those of dimensions scored before."""
    file = scoring.output / PROTOCOL
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"weights": {}}
    known["weights"].update(digests)
    own = {"videos_per_prompt": scoring.count, "static_filter": scoring.filtered, "partial": scoring.partial}
    own |= {"suite": "VBench-Long" if scoring.long else "VBench", "processes": 1, "device": scoring.device}
    write_text(file, json.dumps({**known, **own}, indent=1) + "\n")


def _score_one(scoring: Scoring, suite: Suite, dimension: str, result: Path) -> str | None:
    """Run one dimension; an error message, or None."""
    info = scoring.output / "info" / f"{dimension}.json"
    names = {prompt: [f"{prompt}-{number}.mp4" for number in range(VIDEOS)] for prompt in suite.of_dimension(dimension)}
    if dimension == FLICKERING and scoring.filtered and not scoring.long:
        chosen = static_videos(scoring, suite)
        if isinstance(chosen, str):
            return chosen
        names = chosen
    entries = _entries(scoring, suite, dimension, names)
    write_text(info, json.dumps(entries, indent=1) + "\n")
    command = ["long" if scoring.long else "dimension", dimension, "--info", str(info), "--output", str(result)]
    return _run(scoring, [*command, "--videos", str(scoring.videos.resolve()), "--root", scoring.root])


def _entries(
    scoring: Scoring, suite: Suite, dimension: str, names: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """VBench's own entries of a dimension with the paths of the videos that are judged."""
    entries = []
    for entry in json.loads(suite.file.read_text(encoding="utf-8")):
        if dimension in entry["dimension"]:
            paths = [scoring.videos.resolve() / name for name in names.get(entry["prompt_en"], [])[: scoring.count]]
            entries.append({**entry, "video_list": [str(path) for path in paths if path.is_file()]})
    return entries


def static_videos(scoring: Scoring, suite: Suite) -> dict[str, list[str]] | str:
    """Up to five static videos of each prompt, the first ones, by VBench's filter; an error message if it fails.

    How many there were of each prompt is kept in static_filter.json: prompts with fewer count with what they have.
    """
    file = scoring.output / "static_filter.json"
    if not file.is_file():
        info = scoring.output / "info" / "static_filter.json"
        videos = [v for v in suite.videos([FLICKERING], count=1) if (scoring.videos / v.name).is_file()]
        paths = [str(scoring.videos.resolve() / video.name) for video in videos]
        write_text(info, json.dumps([{"video_list": paths}]) + "\n")
        failure = _run(scoring, ["filter", "--info", str(info), "--output", str(file)])
        if failure is not None:
            return failure
    static = json.loads(file.read_text(encoding="utf-8"))
    chosen: dict[str, list[str]] = {}
    for video in suite.videos([FLICKERING], count=1):
        if static.get(video.name) and len(chosen.get(video.prompt, [])) < VIDEOS:
            chosen.setdefault(video.prompt, []).append(video.name)
    return chosen


def _environment(scoring: Scoring) -> dict[str, str]:
    """Where VBench's weights are; this project's own paths must not lead the other interpreter to its packages."""
    found = {**os.environ, "VBENCH_CACHE_DIR": str(scoring.cache.resolve())}
    found.pop("PYTHONPATH", None)
    return found


def _run(scoring: Scoring, arguments: Sequence[str]) -> str | None:
    command = [scoring.python, str(WORKER), *arguments, "--device", scoring.device]
    done = subprocess.run(command, env=_environment(scoring), capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    return "\n    ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-4:])
