"""The first lines of a page: what a student costs and gains against what it was distilled from, as intervals allow."""

from __future__ import annotations

from fewstep.evaluation.evaluate import Comparison
from fewstep.evaluation.results import ReportRow
from fewstep.evaluation.table import Table, cell, difference_text, number, seconds_text

# Lines of the headline: the best row of each of so many systems.
MOST_LINES = 4


def headline(comparison: Comparison) -> tuple[str, ...]:
    """One sentence for each of the first systems, at the step count where its first measure is best."""
    kind = comparison.kinds[0]
    base = comparison.rows[comparison.baseline]
    names = dict.fromkeys(row.name for row in comparison.rows if row.name != base.name)
    lines = []
    for name in list(names)[:MOST_LINES]:
        row = min((one for one in comparison.rows if one.name == name), key=lambda one: _order(one, comparison))
        spread = row.spread(kind.key)
        if spread is None:
            continue
        speed = ""
        if row.latency is not None and base.latency is not None:
            speed = f"{base.latency.seconds_per_image / row.latency.seconds_per_image:.1f}x as fast as {base.label()}, "
        difference = comparison.differences[comparison.rows.index(row)].get(kind.key)
        told = f"{kind.title} {number(spread.median * kind.scale, kind.digits)}"
        if difference is not None:
            told += f", {difference_text(difference, kind)}"
        lines.append(f"{row.label()}: {speed}{told}.")
    return tuple(lines)


def best_rows(comparison: Comparison) -> tuple[int, ...]:
    """Rows whose first measure is the best, or cannot be told apart from it; the baseline has no part.

    Without intervals it is the best number alone.
    """
    kind = comparison.kinds[0]
    places = [
        place
        for place, row in enumerate(comparison.rows)
        if place != comparison.baseline and row.spread(kind.key) is not None
    ]
    if not places or kind.lower_is_better is None:
        return ()
    best = min(places, key=lambda place: _order(comparison.rows[place], comparison))
    top = comparison.rows[best]
    found = []
    for place in places:
        difference = None if place == best else comparison.rows[place].difference(top, kind.key)
        if place == best or (difference is not None and not difference.decided):
            found.append(place)
    return tuple(found)


def _order(row: ReportRow, comparison: Comparison) -> float:
    kind = comparison.kinds[0]
    spread = row.spread(kind.key)
    if spread is None:
        return float("inf")
    return -spread.median if kind.lower_is_better is False else spread.median


def short_table(comparison: Comparison) -> Table:
    """System, calls, first measure, its difference to the baseline, and speed: what fits a narrow screen."""
    kind = comparison.kinds[0]
    base = comparison.rows[comparison.baseline]
    compared = any(kind.key in found for found in comparison.differences)
    timed = any(row.latency is not None for row in comparison.rows)
    header = ["system", "steps", kind.title]
    header += [f"minus {base.label()}"] if compared else []
    header += ["s / image", "speed-up"] if timed else []
    rows = []
    for row, found in zip(comparison.rows, comparison.differences, strict=True):
        cells = [row.name + row.guidance_text(), str(row.steps) if row.steps else "-", cell(row, kind)]
        if compared:
            difference = found.get(kind.key)
            cells.append(
                "baseline" if row is base else "-" if difference is None else difference_text(difference, kind)
            )
        if timed:
            known = row.latency is not None and base.latency is not None
            cells += ["-", "-"] if not known else _speed(row, base)
        rows.append(tuple(cells))
    return Table(tuple(header), tuple(rows))


def _speed(row: ReportRow, base: ReportRow) -> list[str]:
    assert row.latency is not None
    assert base.latency is not None
    ratio = base.latency.seconds_per_image / row.latency.seconds_per_image
    return [seconds_text(row.latency.seconds_per_image), f"{ratio:.1f}x"]
