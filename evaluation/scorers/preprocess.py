"""Differentiable versions of the picture preprocessing of known scorers.

The libraries preprocess PIL images of 8 bits. Here the same resizing runs on floating tensors, so that gradients reach
the pixels: bicubic with antialias, which is PIL's filter. PIL rounds, and cuts what overshoots, after each of its two
passes; smooth 8-bit pictures differ by at most 1.5 / 255 from it, noise by up to 30 / 255 where it overshoots, by less
than 1 / 255 in the mean (`tests/evaluation/scorers/test_scorers_preprocess.py`).

Shapes: pixels [B, 3, H, W] in [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Fit = Literal["shortest", "longest", "squash"]


@dataclass(frozen=True)
class Preprocess:
    """How a scorer wants its pictures.

    `size` is (height, width). `fit` "shortest" scales the shorter side and crops the centre, "longest" scales the
    longer side and pads with black, "squash" ignores the aspect ratio. `mean` and `std` normalise the channels. Where
    the centre falls between two pixels, torchvision and open_clip crop from the even one, transformers from the lower
    (`crop_low`). Raises ValueError for another `fit`.
    """

    size: tuple[int, int]
    fit: Fit = "shortest"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    crop_low: bool = False

    def __post_init__(self) -> None:
        if self.fit not in ("shortest", "longest", "squash"):
            raise ValueError(f"fit is {self.fit!r}; use 'shortest', 'longest' or 'squash'")

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalised pictures [B, 3, *size] in fp32 (fp64 stays)."""
        pixels = pixels if pixels.element_size() == 8 else pixels.float()
        if self.fit == "squash":
            fitted = resize(pixels, self.size)
        elif self.fit == "shortest":
            resized = resize(pixels, _shortest_size(pixels, self.size))
            fitted = crop_or_pad_centre(resized, self.size, low=self.crop_low)
        else:
            fitted = crop_or_pad_centre(resize(pixels, _longest_size(pixels, self.size)), self.size)
        return normalise(fitted, mean=self.mean, std=self.std)


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic with antialias, clamped to [0, 1] as 8-bit pictures are. The same size is returned unchanged."""
    if tuple(pixels.shape[-2:]) == tuple(size):
        return pixels
    resized = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False, antialias=True)
    return resized.clamp(0.0, 1.0)


def normalise(pixels: Tensor, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(pixels - mean) / std per channel, [B, 3, H, W]."""
    return (pixels - pixels.new_tensor(mean).view(1, 3, 1, 1)) / pixels.new_tensor(std).view(1, 3, 1, 1)


def crop_or_pad_centre(pixels: Tensor, size: tuple[int, int], *, low: bool = False) -> Tensor:
    """Pad with 0 where smaller than `size`, cut where larger, both around the centre.

    An odd rest of padding goes right and below; an odd rest of the cut goes to the side that leaves an even start, or
    to the right and below with `low`.
    """
    missing = [max(0, wanted - given) for wanted, given in zip(size, pixels.shape[-2:], strict=True)]
    if any(missing):
        pixels = F.pad(
            pixels,
            (missing[1] // 2, missing[1] - missing[1] // 2, missing[0] // 2, missing[0] - missing[0] // 2),
        )
    rests = [given - wanted for given, wanted in zip(pixels.shape[-2:], size, strict=True)]
    # Python's round takes the even neighbour of a half.
    top, left = (rest // 2 if low else round(rest / 2.0) for rest in rests)
    return pixels[..., top : top + size[0], left : left + size[1]]


def fit_to_patches(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size (height, width) at which Qwen2-VL reads a picture (arXiv:2409.12191, section 2.1).

    Multiples of `factor` close to the given aspect ratio, with an area between `min_pixels` and `max_pixels`.
    """
    rows, columns = round(height / factor), round(width / factor)
    area = rows * columns * factor**2
    if area > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def _shortest_size(pixels: Tensor, size: tuple[int, int]) -> tuple[int, int]:
    """The size whose shorter side fits, its longer side rounded down."""
    if size[0] != size[1]:
        raise ValueError(f"size is {size}; fitting the shorter side needs a square, use 'squash' for others")
    height, width = pixels.shape[-2:]
    if height <= width:
        return size[0], int(size[0] * width / height)
    return int(size[1] * height / width), size[1]


def _longest_size(pixels: Tensor, size: tuple[int, int]) -> tuple[int, int]:
    """The size whose longer side fits, rounded."""
    height, width = pixels.shape[-2:]
    ratio = max(height / size[0], width / size[1])
    return round(height / ratio), round(width / ratio)
