"""Features of many pictures: read a batch at a time, kept on disk, and found there again.

Shapes: pixels [B, 3, H, W] in [0, 1], features [N, D] in float32.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as vision
from tqdm import tqdm

from fewstep.core.media.pictures import fit_picture, open_picture

BATCH = 32


class Extractor(Protocol):
    """A network whose features are compared. `resize` makes pictures of one size of whatever comes, where `any_size`;
    `digest` tells weights of one name apart.
    """

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def num_features(self) -> int: ...
    @property
    def any_size(self) -> bool: ...
    def resize(self, pixels: Tensor) -> Tensor: ...
    def __call__(self, resized: Tensor) -> Tensor: ...


class Pictures(Dataset[Tensor]):
    """Picture files as pixels [3, H, W] in [0, 1]: at their own size, or covered and cut to `size` (height, width)."""

    def __init__(self, paths: Sequence[Path], *, size: tuple[int, int] | None = None) -> None:
        self.paths, self.size = list(paths), size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Tensor:
        picture = open_picture(self.paths[number])
        if self.size is None:
            return vision.to_tensor(picture)
        return fit_picture(picture, *self.size)


def batches(pictures: Dataset[Tensor], *, batch_size: int = BATCH, workers: int = 0) -> Iterator[list[Tensor]]:
    """Pictures in their order, a list per batch since sizes may differ; `workers` processes read ahead."""
    yield from DataLoader(pictures, batch_size=batch_size, num_workers=workers, collate_fn=list)


def extract_features(extractor: Extractor, pixels: Tensor, *, batch_size: int = 64) -> Tensor:
    """Features [N, D] in float32, on the CPU, of pixels [N, 3, H, W] in [0, 1] in memory.

    Raises ValueError for an empty set, another shape or range, and features that are not finite.
    """
    if pixels.ndim != 4 or pixels.shape[0] < 1 or pixels.shape[1] != 3:
        raise ValueError(f"pixels have shape {tuple(pixels.shape)}; features need [N, 3, H, W] with N >= 1")
    if pixels.min() < 0.0 or pixels.max() > 1.0:
        raise ValueError(f"pixels lie in [{pixels.min():.3g}, {pixels.max():.3g}]; features need [0, 1]")
    with torch.no_grad():
        return torch.cat([_features_of(extractor, list(part)) for part in pixels.split(batch_size)])


def picture_features(
    extractor: Extractor,
    paths: Sequence[Path],
    *,
    size: tuple[int, int] | None = None,
    cache: Path | None = None,
    key: str | None = None,
    workers: int = 0,
) -> Tensor:
    """Features [N, D] of picture files, from the folder `cache` where they were made before.

    A cached file is named after the extractor and its weights, `size`, and `key`, which tells the pictures apart (by
    default their paths, lengths and times of change).
    """
    name = _cache_name(extractor, key or fingerprint(paths), size)
    file = None if cache is None else cache / f"{name}.safetensors"
    known = _read(file, (len(paths), extractor.num_features))
    if known is not None:
        return known
    parts = []
    shown = tqdm(batches(Pictures(paths, size=size), workers=workers), total=-(-len(paths) // BATCH), unit="batch")
    shown.set_description("features")
    with torch.no_grad():
        for batch in shown:
            parts.append(_features_of(extractor, batch))
    features = torch.cat(parts)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        save_file({"features": features}, partial)
        partial.replace(file)
    return features


def fingerprint(paths: Sequence[Path]) -> str:
    """A digest of paths, lengths and times of change: other pictures in the same folder have another."""
    total = hashlib.sha256()
    for path in paths:
        found = path.stat()
        total.update(f"{path.absolute()}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    return total.hexdigest()


def cache_folder() -> Path:
    """Where features of reference pictures are kept: $FEWSTEP_CACHE, or fewstep in the user's folder of caches."""
    own = os.environ.get("FEWSTEP_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewstep"


def _features_of(extractor: Extractor, pictures: list[Tensor]) -> Tensor:
    device = _device_of(extractor)
    sizes = {tuple(picture.shape) for picture in pictures}
    if len(sizes) == 1:
        resized = extractor.resize(torch.stack(pictures).to(device))
    elif extractor.any_size:
        resized = torch.cat([extractor.resize(picture[None].to(device)) for picture in pictures])
    else:
        raise ValueError(f"pictures have {len(sizes)} sizes, and {extractor.name} takes one; cut them to one size")
    features = extractor(resized).float().cpu()
    if not features.isfinite().all():
        raise ValueError("features are not finite: the generated pixels or the weights of the extractor are broken")
    return features


def _device_of(extractor: Extractor) -> torch.device:
    assert isinstance(extractor, torch.nn.Module), "extractors are modules, so that they can be moved to a device"
    return next(extractor.parameters()).device


def _cache_name(extractor: Extractor, key: str, size: tuple[int, int] | None) -> str:
    assert isinstance(extractor, torch.nn.Module)
    kind = next(extractor.parameters()).dtype
    text = f"{extractor.name}\0{extractor.digest}\0{kind}\0{size}\0{key}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read(file: Path | None, shape: tuple[int, int]) -> Tensor | None:
    """Features of an earlier call, None where there are none or the file is broken: then they are made again."""
    if file is None or not file.is_file():
        return None
    try:
        features = load_file(file)["features"]
    except (SafetensorError, KeyError, OSError):
        return None
    return features if tuple(features.shape) == shape else None
