"""Tables and reports from a made-up comparison, and figures as pictures."""

import io
import json
import platform
import re

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.evaluation.accuracy import AccuracyResult, DiversityResult
from fewstep.evaluation.clip_score import ClipResult
from fewstep.evaluation.curves import Curve
from fewstep.evaluation.evaluate import Comparison, SampleGrid
from fewstep.evaluation.fid import FidResult, KidResult
from fewstep.evaluation.figures import curves_figure, grid_image, quality_figure
from fewstep.evaluation.latency import LatencyResult
from fewstep.evaluation.provenance import Provenance, collect_provenance
from fewstep.evaluation.report import write_report
from fewstep.evaluation.results import EvaluationResult, ReportRow
from fewstep.evaluation.table import Table, results_table

PROVENANCE = Provenance("python x --y '<a&b>'", "2026-01-02", "3.11.0", (("torch", "2.15"),), "Some CPU", 2)


def result(name: str, steps: int, *, seed: int, fid: float, clip: bool) -> EvaluationResult:
    return EvaluationResult(
        name=name,
        steps=steps,
        guidance=1.0,
        seed=seed,
        samples=500,
        fid=FidResult(fid, 500, 500, "test", 1.25, 500, "digits", seed),
        kid=KidResult(fid / 1000.0, 0.001, 50, 250, 500, 500, "test", 0.0001, "digits", seed),
        accuracy=AccuracyResult(0.9 + seed / 100.0, 500, 0.99, (None,) * 10),
        diversity=DiversityResult(4.0, 4.5),
        clip=ClipResult(31.5, 500, "tiny") if clip else None,
    )


def latency(seconds: float) -> LatencyResult:
    return LatencyResult(seconds, 1.0 / seconds, seconds, seconds, 5, 1, 2, "CPU")


def comparison(*, timed: bool = True, clip: bool = False) -> Comparison:
    teacher = ReportRow(
        "teacher <b>",
        28,
        3.0,
        (result("teacher <b>", 28, seed=0, fid=2.0, clip=clip),),
        latency(0.4) if timed else None,
    )
    student = ReportRow(
        "student",
        2,
        1.0,
        tuple(result("student", 2, seed=seed, fid=3.0 + seed, clip=clip) for seed in range(3)),
        latency(0.04) if timed else None,
    )
    grid = SampleGrid(
        prompts=("the digit zero", "the digit one"),
        seed=0,
        names=(teacher.label(), student.label()),
        pixels=(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)),
        real=torch.rand(2, 3, 32, 32),
    )
    return Comparison((teacher, student), grid, "test", 500, 0.99, 4.5)


def test_table_holds_medians_ranges_and_speed_up() -> None:
    table = results_table(comparison())
    columns = dict(zip(table.header, zip(*table.rows, strict=True), strict=True))
    assert columns["system"] == ("real images", "teacher <b>", "student")
    assert columns["FID"] == ("1.25", "2.00", "4.00 [3.00, 5.00]")
    assert columns["KID"] == ("0.000", "0.002", "0.004 [0.003, 0.005]")
    assert columns["accuracy %"] == ("99.0", "90.0", "91.0 [90.0, 92.0]")
    assert columns["speed-up"] == ("-", "1.0x", "10.0x")
    assert columns["s / image"] == ("-", "0.4", "0.04")
    assert columns["seeds"] == ("-", "0", "0, 1, 2")
    assert columns["FID floor"] == ("-", "1.25", "1.25")
    assert "speed-up" not in results_table(comparison(timed=False)).header
    assert results_table(comparison(clip=True)).rows[1][8] == "31.50"


def test_text_is_aligned_ascii() -> None:
    text = Table(("name", "value"), (("a", "1.5"), ("longer", "10"))).text()
    assert text == "name    value\n------  -----\na         1.5\nlonger     10"
    assert Table(("a|b", "c"), (("x", "1"),)).markdown() == "| a\\|b | c |\n| :--- | ---: |\n| x | 1 |"
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        Table(("a", "b"), (("x",),))


def test_report_files(tmp_path) -> None:
    curves = [Curve("run", "loss", (1, 2, 3), (3.0, 2.0, 1.0)), Curve("run", "lr", (1, 2), (0.1, 0.1))]
    files = write_report(tmp_path / "report", comparison(), provenance=PROVENANCE, curves=curves, title="Digits")

    content = json.loads(files.json.read_text())
    assert [row["summary"]["fid"]["median"] for row in content["rows"]] == [2.0, 4.0]
    assert content["rows"][1]["results"][2]["fid"]["value"] == 5.0
    assert content["rows"][1]["results"][2]["fid"]["floor"] == 1.25
    assert content["provenance"]["versions"] == {"torch": "2.15"}

    markdown = files.markdown.read_text()
    links = re.findall(r"\]\((figures/[^)]+)\)", markdown)
    assert len(links) == 5
    for link in links:
        with Image.open(files.markdown.parent / link) as picture:
            assert min(picture.size) >= 64

    page = files.html.read_text()
    assert page.count('src="data:image/png;base64,') == 5
    assert page.count("<tr>") == 4
    assert len(re.findall(r"https?://|<script|<link|src=\"(?!data:)|@import|url\(", page)) == 0
    assert page.count("teacher &lt;b&gt;") >= 2
    assert page.count("&lt;a&amp;b&gt;") == 1
    assert page.count("prefers-color-scheme: dark") == 1
    assert page.isascii()


def test_report_without_timing_and_curves(tmp_path) -> None:
    files = write_report(tmp_path, comparison(timed=False), provenance=PROVENANCE)
    assert files.html.read_text().count("data:image/png") == 3
    assert len(list((tmp_path / "figures").glob("grid_*.png"))) == 3
    assert (tmp_path / "figures" / "samples.png").stat().st_size > 1000


def test_a_broken_figure_is_not_written_as_json(tmp_path) -> None:
    found = comparison()
    broken = result("x", 1, seed=0, fid=float("nan"), clip=False)
    rows = (ReportRow("x", 1, 1.0, (broken,)),)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(tmp_path, Comparison(rows, found.grid, "test", 500, 0.9, 4.5), provenance=PROVENANCE)


def test_grid_image_holds_the_pixels() -> None:
    pixels = torch.rand(3, 3, 32, 32)
    picture = Image.open(io.BytesIO(grid_image(pixels)))
    assert picture.size == (3 * 64 + 2 * 4, 64)
    data = torch.from_numpy(np.array(picture))
    assert torch.equal(data[::2, 68:132:2, :3], (pixels[1] * 255.0).round().to(torch.uint8).permute(1, 2, 0))
    assert data[:, 64:68, 3].max() == 0
    assert Image.open(io.BytesIO(grid_image(torch.rand(1, 3, 128, 96)))).size == (96, 128)
    with pytest.raises(ValueError, match=r"\[K, 3, H, W\]"):
        grid_image(torch.rand(3, 32, 32))


def test_figures_are_pictures() -> None:
    quality = quality_figure(comparison().rows)
    assert quality is not None
    assert Image.open(io.BytesIO(quality)).size[0] > 600
    assert quality == quality_figure(comparison().rows)
    assert quality_figure(comparison(timed=False).rows) is None
    curves = [Curve(run, name, (1, 2), (1.0, 2.0)) for run in "ab" for name in "wxyz"]
    assert Image.open(io.BytesIO(curves_figure(curves, metrics=["w", "x", "y", "z"]))).size[0] > 1000
    with pytest.raises(ValueError, match="no metric"):
        curves_figure(curves, metrics=[])


def test_provenance_names_hardware_and_no_host() -> None:
    made = collect_provenance("scripts/x.py", arguments=["--output", "a b"])
    assert made.command == "python scripts/x.py --output 'a b'"
    assert made.threads == torch.get_num_threads()
    assert len(made.hardware) > 2
    assert dict(made.versions)["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert platform.node() not in (made.hardware, made.command)
