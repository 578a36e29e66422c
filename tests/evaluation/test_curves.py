"""Metrics files of whole, resumed and running trainings, and figures of measures against each other."""

import io
import json
import math

import pytest
from PIL import Image

from fewstep.evaluation.curves import Curve, choose_metrics, read_curves
from fewstep.evaluation.figures import PALETTE, line_style, trade_off_figure


def write(folder, records, tail=""):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return folder


def test_resumed_run_counts_the_later_record(tmp_path) -> None:
    records = [
        {"step": 1, "loss": 1.0, "lr": 0.1, "note": "start", "ok": True},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 9.0},
        {"step": 2, "loss": 0.4},
        {"step": 4, "loss": 0.3, "time": 5.0},
    ]
    curves = read_curves(write(tmp_path / "run", records, tail='{"step": 5, "lo'))
    assert curves == [
        Curve("run", "loss", (1, 2, 3, 4), (1.0, 0.4, 9.0, 0.3)),
        Curve("run", "lr", (1,), (0.1,)),
    ]


def test_numbers_that_are_not_finite_stand_as_words(tmp_path) -> None:
    records = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": "nan"}, {"step": 3, "loss": "inf", "note": "resumed"}]
    (curve,) = read_curves(write(tmp_path / "run", records))
    assert math.isnan(curve.values[1])
    assert (curve.values[0], curve.values[2]) == (1.0, math.inf)


def test_broken_files_are_errors(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"has no metrics\.jsonl"):
        read_curves(tmp_path)
    folder = write(tmp_path / "run", [{"step": 1, "loss": 1.0}, {"loss": 2.0}, {"step": 3, "loss": 1.0}])
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        read_curves(folder)


def test_losses_come_first_and_single_points_not_at_all() -> None:
    names = ("lr", "loss/fake", "grad", "critic_loss")
    curves = [Curve("r", name, (1, 2), (1.0, 2.0)) for name in names] + [Curve("r", "once", (1,), (1.0,))]
    curves.append(Curve("r", "broken", (1, 2, 3), (float("nan"), float("nan"), 1.0)))
    assert choose_metrics(curves) == ["loss/fake", "critic_loss", "lr", "grad"]
    assert choose_metrics(curves, limit=1) == ["loss/fake"]


def test_trade_offs_need_all_measures_of_every_run() -> None:
    curves = [Curve(run, name, (0, 1), (1.0, 2.0)) for run in ("a", "b") for name in ("fid", "reward", "held_out")]
    picture = Image.open(io.BytesIO(trade_off_figure(curves, x="fid", panels=("reward", "held_out"))))
    assert picture.size[0] > 2 * picture.size[1]
    with pytest.raises(ValueError, match=r"no curve for \('b', 'held_out'\)"):
        trade_off_figure(curves[:-1], x="fid", panels=("reward", "held_out"))


def test_lines_beyond_the_palette_have_other_dashes() -> None:
    styles = [line_style(number) for number in range(2 * len(PALETTE))]
    assert len(set(styles)) == 2 * len(PALETTE)
    assert styles[0] == (PALETTE[0], "-")
