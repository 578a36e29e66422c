"""Write a comparison as report.json (data), report.md (for a repository) and report.html (one file, images inside)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewstep.core.training.sample_grid import save_grid
from fewstep.evaluation.curves import Curve, choose_metrics
from fewstep.evaluation.evaluate import Comparison
from fewstep.evaluation.figures import curves_figure, grid_image, quality_figure
from fewstep.evaluation.headline import best_rows, headline, short_table
from fewstep.evaluation.notes import table_notes
from fewstep.evaluation.pages import png_uri, render_page
from fewstep.evaluation.provenance import Provenance
from fewstep.evaluation.results import EvaluationResult, Spread
from fewstep.evaluation.table import Table, differences_table, results_table

FIGURE_FOLDER = "figures"


@dataclass(frozen=True)
class Picture:
    """One PNG of the report: its file name, what it shows, and its bytes."""

    file: str
    caption: str
    png: bytes

    def data_uri(self) -> str:
        return png_uri(self.png)


@dataclass(frozen=True)
class ReportContent:
    """Everything that both the Markdown and the HTML page show. `best` are rows of `short` to be marked."""

    title: str
    headline: tuple[str, ...]
    short: Table
    best: tuple[int, ...]
    table: Table
    differences: Table | None
    notes: tuple[str, ...]
    grid: tuple[Picture, ...]
    prompts: tuple[str, ...]
    grid_seed: int
    extremes: tuple[Picture, ...]
    quality: Picture | None
    curves: Picture | None
    provenance: Provenance
    curves_title: str = "Training"


@dataclass(frozen=True)
class ReportFiles:
    """Where a report was written."""

    json: Path
    markdown: Path
    html: Path


def build_content(
    comparison: Comparison,
    *,
    provenance: Provenance,
    curves: Sequence[Curve] = (),
    title: str = "Evaluation",
    curves_title: str = "Training",
) -> ReportContent:
    """Tables, notes and pictures of a comparison; `curves` of training runs, or of videos over time, are optional."""
    grid = comparison.grid
    strips = [("real images", grid.real)] if grid.real is not None else []
    strips += zip(grid.names, grid.pixels, strict=True)
    quality = quality_figure(comparison.rows, comparison.kinds[0])
    caption = f"{comparison.kinds[0].title} against seconds per image"
    metrics = choose_metrics(curves)
    plotted = None
    if metrics:
        plotted = Picture("curves.png", _curve_caption(curves, metrics), curves_figure(curves, metrics=metrics))
    return ReportContent(
        title=title,
        headline=headline(comparison),
        short=short_table(comparison),
        best=best_rows(comparison),
        table=results_table(comparison),
        differences=differences_table(comparison),
        notes=table_notes(comparison),
        grid=tuple(Picture(f"grid_{row}.png", name, grid_image(pixels)) for row, (name, pixels) in enumerate(strips)),
        prompts=tuple(prompt for prompt in grid.prompts if prompt),
        grid_seed=grid.seed,
        extremes=tuple(
            Picture(f"extremes_{row}.png", one.caption, grid_image(one.pixels))
            for row, one in enumerate(comparison.extremes)
        ),
        quality=None if quality is None else Picture("quality.png", caption, quality),
        curves=plotted,
        provenance=provenance,
        curves_title=curves_title,
    )


def _curve_caption(curves: Sequence[Curve], metrics: Sequence[str]) -> str:
    runs = list(dict.fromkeys(curve.run for curve in curves))
    left_out = len({curve.metric for curve in curves}) - len(metrics)
    rest = f"; {left_out} more metrics stand in metrics.jsonl" if left_out else ""
    return f"Over steps, of {', '.join(runs)}{rest}"


def json_text(comparison: Comparison, *, provenance: Provenance) -> str:
    """The whole comparison without pixels: each result, the spread over runs, and the differences to the baseline."""

    def spread(value: Spread | None) -> object:
        return None if value is None else asdict(value)

    def result(one: EvaluationResult) -> dict[str, Any]:
        figures = {key: asdict(figure) for key, figure in one.figures.items()}
        return {"seed": one.seed, "samples": one.samples, "figures": figures}

    rows = [
        {
            "name": row.name,
            "steps": row.steps,
            "guidance": row.guidance,
            "call": row.call,
            "results": [result(one) for one in row.results],
            "latency": None if row.latency is None else asdict(row.latency),
            "summary": {kind.key: spread(row.spread(kind.key)) for kind in comparison.kinds},
            "minus_baseline": {key: {**asdict(value), "decided": value.decided} for key, value in differences.items()},
        }
        for row, differences in zip(comparison.rows, comparison.differences, strict=True)
    ]
    content = {
        "reference": comparison.reference,
        "baseline": comparison.rows[comparison.baseline].label(),
        "measures": [asdict(kind) for kind in comparison.kinds],
        "grid": {"prompts": comparison.grid.prompts, "seed": comparison.grid.seed, "names": comparison.grid.names},
        "notes": table_notes(comparison),
        "rows": rows,
        "provenance": {**asdict(provenance), "versions": dict(provenance.versions)},
    }
    # Not a number is not JSON, and no figure of a report may be one.
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def markdown_text(content: ReportContent) -> str:
    """The report as Markdown; pictures are files in the folder figures/ beside it."""
    lines = [f"# {content.title}", "", *(f"- {line}" for line in content.headline), ""]
    lines += [content.table.markdown(), "", *(f"- {note}" for note in content.notes)]
    if content.differences is not None:
        lines += ["", "## Differences", "", content.differences.markdown()]
    if content.quality is not None:
        lines += ["", "## Quality and speed", "", _link(content.quality)]
    prompts = ", ".join(f"`{prompt}`" for prompt in content.prompts)
    shown = f"Same prompts and noise in each row, seed {content.grid_seed}: {prompts}."
    lines += ["", "## Samples", "", shown if prompts else "The first pictures of each folder.", ""]
    for picture in content.grid:
        lines += [f"{picture.caption}  ", _link(picture), ""]
    if content.extremes:
        lines += ["## Best and worst samples", ""]
        for picture in content.extremes:
            lines += [f"{picture.caption}  ", _link(picture), ""]
    if content.curves is not None:
        lines += [f"## {content.curves_title}", "", f"{content.curves.caption}.", "", _link(content.curves), ""]
    made = content.provenance
    versions = ", ".join(f"{package} {version}" for package, version in made.versions)
    lines += ["## How this was made", "", "```", made.command, "```", ""]
    lines += [f"{made.date}, {made.hardware}, {made.threads} threads, Python {made.python}, {versions}.", ""]
    return "\n".join(lines)


def _link(picture: Picture) -> str:
    return f"![{picture.caption}]({FIGURE_FOLDER}/{picture.file})"


def html_text(content: ReportContent) -> str:
    """The report as one HTML page without outside resources."""
    return render_page("report.html", content)


def write_report(
    folder: str | Path,
    comparison: Comparison,
    *,
    provenance: Provenance,
    curves: Sequence[Curve] = (),
    title: str = "Evaluation",
    curves_title: str = "Training",
) -> ReportFiles:
    """Write report.json, report.md, report.html and figures/*.png into `folder`, which is made if it is missing.

    figures/samples.png holds all rows of the sample grid with their names, for a page of one's own.
    """
    target = Path(folder)
    # Before anything is written: a figure that is no number leaves an earlier page as it was.
    data = json_text(comparison, provenance=provenance)
    (target / FIGURE_FOLDER).mkdir(parents=True, exist_ok=True)
    words = {"title": title, "curves_title": curves_title}
    content = build_content(comparison, provenance=provenance, curves=curves, **words)
    files = ReportFiles(target / "report.json", target / "report.md", target / "report.html")
    for picture in (*content.grid, *content.extremes, content.quality, content.curves):
        if picture is not None:
            (target / FIGURE_FOLDER / picture.file).write_bytes(picture.png)
    grid = comparison.grid
    rows, labels = list(grid.pixels), list(grid.names)
    if grid.real is not None:
        rows, labels = [grid.real, *rows], ["real images", *labels]
    if len({row.shape[2:] for row in rows}) == 1:
        # Pictures of several sizes make no one grid; each has its strip.
        save_grid(rows, target / FIGURE_FOLDER / "samples.png", labels=labels)
    files.json.write_text(data, encoding="utf-8")
    files.markdown.write_text(markdown_text(content), encoding="utf-8")
    files.html.write_text(html_text(content), encoding="utf-8")
    return files
