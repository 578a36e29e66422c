"""The consistency loop: who learns in which step, exact resume, both kinds of tangent, export, and mistakes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.consistency.batch import DataBatch, Networks
from fewstep.consistency.sections import EctConfig, ScmConfig
from fewstep.consistency.tangent_check import check_tangent
from fewstep.consistency.train import consistency_step, train_consistency, train_step
from fewstep.core.config import save_resolved
from fewstep.core.export.run import export_run
from fewstep.core.randomness import Draw
from fewstep.core.run_settings import read_settings
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from fewstep.core.training.roles import Role
from fewstep.core.weights import find_weights
from tests.consistency.tiny_consistency_run import start_consistency, tiny_consistency
from tests.dmd.tiny_run import TinyInputs, assert_same_checkpoint, changed


def weights_of(role: Role | None) -> torch.Tensor:
    assert role is not None
    return torch.cat([value.detach().flatten() for _, value in role.parameters])


def test_steps_of_rcm(inputs: TinyInputs, tmp_path: Path) -> None:
    """One step of consistency alone, then cycles of two: the student's step and the fake score's."""
    config = tiny_consistency(inputs, tmp_path, "rcm")
    setup, trainer = start_consistency(config)
    moved, logged = [], []
    for _ in range(5):
        before = weights_of(setup.student_role), weights_of(setup.fake_role)
        metrics = train_step(config, setup, trainer)
        trainer.advance()
        after = weights_of(setup.student_role), weights_of(setup.fake_role)
        moved.append(tuple(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))
        logged.append(sorted(name for name in metrics if name.endswith("_loss")))
    trainer.close()
    both = ["consistency_loss", "matching_loss"]
    assert moved == [(True, False), (True, False), (False, True), (True, False), (False, True)]
    assert logged == [["consistency_loss"], both, ["fake_score_loss"], both, ["fake_score_loss"]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scm", "rcm", "ect"])
def test_a_resumed_run_equals_an_uninterrupted_one(inputs: TinyInputs, tmp_path: Path, name: str) -> None:
    straight = tiny_consistency(inputs, tmp_path / "straight", name)
    assert train_consistency(straight) == 0
    first = tiny_consistency(inputs, tmp_path / "resumed", name, {"steps": 2})
    assert train_consistency(first) == 0
    again = tiny_consistency(inputs, tmp_path / "resumed", name, {"resume": "latest"})
    assert train_consistency(again) == 0
    left, right = (load_checkpoint(list_checkpoints(tmp_path / folder)[-1]) for folder in ("straight", "resumed"))
    assert left.step == 4
    assert_same_checkpoint(left, right)


@pytest.mark.parametrize("coordinates", ["trigflow", "rf"])
def test_tangents_of_both_kinds_agree(inputs: TinyInputs, tmp_path: Path, coordinates: Any) -> None:
    config = tiny_consistency(inputs, tmp_path, "scm")
    setup, trainer = start_consistency(config)
    draw = Draw(3, list(range(4)), trainer.device)
    _, x0, condition = setup.real.rows(draw.indices, trainer.device)
    role = setup.student_role
    networks = Networks(role.module, role.wrapped, setup.teacher, 2.0)
    found = []
    kinds: tuple[Any, ...] = ("jvp", "central")
    for tangent in kinds:
        size: Any = {"central_step": 2e-4} if tangent == "central" else {}
        settings = ScmConfig(coordinates=coordinates, tangent=tangent, time_std=0.8, **size)
        data = DataBatch(x0, draw.noise(tuple(x0.shape[1:]), "consistency_noise"), condition, draw, step=9)
        record = consistency_step(data, networks, settings).record
        found.append([float(record[name]) for name in ("tangent", "tangent_gap", "tangent_drift")])
    trainer.close()
    assert found[0] == pytest.approx(found[1], rel=2e-2)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)


def test_the_warm_up_weighs_what_is_said_and_ects_weight_is_that_of_a_time(inputs: TinyInputs, tmp_path: Path) -> None:
    config = tiny_consistency(inputs, tmp_path, "scm")
    setup, trainer = start_consistency(config)
    draw = Draw(3, list(range(4)), trainer.device)
    _, x0, condition = setup.real.rows(draw.indices, trainer.device)
    networks = Networks(setup.student_role.module, setup.student_role.wrapped, setup.teacher, 2.0)

    def record(settings: Any, step: int) -> Any:
        data = DataBatch(x0, draw.noise(tuple(x0.shape[1:]), "consistency_noise"), condition, draw, step=step)
        return consistency_step(data, networks, settings)

    # Half-way the state's part alone is weighed: sqrt(1 - r^2 sin^2) stands where cos did, so that the gap is longer.
    half, whole = (
        [record(ScmConfig(tangent_warmup=8, warmup_of=of), step).record for of in ("drift", "state")] for step in (4, 8)
    )
    assert float(half[1]["tangent_gap"]) > 1.05 * float(half[0]["tangent_gap"])
    assert float(half[1]["tangent_drift"]) != pytest.approx(float(half[0]["tangent_drift"]), rel=1e-3)
    for name in ("tangent_gap", "tangent_drift"):
        assert float(whole[1][name]) == pytest.approx(float(whole[0][name]), rel=1e-5)
    losses = [float(record(EctConfig(weight=weight), 9).loss) for weight in ("snr", "gap")]
    trainer.close()
    assert losses[0] != pytest.approx(losses[1], rel=1e-2)
    assert min(losses) > 0


def test_the_check_of_the_tangent_passes_and_is_reported(inputs: TinyInputs, tmp_path: Path) -> None:
    checked = dataclasses.replace(tiny_consistency(inputs, tmp_path, "scm"), scm=ScmConfig(time_smoothing=0.01))
    setup, trainer = start_consistency(checked)
    text = check_tangent(checked, setup, trainer)
    trainer.close()
    assert text is not None
    assert text.startswith("tangent against differences: off by ")
    assert float(text.rpartition("of time is ")[2].partition(",")[0]) > 0.98
    unchecked = dataclasses.replace(checked, scm=ScmConfig(check_tangent=False))
    assert check_tangent(unchecked, setup, trainer) is None


def test_a_tangent_that_follows_a_wiggle_is_refused(inputs: TinyInputs, tmp_path: Path) -> None:
    """Random weights in the layers of a time of 1,000 t turn faster than any path."""
    config = dataclasses.replace(tiny_consistency(inputs, tmp_path, "scm"), scm=ScmConfig())
    setup, trainer = start_consistency(config)
    with pytest.raises(ValueError, match=r"follows a wiggle .* Set scm\.time_smoothing to 0\.01"):
        check_tangent(config, setup, trainer)
    trainer.close()


@pytest.mark.parametrize("lora", [False, True])
def test_a_smoothed_student_is_another_network_of_its_class(inputs: TinyInputs, tmp_path: Path, lora: bool) -> None:
    if lora:
        with pytest.raises(ValueError, match=r"time_smoothing is 0\.01 with student\.lora_rank 2"):
            changed(
                tiny_consistency(inputs, tmp_path, "scm"),
                {"scm": ScmConfig(time_smoothing=0.01), "student.lora_rank": 2},
            )
        return
    config = tiny_consistency(inputs, tmp_path / "run", "scm")
    config = dataclasses.replace(config, scm=ScmConfig(time_smoothing=0.01))
    assert train_consistency(config) == 0
    assert read_settings(tmp_path / "run").time_smoothing == 0.01
    _, record = export_run(tmp_path / "run")
    assert record.verification is not None
    assert record.verification.sampler_difference < 1e-5
    # A run that starts from it smooths what is missing alone, here nothing.
    again = changed(config, {"student.init": str(tmp_path / "run"), "run.directory": str(tmp_path / "again")})
    setup, trainer = start_consistency(again)
    trainer.close()
    name = "time_text_embed.timestep_embedder.linear_1.weight"
    stored = find_weights(str(tmp_path / "run")).tensors()[name]
    found = setup.student.denoiser.network.get_parameter(name).detach()
    torch.testing.assert_close(found, stored, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_export_opens_and_steps_as_it_was_trained(inputs: TinyInputs, tmp_path: Path) -> None:
    config = tiny_consistency(inputs, tmp_path / "run", "dcm")
    assert train_consistency(config) == 0
    path, record = export_run(tmp_path / "run")
    assert (path / "model_index.json").is_file()
    assert record.method == "dcm"
    assert record.times == (1.0, 0.5)
    _, more = export_run(tmp_path / "run", steps=4, output=tmp_path / "four")
    assert more.times == (1.0, 0.75, 0.5, 0.25)
    assert more.num_inference_steps == 4
    assert record.verification is not None
    assert record.verification.sampler_difference < 1e-5


def test_a_starting_file_that_is_not_there_is_named(inputs: TinyInputs, tmp_path: Path) -> None:
    config = tiny_consistency(inputs, tmp_path / "run", "scm")
    lost = dataclasses.replace(config, student=dataclasses.replace(config.student, init="no.safetensors"))
    with pytest.raises(ValueError, match=r"student\.init no\.safetensors is no \.safetensors file"):
        train_consistency(lost)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_makes_one_step_and_keeps_nothing(inputs: TinyInputs, tmp_path: Path) -> None:
    config = tiny_consistency(inputs, tmp_path / "dry", "scm", {"dry_run": True})
    save_resolved(tmp_path / "config.yaml", config)
    assert train_consistency(config) == 0
    assert not (tmp_path / "dry").exists()
