"""The loop of the reward methods on a tiny student: what moves, and what its steps are equal to."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.export.run import export_run
from fewstep.core.training.checkpoint import load_checkpoint
from fewstep.core.training.run_directory import read_metrics
from fewstep.dmd.reward.config import RewardMatchingConfig, RewardRunConfig
from fewstep.dmd.reward.methods.table import needs_of
from fewstep.dmd.reward.monitor import Measured, RewardWatch
from fewstep.dmd.reward.setup import RewardData
from fewstep.dmd.reward.train import train_reward, train_step
from tests.dmd.reward.reward_run import MATCHED, METHODS, reward_config, started, write_student
from tests.dmd.tiny_run import TinyInputs


@pytest.fixture(scope="module")
def student(inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a two-step student."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return write_student(inputs, tmp_path_factory.mktemp("student") / "run")


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def moved(module: nn.Module, before: dict[str, Tensor]) -> float:
    """Share of the parameters that changed."""
    pairs = [(parameter, before[name]) for name, parameter in module.named_parameters()]
    return sum(not torch.equal(left, right) for left, right in pairs) / len(pairs)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_only_what_the_method_trains_moves(inputs: TinyInputs, student: Path, tmp_path: Path, method: str) -> None:
    """Student in each step; fake score where there is matching; old policies behind it; teacher and start never."""
    config = reward_config(inputs, student, tmp_path, method)
    with started(config) as (parts, trainer):
        setup = parts.setup
        networks = {"student": setup.student_role.module, "teacher": setup.teacher.denoiser}
        for name, role in {"fake": setup.fake_role, **setup.snapshots}.items():
            if role is not None:
                networks[name] = role.module
        if setup.reference is not None:
            networks["reference"] = setup.reference
        origin = load_checkpoint(student / "checkpoint-2").tensors
        for name, weight in setup.student_role.parameters:
            assert torch.equal(weight, origin["student_ema"][name])
        for _ in range(3):
            before = {name: weights_of(module) for name, module in networks.items()}
            metrics = train_step(parts, trainer)
            trainer.advance()
            share = {name: moved(module, before[name]) for name, module in networks.items()}
            assert share["student"] > 0.9
            assert share["teacher"] == share.get("reference", 0.0) == 0.0
            assert min(share.get(name, 1.0) for name in ("fake", "old_policy", "sampling")) > 0.9
            assert torch.isfinite(torch.tensor([float(value) for value in metrics.values()])).all()
            if "ratio_deviation" in metrics:
                # On the policy's own samples the ratio is one, and nothing is clipped.
                assert float(metrics["ratio_deviation"]) < 1e-6
                assert float(metrics["clipped_share"]) == 0.0
        updates = setup.fake_role.updates if setup.fake_role is not None else 0
    assert updates == (6 if config.matching is not None else 0)
    assert ("old_policy" in networks, "sampling" in networks) == (method in ("nft", "crd"), method == "crd")
    assert ("reference" in networks) == (method in ("nft", "crd", "flow_grpo", "euphonium", "flash"))


def run_steps(config: RewardRunConfig, count: int) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Metrics of some steps and the student's weights after them."""
    with started(config) as (method, trainer):
        found = []
        for _ in range(count):
            metrics = train_step(method, trainer)
            found.append({name: float(value) for name, value in metrics.items()})
            trainer.advance()
        return found, weights_of(method.setup.student_role.module)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gndm", "crd", "rtdmd"])
def test_two_slices_equal_one(inputs: TinyInputs, student: Path, tmp_path: Path, method: str) -> None:
    """Groups, shared draws and advantages do not know how a step is cut."""
    whole, expected = run_steps(reward_config(inputs, student, tmp_path / "whole", method), 2)
    changes = {"run.gradient_accumulation": 2, "reward.overlap": False}
    parts, found = run_steps(reward_config(inputs, student, tmp_path / "parts", method, changes), 2)
    for left, right in zip(parts, whole, strict=True):
        # Adam moves an element of the fake score whose gradient is only rounding as far as the others.
        assert left["student_loss"] == pytest.approx(right["student_loss"], rel=1e-3, abs=5e-5)
        assert left.get("reward", 0.0) == pytest.approx(right.get("reward", 0.0), rel=1e-5)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=2e-5, msg=name)


def test_weights_without_a_tilt_are_plain_matching(inputs: TinyInputs, student: Path, tmp_path: Path) -> None:
    """redmd with tilt_scale 0 in its first step minimises what gndm does without policy and with equal normalisers."""
    plain = reward_config(inputs, student, tmp_path / "plain", "redmd", {"redmd.tilt_scale": 0.0})
    tilted = reward_config(inputs, student, tmp_path / "tilted", "redmd", {"redmd.tilt_scale": 2.0})
    (left,), _ = run_steps(plain, 1)
    (right,), _ = run_steps(tilted, 1)
    assert left["effective_share"] == pytest.approx(1.0)
    assert right["effective_share"] < 0.99
    # The same samples and scores; half the mean square of the normalised direction is the untilted loss.
    assert left["matching_gradient_rms"] == right["matching_gradient_rms"]
    assert left["student_loss"] == pytest.approx(0.5 * left["matching_gradient_rms"] ** 2, rel=1e-5)
    assert abs(right["student_loss"] / left["student_loss"] - 1) > 1e-3


@pytest.mark.slow
def test_saliency_without_places_weighs_nothing(inputs: TinyInputs, student: Path, tmp_path: Path) -> None:
    """Every pixel moves the ink as much as every other: Stream-R1 is then Re-DMD."""
    plain, expected = run_steps(reward_config(inputs, student, tmp_path / "plain", "redmd"), 2)
    changes = {"redmd.saliency": True}
    same, found = run_steps(reward_config(inputs, student, tmp_path / "same", "redmd", changes), 2)
    assert same[1]["student_loss"] == pytest.approx(plain[1]["student_loss"], rel=1e-5)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=2e-5, msg=name)


def test_several_updates_on_one_rollout_leave_the_ratio(inputs: TinyInputs, student: Path, tmp_path: Path) -> None:
    changes = {"student.updates_per_rollout": 3, "flow_grpo.clip_range": 10.0}
    with started(reward_config(inputs, student, tmp_path, "flow_grpo", changes)) as (method, trainer):
        metrics = train_step(method, trainer)
        role = method.setup.student_role
        assert (role.updates, role.total_updates) == (3, 12)
    assert 1e-6 < float(metrics["ratio_deviation"]) < 0.1


CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "gdpo": ("flow_grpo", {"reward.combination": "gdpo", "reward.chunk": 3}),
    "ode": ("flow_grpo", {"student.sampler": "ode", "flow_grpo.transition": "flow_sde"}),
    "dance": (
        "euphonium",
        {"student.sampler": "ode", "euphonium.transition": "dance_sde", "euphonium.noise_scale": 0.3},
    ),
    "adaptive": ("nft", {"nft.adaptive": True}),
    "cps": ("rtdmd", {"rtdmd.transition": "cps", "rtdmd.eta": 0.8}),
    "x0": ("rtdmd", {"matching.ambient": None, "rtdmd.direct": None}),
    "anchored": ("nft", {**MATCHED, "matching": RewardMatchingConfig(weight=0.5)}),
    "ambient anchor": ("crd", {**MATCHED, "matching": METHODS["rtdmd"]["matching"]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_variants_make_steps_of_finite_size(inputs: TinyInputs, student: Path, tmp_path: Path, name: str) -> None:
    method, changes = CHANGES[name]
    start = student if "student.sampler" not in changes else student / "checkpoint-2" / "student_ema.safetensors"
    config = reward_config(inputs, start, tmp_path, method, changes)
    found, _ = run_steps(config, 2)
    assert all(0 < record["student_grad_norm"] < 100 for record in found)
    assert ("fake_score_loss" in found[0]) == (config.matching is not None)


@pytest.mark.slow
def test_a_whole_run_is_measured_saved_and_exported(inputs: TinyInputs, student: Path, tmp_path: Path) -> None:
    config = reward_config(inputs, student, tmp_path / "run", "rtdmd")
    assert train_reward(config) == 0
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    monitored = {record["step"]: record for record in records if "monitor_reward" in record}
    assert sorted(monitored) == [0, 2, 4]
    assert monitored[0]["monitor_distance"] == 0.0
    assert 0 < monitored[2]["monitor_distance"] < monitored[4]["monitor_distance"]
    for record in monitored.values():
        assert record["monitor_diversity"] > 0
        # 2 (score - 0.5) / 0.01
        assert record["monitor_reward"] == pytest.approx(200 * (record["monitor_stroke_weight"] - 0.5), rel=1e-4)
        assert -2 < record["held_out_slant"] < 2
    tilts = [record["effective_tilt_mean"] for record in records if "effective_tilt_mean" in record]
    # Not in the first step, which is matching alone.
    assert len(tilts) == 3
    assert min(tilts) > 0
    output, record = export_run(tmp_path / "run")
    assert (output / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 2
    # An export is a start as good as its run.
    again = reward_config(inputs, output, tmp_path / "again", "rtdmd")
    read = RewardData.read(again, needs_of(again))
    assert read.init is not None
    assert read.init.files == (output / "transformer" / "diffusion_pytorch_model.safetensors",)
    assert read.fake_score is None
    # A checkpoint brings its fake score, which a run without matching leaves alone.
    folder = student / "checkpoint-2"
    for name, files in (("rtdmd", (folder / "fake_score.safetensors",)), ("nft", None)):
        one = reward_config(inputs, folder, tmp_path / "again", name)
        found = RewardData.read(one, needs_of(one))
        assert found.init is not None
        assert found.init.files == (folder / "student_ema.safetensors",)
        assert (None if found.fake_score is None else found.fake_score.files) == files


def test_dry_run_keeps_nothing(
    inputs: TinyInputs, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = reward_config(inputs, student, tmp_path / "run", "crd", {"run.dry_run": True})
    assert train_reward(config) == 0
    assert not (tmp_path / "run").exists()
    shown = capsys.readouterr().out
    assert "crd: steps at t = 1, 0.5 (sde); latents (4, 8, 8); reward 2 stroke_weight; held out slant; " in shown
    table = [line.split()[0] for line in shown.splitlines()[-7:-1]]
    assert table == ["teacher", "reference", "student", "old_policy", "sampling", "all"]


def test_hacking_is_told_once_and_remembered(inputs: TinyInputs, student: Path, tmp_path: Path) -> None:
    config = reward_config(inputs, student, tmp_path, "nft")
    with started(config) as (method, trainer):
        watch = RewardWatch(config, method.setup, trainer)
        for reward, slant in ((0.0, 0.9), (1.0, 0.8), (2.0, 0.7), (3.0, 0.6)):
            watch.monitor.hacking = watch.monitor.hacking.updated(Measured(reward, 0.1), [Measured(slant, 0.01)])
        watch.monitor.say()
        watch.monitor.say()
        other = RewardWatch(config, method.setup, trainer)
        other.load_state(json.loads(json.dumps(watch.state())))
        assert other.monitor.hacking == watch.monitor.hacking
        other.monitor.say()
    notes = [record["note"] for record in read_metrics(tmp_path / "metrics.jsonl") if "note" in record]
    assert notes == [f"health: {watch.monitor.hacking.message()}"]
    assert (
        "held-out slant fell from 0.9 to 0.6 in 3 measurements, in which the trained reward rose from 0 to 3"
        in notes[0]
    )
