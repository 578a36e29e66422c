"""Features of files: any size, any batch, kept on disk, and never those of other pictures."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fewstep.evaluation.measures import features
from fewstep.evaluation.measures.features import cache_folder, extract_features, fingerprint, picture_features


class Means(nn.Module):
    """Means of the channels [B, 3], of pictures of any size or of one."""

    num_features = 3
    name, digest = "means", "0"

    def __init__(self, *, any_size: bool = True, scale: float = 1.0) -> None:
        super().__init__()
        self.any_size, self.calls = any_size, 0
        self.scale = nn.Parameter(torch.tensor(scale), requires_grad=False)

    def resize(self, pixels: Tensor) -> Tensor:
        return nn.functional.interpolate(pixels, (8, 8), mode="area") if self.any_size else pixels

    def forward(self, resized: Tensor) -> Tensor:
        self.calls += 1
        return resized.mean(dim=(2, 3)) * self.scale


def write_pictures(folder: Path, sizes: list[tuple[int, int]], *, seed: int = 0) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    generator, paths = np.random.default_rng(seed), []
    for number, (height, width) in enumerate(sizes):
        path = folder / f"{number}.png"
        Image.fromarray(generator.integers(0, 256, size=(height, width, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    return paths


def test_pictures_of_several_sizes_make_one_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_pictures(tmp_path, [(16, 16), (8, 24), (40, 40), (16, 16)])
    found = picture_features(Means(), paths)
    expected = torch.stack([torch.from_numpy(np.array(Image.open(path))).double().mean(dim=(0, 1)) for path in paths])
    torch.testing.assert_close(found.double(), expected / 255.0, rtol=0, atol=1e-3)
    monkeypatch.setattr(features, "BATCH", 1)
    assert torch.equal(picture_features(Means(), paths), found)
    assert torch.equal(picture_features(Means(), paths, workers=1), found)
    monkeypatch.setattr(features, "BATCH", 4)
    with pytest.raises(ValueError, match="have 3 sizes, and means takes one"):
        picture_features(Means(any_size=False), paths)
    cut = picture_features(Means(any_size=False), paths, size=(8, 8))
    assert cut.shape == (4, 3)


def test_features_are_kept_and_belong_to_their_pictures(tmp_path: Path) -> None:
    paths, cache = write_pictures(tmp_path / "a", [(8, 8)] * 3), tmp_path / "cache"
    extractor = Means()
    first = picture_features(extractor, paths, cache=cache)
    assert torch.equal(picture_features(extractor, paths, cache=cache), first)
    assert extractor.calls == 1
    # Another extractor, another size, and other pictures under the same names are other features.
    extractor.digest = "1"
    picture_features(extractor, paths, cache=cache)
    picture_features(extractor, paths, cache=cache, size=(4, 4))
    write_pictures(tmp_path / "a", [(8, 8)] * 3, seed=1)
    for path in paths:
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 5))
    changed = picture_features(extractor, paths, cache=cache)
    assert extractor.calls == 4
    assert (changed - first).abs().max() > 1e-3
    assert len(list(cache.iterdir())) == 4
    # A file that is no whole one is made again.
    for file in cache.iterdir():
        file.write_bytes(b"cut")
    assert torch.equal(picture_features(extractor, paths, cache=cache), changed)
    assert fingerprint(paths) != fingerprint(paths[:2])


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("FEWSTEP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/fewstep")


def test_bad_pixels_are_errors() -> None:
    with pytest.raises(ValueError, match=r"need \[0, 1\]"):
        extract_features(Means(), torch.full((2, 3, 4, 4), 1.5))
    with pytest.raises(ValueError, match=r"\(0, 3, 4, 4\)"):
        extract_features(Means(), torch.rand(0, 3, 4, 4))
    with pytest.raises(ValueError, match="not finite"):
        extract_features(Means(scale=math.nan), torch.rand(2, 3, 4, 4))
