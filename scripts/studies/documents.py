"""Figures and tables of the documents, out of the records that they are of.

A document has marks, which no reader of the page sees:

    FID <!--=dmd_1_fid-->0.87<!--/--> at one step           a figure of docs/figures.yaml
    <!--table dmd-->                                        a table of it, which goes on to the end mark
    <!--/table-->

What stands between the marks is written by `python scripts/update_documents.py`, and a test compares.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FIGURES = "docs/figures.yaml"
VALUE = re.compile(r"<!--=(?P<name>\w+)-->(?P<text>.*?)<!--/-->")
TABLE = re.compile(r"<!--table (?P<name>\w+)-->\n(?P<text>.*?)<!--/table-->", re.DOTALL)
STEP = re.compile(r"(?P<key>[\w-]+)?(?:\[(?P<choice>[^\]]*)\])?")
VERDICTS = {True: "better", False: "worse"}


def documents(root: Path) -> list[Path]:
    """The pages that may have marks."""
    found = [root / "README.md", *(root / "docs").rglob("*.md"), *(root / "assets").rglob("README.md")]
    return [path for path in sorted(found) if "<!--=" in path.read_text(encoding="utf-8") or _has_table(path)]


def _has_table(path: Path) -> bool:
    return "<!--table " in path.read_text(encoding="utf-8")


def updated(root: Path, text: str) -> str:
    """A document with every mark filled from its record.

    Raises ValueError for a mark that docs/figures.yaml does not know, and for a record that lacks what it names.
    """
    known = yaml.safe_load((root / FIGURES).read_text(encoding="utf-8"))

    def value(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in known["figures"]:
            raise ValueError(f"{FIGURES} has no figure {name!r}")
        return f"<!--={name}-->{figure_text(root, known['figures'][name])}<!--/-->"

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in known["tables"]:
            raise ValueError(f"{FIGURES} has no table {name!r}")
        choice = known["tables"][name]
        return f"<!--table {name}-->\n{TABLES[choice['kind']](root, choice)}\n<!--/table-->"

    return TABLE.sub(table, VALUE.sub(value, text))


def figure_text(root: Path, choice: Mapping[str, Any]) -> str:
    """A figure as text: `path` in the record `file`, over another path with `over`, times `scale`, in `format`."""
    found = lookup(root, choice["file"], choice["path"])
    if "over" in choice:
        found = found / lookup(root, choice["file"], choice["over"])
    if isinstance(found, str):
        return found
    return format(found * choice.get("scale", 1), choice.get("format", "g"))


@cache
def _record(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def lookup(root: Path, file: str, path: str) -> Any:
    """What a record holds at a path such as rows[name=student,steps=1].summary.fid.median; [0] picks by place.

    Raises ValueError that says where the path ends.
    """
    found = _record(root / file)
    # Brackets may hold dots.
    for part in re.split(r"\.(?![^\[]*\])", path):
        match = STEP.fullmatch(part)
        assert match is not None, part
        try:
            if match["key"] is not None:
                found = found[int(match["key"])] if isinstance(found, list) else found[match["key"]]
            if match["choice"] is not None:
                found = _chosen(found, match["choice"])
        except (KeyError, IndexError, StopIteration) as error:
            raise ValueError(f"{file} has nothing at {part!r} of {path!r}") from error
    return found


def _chosen(rows: list[Any], choice: str) -> Any:
    if choice.isdigit():
        return rows[int(choice)]
    wanted = [pair.partition("=")[::2] for pair in choice.split(";")]
    return next(row for row in rows if all(str(row[key]) == value for key, value in wanted))


def row_name(row: Mapping[str, Any]) -> str:
    """A system and how it is called."""
    parts = [row["name"]]
    parts += [] if row["guidance"] == 1 else [f"guidance {row['guidance']:g}"]
    parts += [row["call"].replace("sigmas ", "grid ").replace(",", ", ")] if row["call"] else []
    return ", ".join(parts)


def _students(root: Path, choice: Mapping[str, Any]) -> str:
    """Rows of an evaluation: calls, first measures, the difference to the baseline, speed."""
    content = _record(root / choice["file"])
    rows = content["rows"]
    base = next(row for row in rows if not row["minus_baseline"])
    real = rows[0]["results"][0]["figures"]
    head = f"| system | calls | FID (real {real['fid']['floor']:.2f}) | minus {row_name(base)}, {base['steps']} steps |"
    head += (
        f" right % (real {100 * real['accuracy']['floor']:.1f}) | diversity (real {real['diversity']['floor']:.2f}) |"
    )
    lines = [head + " s / image | speed-up |", "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        calls = f"{row['steps']}{'' if row['guidance'] == 1 else ' x 2'}"
        name = row_name(row)
        cells = [f"**{name}**" if len(row["results"]) > 1 else name, calls, _cell(row, "fid", ".2f")]
        cells += [_difference(row), _cell(row, "accuracy", ".1f", 100), _cell(row, "diversity", ".2f")]
        seconds = row["latency"]["seconds_per_image"]
        cells += [f"{seconds:.3f}", f"{base['latency']['seconds_per_image'] / seconds:.1f}x"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any], key: str, digits: str, scale: float = 1) -> str:
    spread = row["summary"][key]
    if spread["count"] > 1:
        low, high = spread["minimum"], spread["maximum"]
    else:
        low, high = (row["results"][0]["figures"][key][end] for end in ("low", "high"))
    return f"{format(spread['median'] * scale, digits)} [{format(low * scale, digits)}, {format(high * scale, digits)}]"


def _difference(row: Mapping[str, Any]) -> str:
    found = row["minus_baseline"].get("fid")
    if found is None:
        return "baseline"
    return _with_interval(found, ".2f")


def _with_interval(found: Mapping[str, Any], digits: str, *, large: bool = False) -> str:
    """A difference of a measure that is to be small, or large, its interval, and what that says."""
    word = VERDICTS[(found["value"] > 0) == large] if found["decided"] else "same"
    value, low, high = (format(found[name], f"+{digits}") for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}] {word}"


def _families(root: Path, choice: Mapping[str, Any]) -> str:
    """Rows of the families' table: parity, tangents, exports, checkpoints and lines."""
    lines = [
        "| model | trajectory | batch | tangents, state and time | exports, largest | sharded | fp16 | bf16 | LoRA |"
        " lines |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in _record(root / choice["file"])["rows"]:
        loaded = row["checkpoints"]
        lora = "-" if loaded["lora"] is None else f"{loaded['lora']:.0e}"
        cells = [row["model"], f"{row['trajectory']:.0e}", f"{row['batch_against_alone']:.0e}"]
        found = [row["tangent_state"], row["tangent_time"]]
        cells += ["-" if None in found else f"{found[0]:.0e}, {found[1]:.0e}", f"{max(row['exports'].values()):.0e}"]
        cells += [f"{loaded['sharded']:.0e}", f"{loaded['fp16_variant']:.0e}", f"{loaded['bf16']:.0e}", lora]
        cells += [f"{row['family_lines']} + {row['test_lines']}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _sizes(root: Path, choice: Mapping[str, Any]) -> str:
    """Parameters, and what they hold in memory in training."""
    lines = [
        "| model | billion parameters | one bf16 base, for adapters, GB | full training, GB | tokens at stock size |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in _record(root / choice["file"])["rows"]:
        cells = [row["model"], f"{row['billions']:.2f}", f"{row['base_gb']:.1f}", f"{row['full_gb']:.0f}"]
        lines.append("| " + " | ".join([*cells, f"{row['tokens']:,}"]) + " |")
    return "\n".join(lines)


def _paths(root: Path, choice: Mapping[str, Any]) -> str:
    """Cosines of derivatives with the path's differences, by time."""
    content = _record(root / choice["file"])
    times = content["settings"]["times"]
    lines = ["| teacher | sigma | velocity moved by | " + " | ".join(f"t = {time:g}" for time in times) + " |"]
    lines.append("|---|---:|---:|" + "---:|" * len(times))
    for row in content["rows"]:
        cells = [row["teacher"], f"{row['sigma']:g}", f"{100 * max(row['moved']):.1f} %"]
        lines.append("| " + " | ".join([*cells, *(f"{cosine:.2f}" for cosine in row["cosine"])]) + " |")
    return "\n".join(lines)


def _compared(root: Path, choice: Mapping[str, Any]) -> str:
    """Students at several numbers of steps, each beside the baseline at as many."""
    lines = ["| student | calls | FID | minus the baseline | right % | diversity |", "|---|---:|---:|---:|---:|---:|"]
    for file in choice["files"]:
        for row in _record(root / file)["rows"]:
            cells = [row_name(row), f"{row['steps']}", _cell(row, "fid", ".2f"), _difference(row)]
            cells += [_cell(row, "accuracy", ".1f", 100), _cell(row, "diversity", ".2f")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _registers(root: Path, choice: Mapping[str, Any]) -> str:
    """Registers and stack of kernels by GPU; a cell has one pair for each width of heads."""
    rows = _record(root / choice["file"])["rows"]
    gpus = sorted({row["capability"] for row in rows})
    lines = [
        "| kernel | dtype | tiles | " + " | ".join(f"sm_{gpu}: registers, stack" for gpu in gpus) + " |",
        "|---|---|---|" + "---|" * len(gpus),
    ]
    for kind, dtype, role in dict.fromkeys((row["kernel"], row["dtype"], row["role"]) for row in rows):
        cells = []
        for gpu in gpus:
            found = [row for row in rows if (row["kernel"], row["dtype"], row["role"]) == (kind, dtype, role)]
            of_gpu = sorted((row for row in found if row["capability"] == gpu), key=lambda row: row["width"])
            cells.append(" / ".join(f"{row['registers']}, {row['stack']}" for row in of_gpu))
        lines.append(f"| {kind} | {dtype} | {role} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _curves(root: Path, choice: Mapping[str, Any]) -> str:
    """Last distances of curves by time, beside those of the baseline, and calls to reach the baseline's last ones."""
    record = _record(root / choice["file"])
    lines = ["| student | t | distance | minus tf_dcm's | calls to its last distance |", "|---|---:|---:|---:|---|"]
    for row in record["summary"]:
        difference, reached = "baseline", ""
        if "minus_tf_dcm" in row:
            difference = _with_interval(row["minus_tf_dcm"], ".4f")
            calls = ["none" if one is None else f"{one:.0f}" for one in row["calls_to_tf_dcm"]]
            reached = f"{', '.join(calls)} of {row['calls_of_tf_dcm']}"
        lines.append(f"| {row['variant']} | {row['time']} | {row['last']:.4f} | {difference} | {reached} |")
    return "\n".join(lines)


def _judged(root: Path, choice: Mapping[str, Any]) -> str:
    """Judged clips: medians over seeds with the smallest and the largest."""
    columns = (("digit_accuracy", 100, ".1f"), ("direction_accuracy", 100, ".1f"), ("frame_distance", 1, ".1f"))
    lines = ["| student | digit % | direction % | frame distance |", "|---|---:|---:|---:|"]
    for row in _record(root / choice["file"])["rows"]:
        cells = []
        for name, scale, digits in columns:
            values = [scale * one[name] for one in row["seeds"]]
            shown = (format(value, digits) for value in (scale * row["median"][name], min(values), max(values)))
            cells.append("{} [{}, {}]".format(*shown))
        lines.append(f"| {row['variant']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _maps(root: Path, choice: Mapping[str, Any]) -> str:
    """Students of streams by steps of a chunk: medians over seeds, and differences to the baseline."""
    lines = [
        "| student | steps | calls | distance to the ODE's end | minus tf_dcm's | digit % | minus tf_dcm's "
        "| frame distance | minus tf_dcm's |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    columns = (("distance", 1, ".3f"), ("digit_accuracy", 100, ".1f"), ("frame_distance", 1, ".1f"))
    for row in _record(root / choice["file"])["summary"]:
        cells = [row["system"], f"{row['steps']}", f"{row['calls']}"]
        for name, scale, digits in columns:
            found = row.get(name)
            shown = [format(scale * found[key], digits) for key in ("median", "least", "most")] if found else []
            cells.append("{} [{}, {}]".format(*shown) if shown else "")
            less = (found or {}).get("minus_tf_dcm")
            scaled = less and {**less, **{key: scale * less[key] for key in ("value", "low", "high")}}
            cells.append(_with_interval(scaled, digits, large=name == "digit_accuracy") if scaled else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _drift(root: Path, choice: Mapping[str, Any]) -> str:
    """Long streams: first, middle and last part, and memory between the first tenth and the end."""
    lines = [
        "| policy | frames with the digit %: first part, middle, last | frame distance: first, last "
        "| memory of the state | process, end minus first tenth |",
        "|---|---|---|---:|---:|",
    ]
    for row in _record(root / choice["file"])["rows"]:
        parts, memory = row["parts"], row["memory"]
        shown = (parts[0], parts[len(parts) // 2], parts[-1])
        digits = ", ".join(f"{100 * part['accuracy']:.0f}" for part in shown)
        grown = (memory[-1]["resident_bytes"] - memory[0]["resident_bytes"]) / 1e6
        state = f"{memory[-1]['state_bytes'] / 1e6:.1f} MB"
        distances = f"{parts[0]['distance']:.0f}, {parts[-1]['distance']:.0f}"
        lines.append(f"| {row['name']} | {digits} | {distances} | {state} | {grown:+.1f} MB |")
    return "\n".join(lines)


def _anchor(root: Path, choice: Mapping[str, Any]) -> str:
    """What a reward costs by where it is read: tilts along directions, and FID at levels of the held-out score."""
    record = _record(root / choice["file"])
    levels = [level for level, rows in record["costs"].items() if any(row["mean"] is not None for row in rows.values())]
    lines = [
        "| reward | tilt: wide, thin | "
        + " | ".join(f"FID at {level}: seeds, minus sample's" for level in levels)
        + " |",
        "|---|---|" + "---|" * len(levels),
    ]
    for variant, tilts in record["tilts"].items():
        tilt = f"{tilts['effective_tilt_wide']:.1f}, {tilts['effective_tilt_thin']:.1f}" if tilts else ""
        cells = []
        for level in levels:
            row = record["costs"][level][variant]
            seeds = ", ".join("not reached" if fid is None else f"{fid:.2f}" for fid in row["fid"])
            cells.append(seeds if row["mean"] is None else f"{seeds}; {row['mean']:+.2f}")
        lines.append(f"| {variant} | {tilt} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[Path, Mapping[str, Any]], str]] = {
    "students": _students,
    "families": _families,
    "sizes": _sizes,
    "paths": _paths,
    "registers": _registers,
    "curves": _curves,
    "judged": _judged,
    "drift": _drift,
    "maps": _maps,
    "compared": _compared,
    "anchor": _anchor,
}
