"""The table of results: one header, rows of text, printed for a terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fewstep.evaluation.evaluate import Comparison
from fewstep.evaluation.measures.resampling import Difference
from fewstep.evaluation.results import MeasureKind, ReportRow, Spread

# Behind a figure of too few images, wherever it is shown.
MARK = "!"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is left-aligned, numbers are right-aligned."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"a row has {len(row)} cells for {len(self.header)} columns: {row}")

    def text(self) -> str:
        """Aligned ASCII for a terminal."""
        widths = [max(len(row[column]) for row in (self.header, *self.rows)) for column in range(len(self.header))]
        lines = [self._line(self.header, widths), "  ".join("-" * width for width in widths)]
        lines += [self._line(row, widths) for row in self.rows]
        return "\n".join(lines)

    @staticmethod
    def _line(row: Sequence[str], widths: Sequence[int]) -> str:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    def markdown(self) -> str:
        """A pipe table; pipes inside cells are escaped."""
        marks = (":---", *("---:",) * (len(self.header) - 1))
        lines = [self.header, marks, *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def number(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"


def spread_text(spread: Spread, *, digits: int, scale: float = 1.0) -> str:
    """The median, with the smallest and the largest value behind it where there are several."""
    median = number(spread.median * scale, digits)
    if spread.count == 1:
        return median
    return f"{median} [{number(spread.minimum * scale, digits)}, {number(spread.maximum * scale, digits)}]"


def cell(row: ReportRow, kind: MeasureKind) -> str:
    """A figure with its interval where there is one run, with the range over runs where there are several."""
    spread = row.spread(kind.key)
    if spread is None:
        return "-"
    text, between = spread_text(spread, digits=kind.digits, scale=kind.scale), row.interval(kind.key)
    if between is not None:
        low, high = (number(value * kind.scale, kind.digits) for value in between)
        text += f" [{low}, {high}]"
    warned = any(result.figures[kind.key].warnings for result in row.results if kind.key in result.figures)
    return f"{text} {MARK}" if warned else text


def difference_text(difference: Difference, kind: MeasureKind) -> str:
    """A difference with its sign and interval, and what it says: better, worse, or not told apart."""
    ends = (difference.value, difference.low, difference.high)
    # Plus zero, so that a small negative number is not printed as minus nothing.
    value, low, high = (f"{round(end * kind.scale, kind.digits) + 0.0:+.{kind.digits}f}" for end in ends)
    return f"{value} [{low}, {high}] {verdict(difference, kind)}"


def verdict(difference: Difference, kind: MeasureKind) -> str:
    """The word that an interval allows."""
    if not difference.decided:
        return "same within error"
    if kind.lower_is_better is None:
        return "lower" if difference.value < 0.0 else "higher"
    return "better" if (difference.value < 0.0) == kind.lower_is_better else "worse"


def seconds_text(seconds: float) -> str:
    """Seconds with three significant digits."""
    return f"{seconds:.3g}"


def results_table(comparison: Comparison) -> Table:
    """Real images first, then one row per system; speed-up is against the baseline."""
    has_speed = any(row.latency is not None for row in comparison.rows)
    header = ["system", "steps", "guidance", *(kind.title for kind in comparison.kinds)]
    header += ["s / image", "speed-up"] if has_speed else []
    header += ["samples", "seeds"]
    rows = [_real_row(comparison, has_speed=has_speed)]
    rows += [_row(row, comparison, has_speed=has_speed) for row in comparison.rows]
    return Table(tuple(header), tuple(rows))


def differences_table(comparison: Comparison) -> Table | None:
    """Each row minus the baseline, in pairs; None without intervals."""
    kinds = [kind for kind in comparison.kinds if any(kind.key in found for found in comparison.differences)]
    if not kinds:
        return None
    rows = [
        (row.label(), *(difference_text(found[kind.key], kind) if kind.key in found else "-" for kind in kinds))
        for row, found in zip(comparison.rows, comparison.differences, strict=True)
        if found
    ]
    return Table(("minus the baseline", *(kind.title for kind in kinds)), tuple(rows))


def _real_row(comparison: Comparison, *, has_speed: bool) -> tuple[str, ...]:
    """What real images have in the place of generated ones: the floor, or the ceiling."""
    first = comparison.rows[0].results[0]
    cells = ["real images", "-", "-"]
    for kind in comparison.kinds:
        floor = first.figures[kind.key].floor if kind.key in first.figures else None
        cells.append("-" if floor is None else number(floor * kind.scale, kind.digits))
    return (*cells, *["-"] * (2 * has_speed + 2))


def _row(row: ReportRow, comparison: Comparison, *, has_speed: bool) -> tuple[str, ...]:
    name = row.name + (f", {row.call}" if row.call else "")
    cells = [name, str(row.steps) if row.steps else "-", f"{row.guidance:g}" if row.steps else "-"]
    cells += [cell(row, kind) for kind in comparison.kinds]
    if has_speed:
        cells += _speed_cells(row, comparison.rows[comparison.baseline])
    return (*cells, str(row.results[0].samples), seeds_text([result.seed for result in row.results]))


def seeds_text(seeds: Sequence[int]) -> str:
    """Generation seeds; several training runs that were drawn with one seed show their number."""
    if len(seeds) > 1 and len(set(seeds)) == 1:
        return f"{seeds[0]} ({len(seeds)} runs)"
    return ", ".join(str(seed) for seed in seeds)


def _speed_cells(row: ReportRow, first: ReportRow) -> list[str]:
    if row.latency is None or first.latency is None:
        return ["-", "-"]
    ratio = first.latency.seconds_per_image / row.latency.seconds_per_image
    return [seconds_text(row.latency.seconds_per_image), f"{ratio:.1f}x"]
