"""The file of tiles that were measured, shared by the processes and runs of a machine.

It lies in $FEWSTEP_CACHE, or in fewstep in the user's folder of caches. A lock lets one process measure while the
others wait for what it finds; what cannot be read or written is measured anew, by each process for itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fewstep.kernels.tuning.table import TileConfig

FILE = "attention_tiles.json"


def winners_file() -> Path:
    """Where winners are kept."""
    own = os.environ.get("FEWSTEP_CACHE")
    if own:
        return Path(own) / FILE
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewstep" / FILE


def kept_winner(name: str, candidates: Sequence[TileConfig], measure: Callable[[], TileConfig]) -> TileConfig:
    """The winner that is kept by this name, or else what `measure` finds, which is then kept.

    A winner of other kernels or compilers than today's, or one that is no candidate, is measured anew.
    """
    path, name, winner = winners_file(), f"{name} | {made_by()}", None
    try:
        with locked(path):
            found = read(path).get(name)
            kept = next((tiles for tiles in candidates if asdict(tiles) == found), None)
            if kept is not None:
                return kept
            winner = measure()
            # Read again: others may have written by another way while this one measured.
            write(path, {**read(path), name: asdict(winner)})
            return winner
    except OSError as error:
        warnings.warn(
            f"{path} cannot be used, so that each process measures tiles of attention for itself ({error}); set "
            "FEWSTEP_CACHE to a folder that can be written",
            stacklevel=2,
        )
        # What was measured before the file failed holds all the same.
        return measure() if winner is None else winner


@cache
def made_by() -> str:
    """The compiler and the kernels that winners are of: another source has other winners."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).resolve().parents[1].rglob("*_triton.py")):
        digest.update(path.read_bytes())
    try:
        compiler = version("triton")
    except PackageNotFoundError:
        compiler = "unknown"
    return f"triton {compiler}, kernels {digest.hexdigest()[:12]}"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file that need not be there; where the system has no locks nobody waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("a") as file:
        try:
            import fcntl
        except ImportError:
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def read(path: Path) -> dict[str, Any]:
    """All winners; none where the file is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(path: Path, winners: Mapping[str, Any]) -> None:
    """Replace the file as a whole."""
    draft = path.with_suffix(f".{os.getpid()}.draft")
    draft.write_text(json.dumps(winners, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    draft.replace(path)
