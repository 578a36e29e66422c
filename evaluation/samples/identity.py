"""What a pipeline folder is: a digest of its files that is quick for large ones, and the dtype of its weights."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

from fewstep.core.export.record import RECORD_FILE

NETWORKS = ("transformer", "unet")
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Files up to this are read whole; of larger ones so many blocks of a MB, evenly spaced, with both ends.
WHOLE = 64 * 2**20
BLOCK, BLOCKS = 2**20, 16


def pipeline_fingerprint(folder: str | Path) -> str:
    """A digest of the names, lengths and contents of the .json, .txt, .model and .safetensors files of a folder.

    Of files above 64 MB a sample is read: training changes all of a network's weights, so a tenth of a second stands
    for reading gigabytes. Records of evaluations do not enter.
    """
    place, total = Path(folder), hashlib.sha256()
    base = adapted_model(place)
    if base is not None:
        # Adapters are as much as what they sit on.
        total.update((pipeline_fingerprint(base) if Path(base).is_dir() else base).encode())
    for file in sorted(place.rglob("*")):
        wanted = file.suffix in (".json", ".txt", ".model", ".safetensors") and file.name != RECORD_FILE
        # The same weights again, for another program.
        wanted = wanted and file.relative_to(place).parts[0] != "comfyui"
        # The files of the hub's cache are links into it.
        if wanted and file.is_file():
            size = file.stat().st_size
            total.update(f"{file.relative_to(place)}\0{size}\n".encode())
            with file.open("rb") as stream:
                if size <= WHOLE:
                    total.update(stream.read())
                    continue
                for number in range(BLOCKS):
                    stream.seek((size - BLOCK) * number // (BLOCKS - 1))
                    total.update(stream.read(BLOCK))
    return total.hexdigest()


def adapted_model(folder: str | Path) -> str | None:
    """The model that a folder's adapters are for, a folder or a hub id; None where it holds a whole pipeline."""
    file = Path(folder) / RECORD_FILE
    if not file.is_file() or (Path(folder) / "model_index.json").is_file():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    return record["base_model"] if record.get("weights") == "lora" else None


def stored_dtype(folder: str | Path) -> str:
    """The dtype of most weights of a pipeline's network: "float32", "float16" or "bfloat16"; float32 where unclear.

    Read from the headers of its safetensors, which hold the dtype and shape of each tensor.
    """
    counts: dict[str, int] = {}
    for network in NETWORKS:
        for file in sorted((Path(folder) / network).glob("*.safetensors")):
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(length))
            for name, entry in header.items():
                if name != "__metadata__" and entry["dtype"] in DTYPES:
                    begin, end = entry["data_offsets"]
                    counts[entry["dtype"]] = counts.get(entry["dtype"], 0) + end - begin
    return DTYPES[max(counts, key=lambda name: counts[name])] if counts else "float32"
