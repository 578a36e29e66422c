"""VBench's scores as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fewstep.evaluation.samples.atomic import write_text
from fewstep.evaluation.table import Table
from fewstep.evaluation.vbench.aggregate import Scored, Totals, normalised, protocol_line
from fewstep.evaluation.vbench.constants import DIMENSIONS

TOTALS = "totals.json"


def totals_table(scores: Mapping[str, Scored], found: Totals) -> Table:
    """A row for each dimension that was scored, then the halves and the total, in per cent."""
    rows = []
    for name, kind in DIMENSIONS.items():
        if name in scores:
            raw = scores[name].raw
            cells = [f"{100 * raw:.2f}", f"{100 * normalised(name, raw):.2f}", f"{kind.weight:g}"]
            rows.append((name.replace("_", " "), *cells, _between(found, name), str(len(scores[name].prompts))))
    for key in ("quality", "semantic", "total"):
        value = getattr(found, key)
        text = "-" if value is None else f"{100 * value:.2f}"
        rows.append((f"{key} score", "", text, "", _between(found, key), ""))
    return Table(("dimension", "raw %", "normalised %", "weight", "interval of raw %", "videos"), tuple(rows))


def _between(found: Totals, key: str) -> str:
    one = found.intervals.get(key)
    return "-" if one is None else f"[{100 * one.low:.2f}, {100 * one.high:.2f}]"


def write_totals(folder: str | Path, scores: Mapping[str, Scored], found: Totals) -> Path:
    """Write totals.json beside the results; returns its path."""
    content: dict[str, Any] = {
        "raw": {name: one.raw for name, one in scores.items()},
        "normalised": {name: normalised(name, one.raw) for name, one in scores.items()},
        "quality": found.quality,
        "semantic": found.semantic,
        "total": found.total,
        "intervals": {key: asdict(one) for key, one in found.intervals.items()},
        "missing": list(found.missing),
        "protocol": protocol_line(folder),
    }
    target = Path(folder) / TOTALS
    write_text(target, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return target
