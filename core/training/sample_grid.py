"""Grids of samples as PNG files.

Shapes: pixels [N, 3, H, W] in [0, 1]; a row is such a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MINIMUM_SIDE = 64
# Columns of a row of frames at most.
ROW_FRAMES = 13
_GAP = 2
_LABEL_MARGIN = 6


def save_grid(
    pixels: Tensor | Sequence[Tensor],
    path: str | Path,
    *,
    columns: int | None = None,
    labels: Sequence[str] | None = None,
) -> Path:
    """Write samples as one picture.

    `pixels` is [N, 3, H, W], cut into rows of `columns`, or a list of rows [n, 3, H, W] that may differ in n. Values
    outside [0, 1] are clipped. Pictures under 64 pixels are enlarged by a whole factor, each pixel staying a square.
    `labels` has one text per row. The same input always gives the same bytes.

    Raises:
        ValueError: other shapes, sizes that differ between rows, values that are not finite, a wrong count of labels.
    """
    rows = _split(pixels, columns)
    if labels is not None and len(labels) != len(rows):
        raise ValueError(f"labels: given {len(labels)} for {len(rows)} rows; give one per row")
    picture = Image.fromarray(arrange(rows).permute(1, 2, 0).numpy())
    if labels is not None:
        height = picture.height // len(rows)
        picture = _with_labels(picture, labels, row_height=height)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    picture.save(partial, format="PNG")
    partial.replace(path)
    return path


def frame_row(video: Tensor) -> Tensor:
    """Frames [n, 3, H, W] of a video [3, T, H, W], evenly spaced with first and last, at most `ROW_FRAMES`."""
    frames = video.shape[1]
    places = torch.linspace(0, frames - 1, min(frames, ROW_FRAMES)).round().long()
    return video[:, places].transpose(0, 1)


def arrange(rows: Sequence[Tensor]) -> Tensor:
    """Rows of pixels [n, 3, H, W] in [0, 1] as one uint8 picture [3, rows * cell, columns * cell], gaps in white."""
    _, _, height, width = rows[0].shape
    factor = max(1, -(-MINIMUM_SIDE // max(height, width)))
    cell_height, cell_width = height * factor + _GAP, width * factor + _GAP
    columns = max(row.shape[0] for row in rows)
    picture = torch.full((3, len(rows) * cell_height, columns * cell_width), 255, dtype=torch.uint8)
    for row_index, row in enumerate(rows):
        bytes_ = (row.detach().to("cpu", torch.float32).clamp(0, 1) * 255).round().to(torch.uint8)
        enlarged = bytes_.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
        for column, tile in enumerate(enlarged):
            top, left = row_index * cell_height, column * cell_width
            picture[:, top : top + height * factor, left : left + width * factor] = tile
    return picture


def _split(pixels: Tensor | Sequence[Tensor], columns: int | None) -> list[Tensor]:
    if isinstance(pixels, Tensor):
        columns = pixels.shape[0] if columns is None else columns
        if columns < 1:
            raise ValueError(f"columns: given {columns}, allowed is an integer >= 1")
        rows = list(pixels.split(columns))
    else:
        rows = list(pixels)
    if not rows or any(row.dim() != 4 or row.shape[0] < 1 or row.shape[1] != 3 for row in rows):
        raise ValueError(f"pixels: given shapes {[tuple(row.shape) for row in rows]}, allowed are rows [n, 3, H, W]")
    sizes = {tuple(row.shape[2:]) for row in rows}
    if len(sizes) > 1:
        raise ValueError(f"pixels: given sizes {sorted(sizes)}, allowed is one size for all rows")
    if not all(torch.isfinite(row).all() for row in rows):
        raise ValueError("pixels: some values are not finite; check the samples before drawing them")
    return rows


def _with_labels(picture: Image.Image, labels: Sequence[str], *, row_height: int) -> Image.Image:
    font = ImageFont.load_default()
    width = max(round(font.getlength(label)) for label in labels) + 2 * _LABEL_MARGIN
    labelled = Image.new("RGB", (width + picture.width, picture.height), "white")
    labelled.paste(picture, (width, 0))
    draw = ImageDraw.Draw(labelled)
    for row, label in enumerate(labels):
        draw.text((_LABEL_MARGIN, row * row_height + row_height // 2), label, fill="black", font=font, anchor="lm")
    return labelled
