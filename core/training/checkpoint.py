"""Atomic checkpoints: a folder of safetensors files and one state.json, complete or not there at all.

A checkpoint is written to a hidden folder beside its place, flushed to disk and renamed, so a run that is killed at any
moment leaves either the new checkpoint or the previous ones. state.json holds the size and the SHA-256 of every file
and of itself; a damaged checkpoint is an error that names the file, never something that is skipped.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE_FILE = "state.json"
FORMAT = 1
_NAME = re.compile(r"checkpoint-\d+")
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: `tensors[file name][tensor name]`, on the CPU unless asked otherwise, and JSON state."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    directory: str | Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write `directory/checkpoint-<step>` and then delete all but the `keep` newest checkpoints.

    `tensors` maps a file name without suffix to its named tensors, `state` is anything JSON can hold (finite numbers).
    An existing checkpoint of the same step is replaced. Returns the path of the new checkpoint.

    Raises:
        OSError: the disk has too little room (checked before writing) or writing failed; older checkpoints are intact.
        ValueError: step < 0, keep < 1, a file name that is not a plain name, or state that JSON cannot hold.
    """
    _check_arguments(step, keep, tensors)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _clean(directory)
    try:
        state_bytes = len(json.dumps(state, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"state of checkpoint {step} is not JSON ({error}); give finite numbers, strings, lists"
        ) from error
    _check_space(directory, tensors, state_bytes)
    final, partial = directory / f"checkpoint-{step}", directory / f".checkpoint-{step}.partial"
    partial.mkdir()
    try:
        _write_files(partial, step, tensors, state)
    except (SafetensorError, OSError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        code = error.errno if isinstance(error, OSError) else errno.EIO
        message = (
            f"writing checkpoint {step} failed ({error}); older checkpoints are intact: free disk space and resume"
        )
        raise OSError(code, message, str(directory)) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _move_into_place(partial, final)
    for old in list_checkpoints(directory)[:-keep]:
        if old != final:
            shutil.rmtree(old)
    return final


def load_checkpoint(path: str | Path, *, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint after comparing every file with its recorded size and checksum.

    Raises:
        ValueError: a file is missing, truncated or changed; the message names it and the newest intact checkpoint.
    """
    path = Path(path)
    record = verify_checkpoint(path)
    tensors = {}
    for name in record["files"]:
        try:
            tensors[name.removesuffix(".safetensors")] = load_file(path / name, device=str(device))
        except SafetensorError as error:
            raise ValueError(_damaged(path, f"{name} is not a safetensors file ({error})")) from error
    return Checkpoint(step=record["step"], tensors=tensors, state=record["state"])


def verify_checkpoint(path: str | Path) -> dict[str, Any]:
    """Compare a checkpoint with its record and return the record (`step`, `files`, `state`).

    Raises:
        ValueError: it is no checkpoint, or it is damaged; the message says which earlier one is intact.
    """
    path = Path(path)
    problem = _find_problem(path)
    if problem is not None:
        raise ValueError(_damaged(path, problem))
    return json.loads((path / STATE_FILE).read_text(encoding="utf-8"))["record"]


def list_checkpoints(directory: str | Path) -> list[Path]:
    """All finished checkpoint folders of a run, oldest first; unfinished ones have a hidden name and are not listed."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), key=_step_of)


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The newest checkpoint of a run, or None when there is none.

    Raises:
        ValueError: the newest one is damaged; the message names the newest intact one, which must be chosen explicitly.
    """
    checkpoints = list_checkpoints(directory)
    if not checkpoints:
        return None
    verify_checkpoint(checkpoints[-1])
    return checkpoints[-1]


def find_resume(directory: str | Path, resume: str) -> Path:
    """The checkpoint that `--resume latest` or `--resume PATH` means.

    Raises:
        ValueError: there is none, the path is missing, or the checkpoint is damaged.
    """
    if resume == "latest":
        found = latest_checkpoint(directory)
        if found is None:
            raise ValueError(f"--resume latest: {directory} holds no checkpoint; leave --resume out to start a new run")
        return found
    path = Path(resume)
    if not path.is_dir():
        known = ", ".join(str(checkpoint) for checkpoint in list_checkpoints(directory)) or "none"
        raise ValueError(f"--resume {resume}: no such checkpoint; checkpoints of {directory}: {known}")
    verify_checkpoint(path)
    return path


def set_aside_newer(directory: str | Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step` to `checkpoint-<N>.abandoned`, so that none is taken for the latest.

    A run that goes on from an earlier checkpoint no longer leads to them. Returns their new paths.
    """
    moved = []
    for path in list_checkpoints(directory):
        if _step_of(path) <= step:
            continue
        target, count = path.with_name(f"{path.name}.abandoned"), 1
        while target.exists():
            count += 1
            target = path.with_name(f"{path.name}.abandoned-{count}")
        moved.append(path.rename(target))
    return moved


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _check_arguments(step: int, keep: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    if step < 0:
        raise ValueError(f"step of a checkpoint: given {step}, allowed is an integer >= 0")
    if keep < 1:
        raise ValueError(f"keep: given {keep}, allowed is an integer >= 1")
    for name in tensors:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise ValueError(f"file name of a checkpoint: given {name!r}, allowed are letters, digits and _ . -")


def _check_space(directory: Path, tensors: Mapping[str, Mapping[str, Tensor]], state_bytes: int) -> None:
    needed = state_bytes + (1 << 20)
    for group in tensors.values():
        needed += sum(tensor.numel() * tensor.element_size() + 256 for tensor in group.values())
    free = shutil.disk_usage(directory).free
    if free < needed:
        message = (
            f"a checkpoint needs {needed / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free; free some space, "
            "lower keep_checkpoints or choose another directory"
        )
        raise OSError(errno.ENOSPC, message, str(directory))


def _write_files(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> None:
    files = {}
    for name, group in tensors.items():
        path = folder / f"{name}.safetensors"
        save_file(_storable(group), path)
        _flush(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    record = {"format": FORMAT, "step": step, "files": files, "state": state}
    path = folder / STATE_FILE
    with path.open("w", encoding="utf-8") as file:
        json.dump({"sha256": _record_sha256(record), "record": record}, file, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    _flush(folder)


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors; one that shares memory with another (tied weights) becomes a copy of its own."""
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        address = value.untyped_storage().data_ptr()
        if address in seen:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        stored[name] = value
    return stored


def _move_into_place(partial: Path, final: Path) -> None:
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        os.rename(final, replaced)
    os.rename(partial, final)
    _flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _clean(directory: Path) -> None:
    """Remove what a killed run left: unfinished folders, and a replaced one whose successor is in place."""
    for path in directory.glob(".checkpoint-*.partial"):
        shutil.rmtree(path)
    for path in directory.glob(".checkpoint-*.replaced"):
        final = path.with_name(path.name.removeprefix(".").removesuffix(".replaced"))
        if final.exists():
            shutil.rmtree(path)
        else:
            os.rename(path, final)


def _find_problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words, or None."""
    if not path.is_dir():
        return "the folder does not exist"
    try:
        content = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        record, recorded = content["record"], content["sha256"]
        files = {name: (entry["size"], entry["sha256"]) for name, entry in record["files"].items()}
        found_format = record["format"]
    except FileNotFoundError:
        return f"{STATE_FILE} is missing"
    except (UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{STATE_FILE} cannot be read ({error.__class__.__name__}: {error})"
    if recorded != _record_sha256(record):
        return f"{STATE_FILE} does not match its checksum"
    if found_format != FORMAT:
        return f"{STATE_FILE} has format {found_format}, this version reads {FORMAT}"
    for name, (size, checksum) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if _sha256(file) != checksum:
            return f"{name} does not match its checksum"
    return None


def _damaged(path: Path, problem: str) -> str:
    others = [other for other in list_checkpoints(path.parent) if other.name != path.name]
    intact = next((other for other in reversed(others) if _find_problem(other) is None), None)
    advice = f"use --resume {intact}" if intact else "no other intact checkpoint is beside it: start a new run"
    return f"checkpoint {path} cannot be used: {problem}; {advice}"


def _record_sha256(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
