"""Tables and reports from a made-up comparison, and figures as pictures."""

import io
import json
import platform
import re

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.evaluation.curves import Curve
from fewstep.evaluation.evaluate import Comparison, SampleGrid, Strip
from fewstep.evaluation.figures import MARKERS, PALETTE, curves_figure, grid_image, quality_figure
from fewstep.evaluation.headline import best_rows, headline, short_table
from fewstep.evaluation.judge import KINDS
from fewstep.evaluation.latency import LatencyResult
from fewstep.evaluation.measures.resampling import Difference, Error
from fewstep.evaluation.provenance import Provenance, collect_provenance
from fewstep.evaluation.report import write_report
from fewstep.evaluation.results import EvaluationResult, Measured, ReportRow
from fewstep.evaluation.table import Table, difference_text, differences_table, results_table

PROVENANCE = Provenance("python x --y '<a&b>'", "2026-01-02", "3.11.0", (("torch", "2.15"),), "Some CPU", 2)
MEASURES = (*KINDS["fid"], *KINDS["kid"], *KINDS["classes"])
NOISE = torch.linspace(-1.0, 1.0, 50).double()


def result(name: str, steps: int, *, seed: int, fid: float, noise: float = 0.1) -> EvaluationResult:
    figures = {
        "fid": Measured(fid, fid - 0.2, fid + 0.2, 500, "digits", references=500, floor=1.25, warnings=("few",)),
        "kid": Measured(fid / 1000.0, -0.1, 0.1, 500, "digits", references=500, floor=0.0001),
        "accuracy": Measured(0.9 + seed / 100.0, 0.88, 0.95, 500, "classifier", floor=0.99),
        "diversity": Measured(4.0, 3.9, 4.1, 500, "digits", floor=4.5),
    }
    errors = {key: Error(figure.value + noise * NOISE) for key, figure in figures.items()}
    return EvaluationResult(name, steps, 1.0, seed, 500, figures, errors, run=f"runs/{seed}")


def latency(seconds: float) -> LatencyResult:
    return LatencyResult(seconds, 1.0 / seconds, seconds, seconds, 5, 1, 2, "CPU")


def comparison(*, timed: bool = True, systems: int = 1) -> Comparison:
    teacher = ReportRow(
        "teacher <b>", 28, 3.0, (result("teacher <b>", 28, seed=0, fid=2.0),), latency(0.4) if timed else None
    )
    students = [
        ReportRow(
            "student" if number == 0 else f"student {number}",
            2,
            1.0,
            tuple(result("student", 2, seed=seed, fid=3.0 + seed + number) for seed in range(3)),
            latency(0.04 + 0.01 * number) if timed else None,
        )
        for number in range(systems)
    ]
    rows = (teacher, *students)
    grid = SampleGrid(
        prompts=("the digit zero", "the digit one"),
        seed=0,
        names=tuple(row.label() for row in rows),
        pixels=tuple(torch.rand(2, 3, 32, 32) for _ in rows),
        real=torch.rand(2, 3, 32, 32),
    )
    differences = [{}, *({"fid": row.difference(teacher, "fid")} for row in students)]
    strips = (Strip("student, 2 steps: 5 best and 5 worst by x", torch.rand(4, 3, 32, 32)),)
    return Comparison(rows, MEASURES, tuple(differences), 0, grid, "digits, test split", extremes=strips)  # pyright: ignore[reportArgumentType]


def test_table_holds_medians_ranges_intervals_and_speed_up() -> None:
    table = results_table(comparison())
    columns = dict(zip(table.header, zip(*table.rows, strict=True), strict=True))
    assert columns["system"] == ("real images", "teacher <b>", "student")
    assert columns["FID"] == ("1.25", "2.00 [1.80, 2.20] !", "4.00 [3.00, 5.00] !")
    assert columns["KID"] == ("0.0001", "0.0020 [-0.1000, 0.1000]", "0.0040 [0.0030, 0.0050]")
    assert columns["accuracy %"] == ("99.0", "90.0 [88.0, 95.0]", "91.0 [90.0, 92.0]")
    assert columns["speed-up"] == ("-", "1.0x", "10.0x")
    assert columns["s / image"] == ("-", "0.4", "0.04")
    assert columns["seeds"] == ("-", "0", "0, 1, 2")
    assert "speed-up" not in results_table(comparison(timed=False)).header


def test_words_follow_the_interval() -> None:
    fid, accuracy, diversity = KINDS["fid"][0], KINDS["classes"][0], KINDS["classes"][1]
    assert difference_text(Difference(0.5, 0.1, 0.9), fid) == "+0.50 [+0.10, +0.90] worse"
    assert difference_text(Difference(-0.5, -0.9, -0.1), fid) == "-0.50 [-0.90, -0.10] better"
    assert difference_text(Difference(-0.5, -0.9, 0.0), fid) == "-0.50 [-0.90, +0.00] same within error"
    assert difference_text(Difference(0.02, 0.01, 0.03), accuracy) == "+2.0 [+1.0, +3.0] better"
    assert difference_text(Difference(0.2, 0.1, 0.3), diversity) == "+0.20 [+0.10, +0.30] higher"
    found = differences_table(comparison())
    assert found is not None
    # Three runs with FID 3, 4, 5 against one of 2: s / sqrt(3) = 0.58, Student's factor 4.3.
    assert found.rows[0][1].startswith("+2.00 [-0.4")
    assert found.rows[0][1].endswith("same within error")


def test_headline_says_speed_and_what_the_interval_allows() -> None:
    found = comparison(systems=3)
    (line, *others) = headline(found)
    assert line.startswith("student, 2 steps: 10.0x as fast as teacher <b>, 28 steps, guidance 3, FID 4.00, +2.00 [")
    assert line.endswith("same within error.")
    assert len(others) == 2
    # Runs of 3, 4, 5 cannot be told apart from those of 4, 5, 6 or of 5, 6, 7; single runs can.
    assert best_rows(found) == (1, 2, 3)
    single = [ReportRow(f"s{n}", 1, 1.0, (result("s", 1, seed=0, fid=3.0 + n, noise=0.0),)) for n in range(3)]
    rows = (found.rows[0], *single)
    assert best_rows(Comparison(rows, MEASURES, ({},) * 4, 0, found.grid, "x")) == (1,)
    table = short_table(found)
    assert table.header == (
        "system",
        "steps",
        "FID",
        "minus teacher <b>, 28 steps, guidance 3",
        "s / image",
        "speed-up",
    )
    assert table.rows[0][3] == "baseline"


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
    assert content["rows"][1]["results"][2]["figures"]["fid"]["value"] == 5.0
    assert content["rows"][1]["results"][2]["figures"]["fid"]["floor"] == 1.25
    assert content["rows"][1]["minus_baseline"]["fid"]["decided"] is False
    assert content["baseline"] == "teacher <b>, 28 steps, guidance 3"
    assert content["provenance"]["versions"] == {"torch": "2.15"}

    markdown = files.markdown.read_text()
    links = re.findall(r"\]\((figures/[^)]+)\)", markdown)
    assert len(links) == 6
    for link in links:
        with Image.open(files.markdown.parent / link) as picture:
            assert min(picture.size) >= 64

    page = files.html.read_text()
    assert page.count('src="data:image/png;base64,') == 6
    # The short table, all measures, and the differences.
    assert page.count("<table>") == 3
    assert len(re.findall(r"https?://|<script|<link|src=\"(?!data:)|@import|url\(", page)) == 0
    assert page.count("teacher &lt;b&gt;") >= 2
    assert page.count("&lt;a&amp;b&gt;") == 1
    assert page.count("prefers-color-scheme: dark") == 1
    assert page.isascii()


def test_report_without_timing_and_curves(tmp_path) -> None:
    files = write_report(tmp_path, comparison(timed=False), provenance=PROVENANCE)
    assert files.html.read_text().count("data:image/png") == 4
    assert len(list((tmp_path / "figures").glob("grid_*.png"))) == 3
    assert (tmp_path / "figures" / "samples.png").stat().st_size > 1000


def test_a_broken_figure_is_not_written_as_json(tmp_path) -> None:
    found = comparison()
    broken = result("x", 1, seed=0, fid=float("nan"))
    rows = (ReportRow("x", 1, 1.0, (broken,)),)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(tmp_path, Comparison(rows, MEASURES, ({},), 0, found.grid, "test"), provenance=PROVENANCE)


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
    fid = KINDS["fid"][0]
    quality = quality_figure(comparison(systems=12).rows, fid)
    assert quality is not None
    assert Image.open(io.BytesIO(quality)).size[0] > 600
    assert quality == quality_figure(comparison(systems=12).rows, fid)
    assert quality_figure(comparison(timed=False).rows, fid) is None
    # Twelve systems have a colour and a marker of their own.
    assert len(set(PALETTE)) == len(set(MARKERS)) == 12
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


def test_seeds_of_one_run_are_paired_and_no_training_runs() -> None:
    """Two seeds of each of two students: the difference is within seeds, and their distance between seeds is no
    spread.
    """
    rows = []
    for name, shift in (("a", 0.0), ("b", 0.5)):
        own = [result(name, 1, seed=seed, fid=2.0 + 10.0 * seed + shift, noise=0.01) for seed in (0, 1)]
        same = tuple(EvaluationResult(name, 1, 1.0, one.seed, 500, one.figures, one.errors, run=name) for one in own)
        rows.append(ReportRow(name, 1, 1.0, same))
    difference = rows[1].difference(rows[0], "fid")
    assert difference is not None
    assert difference.value == pytest.approx(0.5)
    assert difference.decided
    assert difference.high - difference.low < 0.1
