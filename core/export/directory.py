"""The directory of an export: checked before the work, complete or not there at all, without names of machines."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.export.record import RECORD_FILE

NAME_KEYS = ("_name_or_path", "name_or_path")


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise before any work when an export cannot be written to `output`.

    Raises:
        FileExistsError: something is there and `overwrite` is false.
        ValueError: what is there is no export.
    """
    if not output.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{output} exists. Give another directory, or overwrite=True (--overwrite) to replace.")
    is_export = output.is_dir() and ((output / RECORD_FILE).is_file() or not any(output.iterdir()))
    if not is_export:
        raise ValueError(
            f"{output} is no export (it has no {RECORD_FILE}), so it is not overwritten. Remove it yourself."
        )


def check_finite(tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Raise ValueError for a weight that is not finite in the dtype of the export."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(
                f"weight {name} is not finite as {dtype}. Check the checkpoint, or export with a wider dtype."
            )


def remove_machine_names(draft: Path, name: str) -> None:
    """Replace the paths that diffusers and transformers note in their configurations by the name of the teacher."""
    for file in draft.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        found = [key for key in NAME_KEYS if isinstance(content, dict) and content.get(key)]
        if found:
            content.update(dict.fromkeys(found, name))
            file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """A draft beside `output` that takes its place when the block ends without an error, and vanishes otherwise."""
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    # mkdtemp makes it private, an export is as readable as any file of its owner
    draft.chmod(0o755)
    try:
        yield draft
        if output.exists():
            retired = draft.with_name(f"{draft.name}.old")
            output.rename(retired)
            draft.rename(output)
            shutil.rmtree(retired)
        else:
            draft.rename(output)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
