"""Pictures of a report as PNG bytes: sample grids, quality against speed, training curves.

Shapes: pixels [K, 3, H, W] in [0, 1].
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, ScalarFormatter
from PIL import Image
from torch import Tensor

from fewstep.evaluation.curves import Curve
from fewstep.evaluation.results import MeasureKind, ReportRow

# Middle grey is readable on white and on near-black, so one picture serves light and dark pages.
INK = "#808890"
PALETTE = (
    *("#3b82c4", "#d9822b", "#3c9d6b", "#b8578f", "#8a6fd1", "#2aa5b5"),
    *("#c2453f", "#9a8a1f", "#5f7fa8", "#7a9e3a", "#a8683f", "#6b6f78"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
LARGEST_SHOWN = 1e100
TILE = 64
MAX_TILE = 256
GAP = 4


def grid_image(pixels: Tensor) -> bytes:
    """Images [K, 3, H, W] side by side as one PNG strip, small ones enlarged to 64 pixels without smoothing.

    Images wider than 256 pixels are reduced to that, because a page holds the whole strip.
    Raises ValueError for another shape or no image.
    """
    if pixels.ndim != 4 or pixels.shape[0] < 1 or pixels.shape[1] != 3:
        raise ValueError(f"pixels have shape {tuple(pixels.shape)}; a grid row needs [K, 3, H, W] with K >= 1")
    factor = max(1, TILE // pixels.shape[-1])
    large = F.interpolate(pixels.float(), scale_factor=factor, mode="nearest")
    if large.shape[-1] > MAX_TILE:
        size = (round(large.shape[-2] * MAX_TILE / large.shape[-1]), MAX_TILE)
        large = F.interpolate(large, size=size, mode="bilinear", antialias=True).clamp(0.0, 1.0)
    height, width = large.shape[-2:]
    # The fourth channel is opacity: gaps show the page.
    canvas = torch.zeros(height, len(large) * (width + GAP) - GAP, 4, dtype=torch.uint8)
    for column, image in enumerate(large):
        left = column * (width + GAP)
        canvas[:, left : left + width, :3] = (image * 255.0).round().to(torch.uint8).permute(1, 2, 0)
        canvas[:, left : left + width, 3] = 255
    stream = io.BytesIO()
    Image.fromarray(canvas.numpy(), mode="RGBA").save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def png_bytes(figure: Figure) -> bytes:
    """A figure as PNG with a clear background, the same bytes each time."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=160, transparent=True, bbox_inches="tight", metadata={"Software": None})
    return stream.getvalue()


def style_axes(axes: Axes, *, title: str = "", x: str = "", y: str = "") -> None:
    """The look that all figures share: small grey text, a light grid, two spines."""
    axes.set_title(title, color=INK, fontsize=9, loc="left")
    axes.set_xlabel(x, color=INK, fontsize=8)
    axes.set_ylabel(y, color=INK, fontsize=8)
    axes.tick_params(colors=INK, labelsize=7, which="both", length=2)
    axes.grid(visible=True, color=INK, alpha=0.2, linewidth=0.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)


def quality_figure(rows: Sequence[ReportRow], kind: MeasureKind) -> bytes | None:
    """A measure against seconds per image: a point per row with a whisker, and the floor; None without timing.

    The whisker is the 95 % interval of a single run, and the range over several.
    """
    timed = [row for row in rows if row.latency is not None and row.spread(kind.key) is not None]
    if not timed:
        return None
    figure = Figure(figsize=(6.4, 3.6))
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(row.name + row.guidance_text() for row in timed)):
        own = sorted((row for row in timed if row.name + row.guidance_text() == name), key=_seconds)
        seconds, reaches = [_seconds(row) for row in own], [_reach(row, kind) for row in own]
        color, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
        medians = [kind.scale * middle for _, middle, _ in reaches]
        below = [kind.scale * max(0.0, middle - low) for low, middle, _ in reaches]
        above = [kind.scale * max(0.0, high - middle) for _, middle, high in reaches]
        style = {"color": color, "linewidth": 1, "capsize": 3, "markersize": 5}
        axes.errorbar(seconds, medians, yerr=[below, above], fmt=f"{marker}-", label=name, **style)
        for row, x, y in zip(own, seconds, medians, strict=True):
            text = f"{row.steps} step{'' if row.steps == 1 else 's'}"
            axes.annotate(text, (x, y), xytext=(0, 8), textcoords="offset points", color=color, fontsize=7, ha="center")
    floors = [result.figures[kind.key].floor for row in timed for result in row.results]
    known = [floor * kind.scale for floor in floors if floor is not None]
    if known:
        axes.axhline(min(known), color=INK, linestyle="--", linewidth=1, label="real images")
    axes.set_xscale("log")
    if kind.lower_is_better and all(value > 0 for row in timed for value in _reach(row, kind)):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.margins(x=0.15, y=0.2)
    # Beside the axes, where twelve systems hide no point.
    axes.legend(fontsize=8, labelcolor=INK, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    direction = {True: ", lower is better", False: ", higher is better", None: ""}[kind.lower_is_better]
    style_axes(axes, x="seconds per image (log scale)", y=f"{kind.title}{direction}")
    return png_bytes(figure)


def _seconds(row: ReportRow) -> float:
    assert row.latency is not None
    return row.latency.seconds_per_image


def _reach(row: ReportRow, kind: MeasureKind) -> tuple[float, float, float]:
    """Lower end of the whisker, the median, and its upper end."""
    spread, between = row.spread(kind.key), row.interval(kind.key)
    assert spread is not None
    if between is None:
        return spread.minimum, spread.median, spread.maximum
    return between[0], spread.median, between[1]


def line_style(number: int) -> tuple[str, Literal["-", "--", ":"]]:
    """Colour and dashes of the line with that number: the colours come again with other dashes."""
    dashes: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")
    return PALETTE[number % len(PALETTE)], dashes[number // len(PALETTE) % 3]


def trade_off_figure(curves: Sequence[Curve], *, x: str, panels: Sequence[str]) -> bytes:
    """Along each run one measure against another, a panel per measure in `panels` over the measure `x` (log scale).

    Raises ValueError when a run lacks one of them.
    """
    values = {(curve.run, curve.metric): curve.values for curve in curves}
    runs = list(dict.fromkeys(curve.run for curve in curves))
    missing = [(run, name) for run in runs for name in (x, *panels) if (run, name) not in values]
    if missing:
        raise ValueError(f"no curve for {missing[0]}; give every run all of {x}, {', '.join(panels)}")
    figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False).flatten(), panels, strict=True):
        for number, run in enumerate(runs):
            color, dash = line_style(number)
            axes.plot(
                values[run, x], values[run, panel], f"o{dash}", color=color, markersize=3, linewidth=1.1, label=run
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(ScalarFormatter())
        style_axes(axes, title=panel, x=f"{x} (log scale)")
    figure.axes[0].legend(fontsize=7, labelcolor=INK, frameon=False)
    return png_bytes(figure)


def curves_figure(curves: Sequence[Curve], *, metrics: Sequence[str]) -> bytes:
    """One panel per metric, one line per run. Raises ValueError for no metrics."""
    if not metrics:
        raise ValueError("no metric to plot; choose_metrics found none with two points")
    columns = min(3, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    runs = list(dict.fromkeys(curve.run for curve in curves))
    for axes, metric in zip(panels, metrics, strict=False):
        for curve in curves:
            if curve.metric == metric:
                color, dash = line_style(runs.index(curve.run))
                # Axes have no ticks for the largest numbers there are: those are gaps as well.
                shown = [value if abs(value) < LARGEST_SHOWN else math.nan for value in curve.values]
                axes.plot(curve.steps, shown, dash, color=color, linewidth=1.1, label=curve.run)
        style_axes(axes, title=metric)
    for axes in panels[len(metrics) :]:
        axes.set_visible(False)
    if len(runs) > 1:
        # All of them, also those without this metric.
        styles = [(*line_style(number), run) for number, run in enumerate(runs)]
        lines = [Line2D([], [], color=color, linestyle=dash, label=run) for color, dash, run in styles]
        panels[0].legend(handles=lines, fontsize=7, labelcolor=INK, frameon=False)
    return png_bytes(figure)
