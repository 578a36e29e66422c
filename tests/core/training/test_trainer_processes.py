"""Signals, and several processes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fewstep.core.config import RunConfig
from fewstep.core.training.checkpoint import load_checkpoint
from fewstep.core.training.interrupt import Interrupt
from fewstep.core.training.run_directory import read_metrics
from fewstep.core.training.trainer import Trainer


@pytest.fixture(scope="module")
def toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("toy_run", Path(__file__).with_name("toy_run.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def signal_handlers_stay():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
        signal.signal(number, handler)


def metrics_of(run: RunConfig) -> list[dict]:
    records = read_metrics(Path(run.directory) / "metrics.jsonl")
    timed = ("seconds_per_step",)
    return [{name: value for name, value in record.items() if name not in timed} for record in records]


def assert_same_checkpoint(left: Path, right: Path) -> None:
    first, second = load_checkpoint(left), load_checkpoint(right)
    assert first.step == second.step
    assert first.state == second.state
    assert first.tensors.keys() == second.tensors.keys()
    for name, group in first.tensors.items():
        assert group.keys() == second.tensors[name].keys()
        for key, tensor in group.items():
            assert torch.equal(tensor, second.tensors[name][key]), (name, key)


def test_second_signal_is_ignored_at_first() -> None:
    # A shell starts what runs in its background with SIGINT ignored, so the handler need not be Python's own.
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        assert interrupt.signum == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert interrupt.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_run_goes_on_exactly(toy: ModuleType, tmp_path: Path, number: signal.Signals) -> None:
    def before_step(trainer: Trainer, student, fake) -> None:
        if trainer.step == 4:
            os.kill(os.getpid(), number)

    whole, part = (toy.run_config(tmp_path / name, checkpoint_every=100) for name in ("whole", "part"))
    toy.train(whole)
    code = toy.train(part, before_step=before_step)[3]
    assert code == 128 + number
    assert metrics_of(part)[-1] == {"step": 5, "note": f"signal {int(number)}: stopping after step 5"}
    toy.train(dataclasses.replace(part, resume="latest"))
    assert_same_checkpoint(tmp_path / "whole" / "checkpoint-6", tmp_path / "part" / "checkpoint-6")


@pytest.mark.slow
def test_sigterm_to_a_process_in_bf16(toy: ModuleType, tmp_path: Path) -> None:
    """Exit code and checkpoint; autocast computes in bf16 while weights stay in fp32."""
    script = textwrap.dedent(
        """
        import sys, time
        from toy_run import run_config, train
        run = run_config(sys.argv[1], steps=2000, checkpoint_every=10000, mixed_precision="bf16")
        seen = set()
        def before_step(trainer, student, fake):
            if trainer.step == 0:
                student.module.net[0].register_forward_hook(lambda net, inputs, output: seen.add(str(output.dtype)))
            if trainer.step == 3:
                print("ready", *seen, *{str(parameter.dtype) for _, parameter in student.parameters}, flush=True)
            time.sleep(0.01)
        sys.exit(train(run, before_step=before_step)[3])
        """
    )
    (tmp_path / "toy.py").write_text(script)
    command = [sys.executable, str(tmp_path / "toy.py"), str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        line = ""
        while not line.startswith("ready"):
            assert process.poll() is None
            line = process.stdout.readline()
        process.terminate()
        process.stdout.read()
        assert process.wait(timeout=60) == 143
    assert line.split() == ["ready", "torch.bfloat16", "torch.float32"]
    saved = [path.name for path in (tmp_path / "run").glob("checkpoint-*")]
    assert len(saved) == 1
    step = int(saved[0].removeprefix("checkpoint-"))
    assert 3 < step < 2000
    note = metrics_of(toy.run_config(tmp_path / "run"))[-1]["note"]
    assert note == f"signal 15: stopping after step {step}"
    assert load_checkpoint(tmp_path / "run" / saved[0]).tensors["student"]["net.0.bias"].dtype == torch.float32


TWO_PROCESSES = textwrap.dedent(
    """
    import json, os, signal, sys
    from pathlib import Path
    import torch
    from toy_run import run_config, train
    def check(trainer, student, fake):
        if trainer.step == 0:
            # Every process made its own weights; those of process 0 count, in the EMA too.
            assert [round(float(net.module.scale), 4) for net in (student, fake)] == [1.1, 2.1]
        assert [round(float(net.module.frozen[0]), 4) for net in (student, fake)] == [0.1, 1.1]
        if trainer.step == 4:
            for tensor in [*student.ema.state_dict().values(), *fake.module.parameters()]:
                spread = (tensor.detach() - trainer.mean_over_ranks(tensor)).abs().max()
                assert float(spread) == 0.0, spread
            assert trainer.broadcast_int(trainer.rank + 40) == 40
            assert trainer.mean_over_ranks(torch.tensor(float(trainer.rank))) == 0.5
            seen.append([trainer.world_size, type(student.wrapped).__name__])
            if trainer.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
    seen, directory = [], sys.argv[1]
    run = run_config(directory, gradient_accumulation=2)
    trainer, _, _, code, _ = train(run, before_step=check)
    # Lines of two processes would mix on one terminal.
    Path(f"{directory}-{trainer.rank}.json").write_text(json.dumps([*seen, code]))
    """
)


def environment() -> dict[str, str]:
    """That of a process which finds toy_run."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}


@pytest.mark.slow
def test_two_processes_equal_one(toy: ModuleType, tmp_path: Path) -> None:
    """Weights, EMA and losses; a signal to process 1 alone stops both, and one process goes on from there.

    With --cpu `accelerate launch` starts one process whatever is asked for, so the script itself asks for the CPU.
    """
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    # Port 0 is any free one, so that two runs of the tests on one machine do not meet.
    options += ["--dynamo_backend", "no", "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(tmp_path / "two.py")]
    command.append(str(tmp_path / "two"))
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=150, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        assert json.loads((tmp_path / f"two-{rank}.json").read_text()) == [[2, "DistributedDataParallel"], 143]
    one, two = toy.run_config(tmp_path / "one"), toy.run_config(tmp_path / "two")
    stopped = load_checkpoint(tmp_path / "two" / "checkpoint-5")
    assert stopped.tensors["generators"]["cpu"].shape == (2, torch.get_rng_state().numel())
    toy.train(one)
    toy.train(dataclasses.replace(two, resume="latest"))
    records = [record for record in metrics_of(two) if "note" not in record]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    for left, right in zip(metrics_of(one), records, strict=True):
        assert left == pytest.approx(right, abs=1e-6)
    left, right = (load_checkpoint(tmp_path / name / "checkpoint-6") for name in ("one", "two"))
    for name in ("student", "fake", "student_ema"):
        for key in left.tensors[name]:
            torch.testing.assert_close(left.tensors[name][key], right.tensors[name][key], rtol=1e-5, atol=1e-6)
