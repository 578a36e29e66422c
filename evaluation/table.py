"""The table of results: one header, rows of text, printed for a terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fewstep.evaluation.evaluate import Comparison
from fewstep.evaluation.results import ReportRow, Spread


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
    return f"{value:.{digits}f}"


def spread_text(spread: Spread, *, digits: int, scale: float = 1.0) -> str:
    """The median, with the smallest and the largest value behind it where there are several."""
    median = number(spread.median * scale, digits)
    if spread.count == 1:
        return median
    return f"{median} [{number(spread.minimum * scale, digits)}, {number(spread.maximum * scale, digits)}]"


def seconds_text(seconds: float) -> str:
    """Seconds with three significant digits."""
    return f"{seconds:.3g}"


def results_table(comparison: Comparison) -> Table:
    """Real images first, then one row per system; speed-up is against the first system."""
    has_clip = any(row.clip() is not None for row in comparison.rows)
    has_speed = any(row.latency is not None for row in comparison.rows)
    header = ["system", "steps", "guidance", "FID", "FID floor", "KID"]
    header += [] if comparison.reference_accuracy is None else ["accuracy %", "diversity"]
    header += ["CLIP score"] if has_clip else []
    header += ["s / image", "speed-up"] if has_speed else []
    header += ["samples", "seeds"]
    rows = [_real_row(comparison, has_clip=has_clip, has_speed=has_speed)]
    rows += [_row(row, comparison.rows[0], has_clip=has_clip, has_speed=has_speed) for row in comparison.rows]
    return Table(tuple(header), tuple(rows))


def _real_row(comparison: Comparison, *, has_clip: bool, has_speed: bool) -> tuple[str, ...]:
    """What other real images reach: the floor."""
    first = comparison.rows[0]
    cells = ["real images", "-", "-", number(first.floor().median, 2), "-"]
    cells += [number(first.kid_floor().median, 3)]
    if comparison.reference_accuracy is not None and comparison.reference_diversity is not None:
        cells += [number(100.0 * comparison.reference_accuracy, 1), number(comparison.reference_diversity, 2)]
    cells += ["-"] * (has_clip + 2 * has_speed)
    return (*cells, str(first.results[0].fid.floor_samples), "-")


def _row(row: ReportRow, first: ReportRow, *, has_clip: bool, has_speed: bool) -> tuple[str, ...]:
    cells = [row.name, str(row.steps), f"{row.guidance:g}"]
    cells += [spread_text(row.fid(), digits=2), number(row.floor().median, 2)]
    cells += [spread_text(row.kid(), digits=3)]
    accuracy, diversity, clip = row.accuracy(), row.diversity(), row.clip()
    if accuracy is not None and diversity is not None:
        cells += [spread_text(accuracy, digits=1, scale=100.0), spread_text(diversity, digits=2)]
    if has_clip:
        cells.append("-" if clip is None else spread_text(clip, digits=2))
    if has_speed:
        cells += _speed_cells(row, first)
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
