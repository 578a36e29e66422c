from __future__ import annotations

import dataclasses
import importlib.util
import os
import signal
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from fewstep.core.config import OptimizerConfig, RunConfig
from fewstep.core.training.checkpoint import load_checkpoint, save_checkpoint
from fewstep.core.training.metrics import MetricWindow
from fewstep.core.training.progress import duration_text
from fewstep.core.training.roles import frozen, memory_table, scheduled_rate
from fewstep.core.training.run_directory import RunDirectory, read_metrics
from fewstep.core.training.trainer import NonFiniteError, Trainer


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


@pytest.mark.parametrize(("stop_after", "log_every"), [(3, 1), (4, 4), (5, 3)])
def test_resumed_run_is_bit_identical(toy: ModuleType, tmp_path: Path, stop_after: int, log_every: int) -> None:
    """Weights, EMA, Adam state, generators (dropout draws from them) and metrics."""
    whole = toy.run_config(tmp_path / "whole", log_every=log_every)
    toy.train(whole, dropout=0.3)
    part = toy.run_config(tmp_path / "part", log_every=log_every)
    toy.train(part, dropout=0.3, stop_after=stop_after)
    torch.manual_seed(999)
    _, student, _, code, extra = toy.train(dataclasses.replace(part, resume="latest"), dropout=0.3)
    assert code == 0
    assert extra == {"note": stop_after}
    assert student.updates == 3
    assert_same_checkpoint(tmp_path / "whole" / "checkpoint-6", tmp_path / "part" / "checkpoint-6")
    assert metrics_of(whole) == metrics_of(part)
    names = load_checkpoint(tmp_path / "part" / "checkpoint-6").tensors
    assert sorted(names) == ["fake", "fake_optimizer", "generators", "student", "student_ema", "student_optimizer"]


def test_going_back_to_an_earlier_checkpoint_repeats_the_run(toy: ModuleType, tmp_path: Path) -> None:
    run = toy.run_config(tmp_path)
    toy.train(run)
    first = metrics_of(run)
    toy.train(dataclasses.replace(run, resume=str(tmp_path / "checkpoint-3")))
    assert [record["step"] for record in metrics_of(run) if "note" not in record] == [1, 2, 3, 4, 5, 6]
    assert [record for record in metrics_of(run) if "note" not in record] == first
    assert_same_checkpoint(tmp_path / "checkpoint-6", tmp_path / "checkpoint-6.abandoned")


def test_learning_rate_ema_and_frozen_weights(toy: ModuleType, tmp_path: Path) -> None:
    rates = []
    _, student, fake, _, _ = toy.train(
        toy.run_config(tmp_path, steps=7),
        before_step=lambda trainer, student, fake: rates.append(student.optimizer.param_groups[0]["lr"]),
    )
    # The student is updated in steps 0, 2, 4, 6 with 1/3, 2/3, 1 and 1 of its learning rate.
    assert rates == pytest.approx([0.02, 0.02 / 3, 0.02 / 3, 0.04 / 3, 0.04 / 3, 0.02, 0.02])
    warmup = OptimizerConfig(learning_rate=3.0, warmup_steps=3)
    assert [scheduled_rate(warmup, n, total=5) for n in range(5)] == [1, 2, 3, 3, 3]
    cosine = OptimizerConfig(learning_rate=2.0, decay="cosine")
    assert [scheduled_rate(cosine, n, total=4) for n in (0, 2, 4, 9)] == pytest.approx([2, 1, 0, 0])
    assert torch.equal(student.module.frozen, torch.full((3,), 0.1))
    assert len(student.parameters) == 4
    assert student.updates == 4
    assert fake.updates == 7
    assert fake.ema is None


def test_weights_of_the_ema_follow_the_updates(toy: ModuleType, tmp_path: Path) -> None:
    expected, weights = [], []
    _, student, _, _, _ = toy.train(
        toy.run_config(tmp_path),
        before_step=lambda trainer, student, fake: weights.append(student.module.net[0].bias.detach().clone()),
    )
    # ema_start is 1: after the first update the average is the weight, then decays with 0.9.
    after = [weights[1], weights[3], weights[5]]
    expected = after[0]
    for weight in after[1:]:
        expected = 0.9 * expected + 0.1 * weight
    assert student.ema is not None
    torch.testing.assert_close(student.ema.state_dict()["net.0.bias"], expected, rtol=1e-6, atol=1e-7)
    assert float((expected - after[-1]).abs().max()) > 1e-3


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_is_exact_for_both_optimizers(toy: ModuleType, tmp_path: Path, accumulation: int) -> None:
    whole, sliced = toy.run_config(tmp_path / "a"), toy.run_config(tmp_path / "b", gradient_accumulation=accumulation)
    toy.train(whole)
    toy.train(sliced)
    for left, right in zip(metrics_of(whole), metrics_of(sliced), strict=True):
        assert left == pytest.approx(right, abs=1e-6)
    left, right = (load_checkpoint(tmp_path / name / "checkpoint-6").tensors for name in "ab")
    for name in ("student", "fake", "student_ema"):
        for key in left[name]:
            torch.testing.assert_close(left[name][key], right[name][key], rtol=1e-5, atol=1e-6)


def test_gradient_norm_and_clip(toy: ModuleType, tmp_path: Path) -> None:
    trainer = Trainer(toy.run_config(tmp_path, log_every=2), RunDirectory(tmp_path), cpu=True)
    module = nn.Linear(2, 1, bias=False)
    settings = OptimizerConfig(learning_rate=0.5, betas=(0.0, 0.0), weight_decay=0.0, clip=1.0)
    role = trainer.add_role("linear", module, settings)
    before = module.weight.detach().clone()
    trainer.backward((module.weight * torch.tensor([[3.0, -4.0]])).sum())
    assert trainer.update(role) == pytest.approx(5.0)
    # With betas of 0 AdamW moves by the learning rate against the gradient's sign, whatever its size.
    torch.testing.assert_close(module.weight.detach(), before - 0.5 * torch.tensor([[1.0, -1.0]]), rtol=0, atol=1e-5)
    assert module.weight.grad is None
    with pytest.raises(ValueError, match="role linear: no gradient; call backward"):
        trainer.update(role)
    with pytest.raises(ValueError, match="role linear exists already"):
        trainer.add_role("linear", nn.Linear(2, 1), settings)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        trainer.add_role("frozen", nn.Linear(2, 1).requires_grad_(False), settings)
    with pytest.raises(ValueError, match=r"parameter weight is torch\.bfloat16; keep trained weights in fp32"):
        trainer.add_role("half", nn.Linear(2, 1).to(torch.bfloat16), settings)
    assert trainer.broadcast_int(7) == 7
    assert trainer.mean_over_ranks(torch.tensor([2.0])).tolist() == [2.0]
    trainer.close()


@pytest.mark.parametrize("poison", ["input", "gradient"])
def test_nan_is_an_error_before_weights_change(toy: ModuleType, tmp_path: Path, poison: str) -> None:
    run = toy.run_config(tmp_path)
    seen = {}

    def before_step(trainer: Trainer, student, fake) -> None:
        if trainer.step == 4:
            if poison == "input":
                fake.module.scale.fill_(float("nan"))
            else:
                student.module.net[3].weight.register_hook(lambda gradient: gradient * float("inf"))
            seen.update({name: tensor.clone() for name, tensor in student.module.state_dict().items()})
            seen["role"] = student

    with pytest.raises(NonFiniteError) as raised:
        toy.train(run, before_step=before_step)
    message = str(raised.value)
    expected = {"input": "step 4: student loss is", "gradient": "step 4: gradient of student: net.3.weight is"}[poison]
    assert message.startswith(f"{expected} not finite; no weight was changed by it")
    assert f"--resume {tmp_path / 'checkpoint-3'}" in message
    role = seen.pop("role")
    assert len(seen) == 6
    assert all(torch.equal(tensor, seen[name]) for name, tensor in role.module.state_dict().items())
    assert role.updates == 2
    assert load_checkpoint(tmp_path / "checkpoint-3").step == 3


def test_indices_split_the_global_batch(toy: ModuleType, tmp_path: Path) -> None:
    trainer = Trainer(toy.run_config(tmp_path, gradient_accumulation=2), RunDirectory(tmp_path), cpu=True)
    assert trainer.local_indices(3, 8) == list(range(24, 32))
    assert trainer.micro_batches(trainer.local_indices(0, 6)) == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match=r"given 7, allowed are multiples of 2 \(1 processes"):
        trainer.local_indices(0, 7)
    trainer.rank, trainer.world_size = 1, 2
    assert trainer.local_indices(1, 8) == [12, 13, 14, 15]
    trainer.close()


def test_resume_refuses_another_run(toy: ModuleType, tmp_path: Path) -> None:
    run = toy.run_config(tmp_path, steps=1)
    toy.train(run)
    path = tmp_path / "checkpoint-1"
    for name, value in (("seed", 6), ("batch_size", 4)):
        with pytest.raises(ValueError, match=rf"run\.{name}: given {value}, but .* has"):
            toy.train(dataclasses.replace(run, resume="latest", **{name: value}))
    checkpoint = load_checkpoint(path)
    for name, change, message in (
        ("student", {"extra": torch.ones(1)}, r"has 1 others \['extra'\]"),
        ("student", {"net.0.bias": torch.ones(4)}, r"net\.0\.bias is \(4,\) torch\.float32 in the checkpoint"),
        ("student_ema", {"extra": torch.ones(1)}, r"1 unexpected \['extra'\]"),
    ):
        tensors = {**checkpoint.tensors, name: {**checkpoint.tensors[name], **change}}
        save_checkpoint(tmp_path, 1, tensors=tensors, state=checkpoint.state, keep=1)
        with pytest.raises(ValueError, match=message):
            toy.train(dataclasses.replace(run, resume="latest"))
    state = {**checkpoint.state, "roles": {"student": checkpoint.state["roles"]["student"]}}
    save_checkpoint(tmp_path, 1, tensors=checkpoint.tensors, state=state, keep=1)
    with pytest.raises(ValueError, match=r"holds roles \['student'\], this run has \['fake', 'student'\]"):
        toy.train(dataclasses.replace(run, resume="latest"))


def test_full_disk_keeps_the_previous_checkpoint(toy: ModuleType, tmp_path: Path, monkeypatch) -> None:
    def before_step(trainer: Trainer, student, fake) -> None:
        if trainer.step == 5:
            monkeypatch.setattr("shutil.disk_usage", lambda path: os.terminal_size((0, 0)) and Room(free=10))

    @dataclasses.dataclass
    class Room:
        free: int

    with pytest.raises(OSError, match=r"free some space, lower keep_checkpoints"):
        toy.train(toy.run_config(tmp_path), before_step=before_step)
    assert load_checkpoint(tmp_path / "checkpoint-3").step == 3
    assert not (tmp_path / "checkpoint-6").exists()


def test_time_limit_stops_with_a_checkpoint(toy: ModuleType, tmp_path: Path) -> None:
    run = toy.run_config(tmp_path, max_seconds=0.5, steps=10**6, checkpoint_every=10**6, log_every=10**6)
    started = time.monotonic()
    trainer, _, _, code, _ = toy.train(run)
    assert code == 0
    assert 0.5 <= time.monotonic() - started < 10
    assert load_checkpoint(tmp_path / f"checkpoint-{trainer.step}").step == trainer.step > 0
    assert metrics_of(run)[-1]["note"] == f"max_seconds 0.5 are over: stopping after step {trainer.step}"


def test_metrics_are_means_of_the_window(toy: ModuleType, tmp_path: Path) -> None:
    trainer = Trainer(toy.run_config(tmp_path, log_every=3, steps=4), RunDirectory(tmp_path), cpu=True)
    logged = []
    for step in range(4):
        trainer.advance()
        metrics = {"loss": torch.tensor(float(step))}
        logged.append(trainer.log({**metrics, "rare": 8.0} if step == 1 else metrics))
    assert logged == [None, None, {"loss": 1.0, "rare": 8.0}, {"loss": 3.0}]
    assert [record["step"] for record in metrics_of(trainer.run)] == [3, 4]
    with pytest.raises(ValueError, match=r"metric loss has shape \(2,\)"):
        MetricWindow().add({"loss": torch.zeros(2)})
    trainer.close()


def test_close_may_be_called_again(toy: ModuleType, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    trainer, *_, code, _ = toy.train(toy.run_config(tmp_path, steps=1))
    trainer.close()
    trainer.close()
    assert code == 0
    assert signal.getsignal(signal.SIGTERM) == before


def test_memory_report_counts_parameters_and_bytes(toy: ModuleType, tmp_path: Path) -> None:
    trainer, _, _ = toy.build(toy.run_config(tmp_path))
    rows = trainer.memory_report({"teacher": nn.Linear(10, 10, dtype=torch.bfloat16)})
    trainer.close()
    teacher, student, fake = rows
    assert (teacher.parameters, teacher.trainable, teacher.total_bytes) == (110, 0, 220)
    assert (student.parameters, student.trainable) == (41, 38)
    assert (student.weight_bytes, student.gradient_bytes, student.optimizer_bytes) == (42 * 4, 38 * 4, 38 * 8)
    assert (student.ema_bytes, fake.ema_bytes) == (39 * 4, 0)
    assert len(memory_table(rows).splitlines()) == 5


def test_frozen_lets_gradients_through_and_collects_none() -> None:
    module, x = nn.Linear(2, 1), torch.ones(1, 2, requires_grad=True)
    module.bias.requires_grad_(False)
    with frozen(module):
        module(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, module.weight.detach())
    assert module.weight.grad is None
    assert [parameter.requires_grad for parameter in module.parameters()] == [True, False]


def test_progress_counts_finished_steps(toy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy.train(toy.run_config(tmp_path, steps=4, log_every=2))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["2/4", "4/4"]
    assert all(part in lines[0] for part in ("fake_loss", "student_loss", "mem", "s/step", "ETA 0:00:0"))
    shown = [duration_text(seconds) for seconds in (0, 59.6, 3600, 90061)]
    assert shown == ["0:00:00", "0:01:00", "1:00:00", "25:01:01"]
