"""Benchmark results of attention as a record and as a table."""

from __future__ import annotations

from dataclasses import asdict

from fewstep.kernels.attention_benchmark import Result

COLUMNS = (
    ("tokens", 7),
    ("mask", 24),
    ("tiles", 6),
    ("error", 9),
    ("JVP ms", 10),
    ("MB", 7),
    ("dense ms", 10),
    ("MB", 8),
    ("dense/JVP", 10),
    ("fwd ms", 9),
    ("SDPA ms", 9),
    ("of SDPA", 8),
    ("bwd ms", 9),
    ("SDPA", 9),
)


def table_of(results: list[Result], *, heading: bool = True) -> str:
    """One line per result; "of SDPA" is the rate of output and tangent against that of SDPA forward, in products/s."""
    lines = ["".join(name.rjust(width) for name, width in COLUMNS)] if heading else []
    for result in results:
        rows = {row.name: row for row in result.rows}
        jvp, sdpa = rows["forward_jvp"], rows["sdpa_forward"]
        dense = rows.get("dense_jvp")
        cells = (
            str(result.case.tokens),
            result.case.mask,
            f"{result.tile_density:.3f}",
            f"{result.error:.1e}",
            f"{jvp.milliseconds:.2f}",
            megabytes(jvp.memory_mb),
            "-" if dense is None else f"{dense.milliseconds:.1f}",
            megabytes(None if dense is None else dense.memory_mb),
            "-" if dense is None else f"{dense.milliseconds / jvp.milliseconds:.1f}",
            f"{rows['forward'].milliseconds:.2f}",
            f"{sdpa.milliseconds:.2f}",
            f"{jvp.useful_gflops / sdpa.useful_gflops:.2f}",
            f"{rows['backward'].milliseconds:.2f}",
            f"{rows['sdpa_backward'].milliseconds:.2f}",
        )
        lines.append("".join(cell.rjust(width) for cell, (_, width) in zip(cells, COLUMNS, strict=True)))
    return "\n".join(lines)


def megabytes(value: float | None) -> str:
    """A number of megabytes, or a dash."""
    return "-" if value is None else f"{value:.0f}"


def record_of(results: list[Result]) -> list[dict[str, object]]:
    """Results as JSON values."""
    return [{**asdict(result), "case": {**asdict(result.case), "dtype": str(result.case.dtype)}} for result in results]
