"""Write a comparison as report.json (data), report.md (for a repository) and report.html (one file, images inside)."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fewstep.core.training.sample_grid import save_grid
from fewstep.evaluation.curves import Curve, choose_metrics
from fewstep.evaluation.evaluate import Comparison
from fewstep.evaluation.figures import curves_figure, grid_image, quality_figure
from fewstep.evaluation.provenance import Provenance
from fewstep.evaluation.results import Spread
from fewstep.evaluation.table import Table, results_table

TEMPLATES = Path(__file__).parent / "templates"
FIGURE_FOLDER = "figures"


@dataclass(frozen=True)
class Picture:
    """One PNG of the report: its file name, what it shows, and its bytes."""

    file: str
    caption: str
    png: bytes

    def data_uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class ReportContent:
    """Everything that both the Markdown and the HTML page show."""

    title: str
    table: Table
    notes: tuple[str, ...]
    grid: tuple[Picture, ...]
    prompts: tuple[str, ...]
    grid_seed: int
    quality: Picture | None
    curves: Picture | None
    provenance: Provenance


@dataclass(frozen=True)
class ReportFiles:
    """Where a report was written."""

    json: Path
    markdown: Path
    html: Path


def _reference_words(comparison: Comparison) -> tuple[str, str]:
    """What the real images are called, and the note on the floor."""
    samples, split = comparison.rows[0].results[0].fid.floor_samples, comparison.reference_split
    if comparison.floor_of_halves:
        return f"the folder {split}", (
            f"FID floor: the two halves of the folder against each other, {samples} real images in the place of the "
            f"generated ones and {comparison.reference_samples - samples} in that of the reference. Half as many "
            "images make it higher than that of the whole folder, so a good generator may score below it."
        )
    return f"the {split} split", (
        f"FID floor: {samples} real images of the other split in place of the generated ones. The "
        "finite sample alone gives this much."
    )


def table_notes(comparison: Comparison) -> tuple[str, ...]:
    """What a reader needs beside the numbers: sample counts, the floor, how speed was measured."""
    first = comparison.rows[0].results[0]
    source, floor = _reference_words(comparison)
    notes = [
        f"FID and KID: {first.samples} generated images per seed against {comparison.reference_samples} real "
        f"images of {source}; features: {first.fid.feature_extractor}.",
        floor,
        f"KID: mean over {first.kid.subsets} sets of {first.kid.subset_size} images; unbiased, so it may be negative.",
    ]
    if comparison.reference_diversity is not None:
        notes.append(
            f"Accuracy: share of images that the classifier takes for the digit of the prompt. Diversity: mean feature "
            f"distance of two images of one digit; real images have {comparison.reference_diversity:.2f}."
        )
    if any(len(row.results) > 1 for row in comparison.rows):
        notes.append("Several seeds: median [smallest, largest].")
    latency = comparison.rows[0].latency
    if latency is not None:
        notes.append(
            f"Speed: plain pipeline calls, batch {latency.batch_size}, {latency.threads} CPU threads, "
            f"{latency.device}; median of {latency.repeats} turns taken in alternation; speed-up against "
            f"{comparison.rows[0].label()}."
        )
    if first.clip is not None:
        notes.append(f"CLIP score: 100 times the cosine of image and prompt, weights {first.clip.weights}.")
    return tuple(notes)


def build_content(
    comparison: Comparison, *, provenance: Provenance, curves: Sequence[Curve] = (), title: str = "Evaluation"
) -> ReportContent:
    """Table, notes and pictures of a comparison; `curves` of training runs are optional."""
    grid = comparison.grid
    strips = [("real images", grid.real), *zip(grid.names, grid.pixels, strict=True)]
    quality = quality_figure(comparison.rows)
    metrics = choose_metrics(curves)
    plotted = (
        Picture("curves.png", _curve_caption(curves, metrics), curves_figure(curves, metrics=metrics))
        if metrics
        else None
    )
    return ReportContent(
        title=title,
        table=results_table(comparison),
        notes=table_notes(comparison),
        grid=tuple(Picture(f"grid_{row}.png", name, grid_image(pixels)) for row, (name, pixels) in enumerate(strips)),
        prompts=grid.prompts,
        grid_seed=grid.seed,
        quality=None if quality is None else Picture("quality.png", "FID against seconds per image", quality),
        curves=plotted,
        provenance=provenance,
    )


def _curve_caption(curves: Sequence[Curve], metrics: Sequence[str]) -> str:
    runs = list(dict.fromkeys(curve.run for curve in curves))
    left_out = len({curve.metric for curve in curves}) - len(metrics)
    rest = f"; {left_out} more metrics stand in metrics.jsonl" if left_out else ""
    return f"Training metrics over steps of {', '.join(runs)}{rest}"


def json_text(comparison: Comparison, *, provenance: Provenance) -> str:
    """The whole comparison without pixels: every result of every seed, and the spread of the main figures."""

    def spread(value: Spread | None) -> object:
        return None if value is None else asdict(value)

    rows = [
        {
            **asdict(row),
            "summary": {
                "fid": spread(row.fid()),
                "kid": spread(row.kid()),
                "accuracy": spread(row.accuracy()),
                "diversity": spread(row.diversity()),
                "clip": spread(row.clip()),
            },
        }
        for row in comparison.rows
    ]
    content = {
        "reference_split": comparison.reference_split,
        "reference_samples": comparison.reference_samples,
        "reference_accuracy": comparison.reference_accuracy,
        "reference_diversity": comparison.reference_diversity,
        "grid": {"prompts": comparison.grid.prompts, "seed": comparison.grid.seed, "names": comparison.grid.names},
        "rows": rows,
        "provenance": {**asdict(provenance), "versions": dict(provenance.versions)},
    }
    # Not a number is not JSON, and no figure of a report may be one.
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def markdown_text(content: ReportContent) -> str:
    """The report as Markdown; pictures are files in the folder figures/ beside it."""
    lines = [f"# {content.title}", "", content.table.markdown(), ""]
    lines += [f"- {note}" for note in content.notes]
    if content.quality is not None:
        lines += ["", "## Quality and speed", "", _link(content.quality)]
    prompts = ", ".join(f"`{prompt}`" for prompt in content.prompts)
    lines += ["", "## Samples", "", f"Same prompts and noise in each row, seed {content.grid_seed}: {prompts}.", ""]
    for picture in content.grid:
        lines += [f"{picture.caption}  ", _link(picture), ""]
    if content.curves is not None:
        lines += ["## Training", "", f"{content.curves.caption}.", "", _link(content.curves), ""]
    made = content.provenance
    versions = ", ".join(f"{package} {version}" for package, version in made.versions)
    lines += ["## How this was made", "", "```", made.command, "```", ""]
    lines += [f"{made.date}, {made.hardware}, {made.threads} threads, Python {made.python}, {versions}.", ""]
    return "\n".join(lines)


def _link(picture: Picture) -> str:
    return f"![{picture.caption}]({FIGURE_FOLDER}/{picture.file})"


def html_text(content: ReportContent) -> str:
    """The report as one HTML page without outside resources."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(content=content)


def write_report(
    folder: str | Path,
    comparison: Comparison,
    *,
    provenance: Provenance,
    curves: Sequence[Curve] = (),
    title: str = "Evaluation",
) -> ReportFiles:
    """Write report.json, report.md, report.html and figures/*.png into `folder`, which is made if it is missing.

    figures/samples.png holds all rows of the sample grid with their names, for a page of one's own.
    """
    target = Path(folder)
    (target / FIGURE_FOLDER).mkdir(parents=True, exist_ok=True)
    content = build_content(comparison, provenance=provenance, curves=curves, title=title)
    files = ReportFiles(target / "report.json", target / "report.md", target / "report.html")
    for picture in (*content.grid, content.quality, content.curves):
        if picture is not None:
            (target / FIGURE_FOLDER / picture.file).write_bytes(picture.png)
    grid = comparison.grid
    save_grid([grid.real, *grid.pixels], target / FIGURE_FOLDER / "samples.png", labels=["real images", *grid.names])
    files.json.write_text(json_text(comparison, provenance=provenance), encoding="utf-8")
    files.markdown.write_text(markdown_text(content), encoding="utf-8")
    files.html.write_text(html_text(content), encoding="utf-8")
    return files
