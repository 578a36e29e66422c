"""The file in which processes keep the tiles that they measured."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from fewstep.kernels.tuning import winners
from fewstep.kernels.tuning.table import TileConfig

FIRST, SECOND = TileConfig(64, 32, 4, 2), TileConfig(128, 32, 8, 2, early=True)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fails() -> TileConfig:
    raise AssertionError("measured again")


def test_a_winner_is_measured_once_and_kept(folder: Path) -> None:
    assert winners.kept_winner("jvp", (FIRST, SECOND), lambda: SECOND) == SECOND
    assert winners.kept_winner("jvp", (FIRST, SECOND), fails) == SECOND
    assert winners.kept_winner("dq", (FIRST,), lambda: FIRST) == FIRST
    kept = json.loads((folder / "attention_tiles.json").read_text(encoding="utf-8"))
    assert len(kept) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["attention_tiles.json", "attention_tiles.lock"]


def test_what_is_no_candidate_or_of_other_kernels_is_measured_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    winners.kept_winner("jvp", (FIRST, SECOND), lambda: SECOND)
    assert winners.kept_winner("jvp", (FIRST,), lambda: FIRST) == FIRST
    monkeypatch.setattr(winners, "made_by", lambda: "another compiler")
    assert winners.kept_winner("jvp", (FIRST, SECOND), lambda: SECOND) == SECOND
    assert len(json.loads((folder / "attention_tiles.json").read_text(encoding="utf-8"))) == 2


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"jvp', '{"x": {"query_tile": "../.."}}'])
def test_a_damaged_file_is_replaced(folder: Path, content: str) -> None:
    folder.mkdir()
    (folder / "attention_tiles.json").write_text(content, encoding="utf-8")
    assert winners.kept_winner("jvp", (FIRST,), lambda: FIRST) == FIRST
    assert winners.kept_winner("jvp", (FIRST,), fails) == FIRST


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="each process measures tiles of attention for itself .* set FEWSTEP_CACHE"):
        assert winners.kept_winner("jvp", (FIRST,), lambda: FIRST) == FIRST


def test_what_was_measured_is_not_measured_again_where_it_cannot_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(winners, "write", full)
    with pytest.warns(UserWarning, match="no space left"):
        assert winners.kept_winner("jvp", (FIRST,), lambda: measured.append(0) or FIRST) == FIRST
    assert len(measured) == 1


def test_without_the_variable_it_lies_in_the_users_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FEWSTEP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert winners.winners_file() == tmp_path / "xdg" / "fewstep" / "attention_tiles.json"


def measure_slowly(folder: str, counted: str) -> None:
    os.environ["FEWSTEP_CACHE"] = folder

    def measure() -> TileConfig:
        with Path(counted).open("a", encoding="utf-8") as file:
            file.write("x")
        time.sleep(0.3)
        return SECOND

    assert winners.kept_winner("jvp", (FIRST, SECOND), measure) == SECOND


def test_processes_measure_once_between_them(folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    arguments = (str(folder), str(tmp_path / "counted"))
    processes = [context.Process(target=measure_slowly, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "counted").read_text(encoding="utf-8") == "x"
