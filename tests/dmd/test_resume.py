"""Runs that are killed, stopped and continued end exactly as the run that nobody disturbed."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fewstep.core.config import save_resolved
from fewstep.core.training.checkpoint import Checkpoint, list_checkpoints, load_checkpoint
from fewstep.core.training.run_directory import read_metrics
from tests.dmd.run_server import SCRIPT, RunServer
from tests.dmd.tiny_run import TinyInputs, assert_same_checkpoint, measured, tiny_config

# Processes of their own are slow on a busy machine.
pytestmark = pytest.mark.timeout(600)

STEPS = 14
KILLS = 6
CHANGES = {"student.steps": 2, "run.steps": STEPS, "run.checkpoint_every": 3, "run.sample_every": 5}


def write_config(inputs: TinyInputs, folder: Path) -> Path:
    """A configuration whose run directory is `folder / run`."""
    folder.mkdir(exist_ok=True)
    save_resolved(folder / "config.yaml", tiny_config(inputs, folder / "run", CHANGES))
    return folder / "config.yaml"


def last_checkpoint(run: Path) -> Checkpoint:
    return load_checkpoint(list_checkpoints(run)[-1])


def finished_steps(run: Path) -> int:
    """Lines of metrics that a run in progress has written, those without a measurement left out."""
    path = run / "metrics.jsonl"
    return path.read_text(encoding="utf-8").count('"fake_score_loss"') if path.is_file() else 0


def unfinished_folders(run: Path) -> set[tuple[str, int]]:
    """Checkpoints that are being written, or were when a run was killed: name and time of creation."""
    found = run.glob(".checkpoint-*.partial")
    with contextlib.suppress(FileNotFoundError):
        return {(path.name, path.stat().st_ctime_ns) for path in found}
    return set()


@pytest.fixture(scope="module")
def undisturbed(inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that the plain script made from start to end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, str(SCRIPT), "--config", str(write_config(inputs, folder))]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


def assert_equal_runs(run: Path, undisturbed: Path) -> None:
    assert_same_checkpoint(last_checkpoint(run), last_checkpoint(undisturbed))
    assert [record["step"] for record in measured(run)] == list(range(1, STEPS + 1))
    assert measured(run) == measured(undisturbed)
    steps = [record["step"] for record in read_metrics(run / "metrics.jsonl")]
    assert steps == sorted(steps)
    assert sorted(path.name for path in (run / "samples").iterdir()) == [f"step-{n:07d}.png" for n in (0, 5, 10)]


@pytest.mark.slow
def test_undisturbed_run_is_complete(undisturbed: Path) -> None:
    assert [path.name for path in list_checkpoints(undisturbed)] == [f"checkpoint-{n}" for n in (3, 6, 9, 12, 14)]
    state = last_checkpoint(undisturbed).state
    assert state["samples"] == 4 * STEPS
    assert [state["roles"][name]["updates"] for name in ("student", "fake_score")] == [7, 14]


@pytest.mark.slow
def test_killed_at_any_moment_ends_bit_identical(
    inputs: TinyInputs, server: RunServer, undisturbed: Path, tmp_path: Path
) -> None:
    """SIGKILL after random delays: at the start, within steps, and while a checkpoint is written."""
    config, run, chance = write_config(inputs, tmp_path), tmp_path / "run", random.Random(0)
    code, kills, resumes = -9, 0, 0
    while code != 0:
        resume = ["--resume", "latest"] if list_checkpoints(run) else []
        resumes += len(resume) // 2
        started = server.start("--config", str(config), *resume, log=tmp_path / f"log-{kills}.txt")
        if kills < KILLS:
            started.wait_until(moment(run, kills, chance))
            started.signal(signal.SIGKILL)
        code = started.wait()
        assert code in (0, -9), started.log.read_text(encoding="utf-8")[-3000:]
        kills += code == -9
    assert kills >= KILLS - 1
    assert resumes >= 2
    assert len(unfinished_folders(run)) == 0
    assert_equal_runs(run, undisturbed)


def moment(run: Path, number: int, chance: random.Random) -> Callable[[], bool]:
    """When to kill: every second time while a checkpoint is written, else a random time after a random step."""
    before, old, delay = finished_steps(run), unfinished_folders(run), chance.uniform(0.0, 0.1)
    steps = before + (0 if number == 0 else chance.randint(1, 3))
    since: list[float] = []

    def has_come() -> bool:
        if number % 2:
            return len(unfinished_folders(run) - old) > 0
        if finished_steps(run) >= steps:
            since.append(time.monotonic())
        return len(since) > 0 and since[-1] - since[0] >= delay

    return has_come


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_and_the_run_goes_on_bit_identical(
    inputs: TinyInputs, server: RunServer, undisturbed: Path, tmp_path: Path, number: int, code: int
) -> None:
    config, run = write_config(inputs, tmp_path), tmp_path / "run"
    started = server.start("--config", str(config), log=tmp_path / "log-0.txt")
    started.wait_until(lambda: finished_steps(run) >= 4)
    started.signal(number)
    assert started.wait() == code
    step = last_checkpoint(run).step
    assert 4 <= step < STEPS
    assert len(measured(run)) == step
    assert f"signal {number}: stopping after step {step}" in started.log.read_text(encoding="utf-8")

    again = server.start("--config", str(config), "--resume", "latest", log=tmp_path / "log-1.txt")
    assert again.wait() == 0, again.log.read_text(encoding="utf-8")[-3000:]
    assert_equal_runs(run, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ("latest", "--resume latest: {run} holds no checkpoint; leave --resume out to start a new run"),
        ("nowhere/checkpoint-3", "--resume nowhere/checkpoint-3: no such checkpoint; checkpoints of {run}: none"),
    ],
)
def test_resume_from_nothing_is_an_error(
    inputs: TinyInputs, server: RunServer, tmp_path: Path, resume: str, message: str
) -> None:
    config, run = write_config(inputs, tmp_path), tmp_path / "run"
    started = server.start("--config", str(config), "--resume", resume, log=tmp_path / "log.txt")
    assert started.wait() == 1
    assert message.format(run=run) in started.log.read_text(encoding="utf-8")
    assert not run.exists()


@pytest.mark.slow
def test_new_run_does_not_overwrite_an_old_one(inputs: TinyInputs, server: RunServer, undisturbed: Path) -> None:
    log = undisturbed.parent / "again.txt"
    started = server.start("--config", str(undisturbed.parent / "config.yaml"), log=log)
    assert started.wait() == 1
    assert "already holds a run up to checkpoint-14" in log.read_text(encoding="utf-8")
    assert len(measured(undisturbed)) == STEPS
