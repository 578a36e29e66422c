"""Runs of SANA-Sprint: who learns when, what moves, committed numbers, resume, processes, export, and mistakes."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.consistency.sana_sprint.config import SprintConsistencyConfig, SprintDiscriminatorConfig
from fewstep.consistency.tangent_check import check_tangent
from fewstep.consistency.train import train_consistency, train_step
from fewstep.core.config import save_resolved
from fewstep.core.export.run import export_run
from fewstep.core.export.sana import sprint_times
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from fewstep.core.training.roles import Role
from fewstep.core.training.run_directory import METRICS_FILE, read_metrics
from fewstep.core.training.watch import Watch
from fewstep.evaluation.generation import generate, load_pipeline
from fewstep.evaluation.systems import read_system
from tests.consistency.sana_sprint.tiny_sprint_run import CASES, HEADS, OPTIMIZER, tiny_sprint, write_sprint_inputs
from tests.consistency.tiny_consistency_run import MATCHED, start_consistency, tiny_consistency
from tests.dmd.tiny_run import TinyInputs, assert_same_checkpoint
from tests.tiny_pipelines import save_pipeline
from tests.tiny_sana import build_sana
from tests.two_processes import assert_same_run, launch_two

GOLDEN = Path(__file__).parent / "golden_sprint.json"
SHOWN = ("scm_loss", "adversarial_loss", "discriminator_loss", "tangent", "student_grad_norm", "heads_grad_norm")
SCRIPT = Path(__file__).parents[3] / "scripts" / "train_consistency.py"


@pytest.fixture(scope="module")
def sana(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    return write_sprint_inputs(tmp_path_factory.mktemp("sprint_inputs"))


def weights_of(role: Role | None) -> dict[str, torch.Tensor]:
    assert role is not None
    return {name: value.detach().clone() for name, value in role.parameters}


def moved_names(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def test_steps_of_student_and_discriminator_alternate(sana: TinyInputs, tmp_path: Path) -> None:
    config = tiny_sprint(sana, tmp_path)
    setup, trainer = start_consistency(config)
    teacher = {name: value.clone() for name, value in setup.teacher.denoiser.state_dict().items()}
    first = weights_of(setup.student_role)
    moved, logged = [], []
    for _ in range(4):
        before = weights_of(setup.student_role), weights_of(setup.heads_role)
        metrics = train_step(config, setup, trainer)
        trainer.advance()
        after = weights_of(setup.student_role), weights_of(setup.heads_role)
        moved.append(tuple(len(moved_names(a, b)) > 0 for a, b in zip(before, after, strict=True)))
        logged.append(sorted(name for name in metrics if name.endswith(("_loss", "_norm"))))
    learnt = moved_names(first, weights_of(setup.student_role))
    assert moved == [(True, False), (False, True)] * 2
    assert logged[0] == ["adversarial_loss", "consistency_loss", "scm_loss", "student_grad_norm"]
    assert logged[1] == ["discriminator_loss", "heads_grad_norm"]
    # All weights learn, those of the guidance embedding too, and the teacher's are as they were.
    assert learnt == set(first)
    assert len([name for name in learnt if "guidance_embedder" in name]) == 4
    assert all(torch.equal(value, teacher[name]) for name, value in setup.teacher.denoiser.state_dict().items())
    assert setup.heads_role is not None
    assert (setup.student_role.total_updates, setup.heads_role.total_updates) == (2, 2)
    trainer.close()


def test_without_an_adversarial_loss_there_is_no_discriminator(sana: TinyInputs, tmp_path: Path) -> None:
    config = tiny_sprint(sana, tmp_path, "consistency")
    setup, trainer = start_consistency(config)
    assert (setup.heads_role, sorted(trainer.roles)) == (None, ["student"])
    assert setup.student_role.total_updates == 4
    for _ in range(2):
        metrics = train_step(config, setup, trainer)
        trainer.advance()
        assert metrics["consistency_loss"] == metrics["scm_loss"]
    trainer.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_steps_give_the_committed_numbers(sana: TinyInputs, tmp_path: Path, name: str) -> None:
    """Three steps; after an intended change of the numerics, UPDATE_GOLDEN=1 writes them anew."""
    config = tiny_sprint(sana, tmp_path, name)
    setup, trainer = start_consistency(config)
    before, found = weights_of(setup.student_role), []
    for _ in range(3):
        metrics = train_step(config, setup, trainer)
        found.append({key: float(metrics[key]) for key in SHOWN if key in metrics})
        trainer.advance()
    trainer.close()
    after = weights_of(setup.student_role)
    change = sum(float((after[key] - value).double().abs().sum()) for key, value in before.items())
    moved = change / sum(value.numel() for value in before.values())
    known = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.is_file() else {}
    if os.environ.get("UPDATE_GOLDEN") == "1":
        known[name] = {"losses": found, "moved": moved}
        GOLDEN.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    for losses, golden in zip(found, known[name]["losses"], strict=True):
        assert losses == pytest.approx(golden, rel=1e-4, abs=1e-7)
    assert moved == pytest.approx(known[name]["moved"], rel=2e-3)
    assert 1e-4 < moved < 1e-2


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(sana: TinyInputs, tmp_path: Path) -> None:
    """Interrupted after three steps, so that the discriminator's step comes next."""
    assert train_consistency(tiny_sprint(sana, tmp_path / "straight")) == 0
    assert train_consistency(tiny_sprint(sana, tmp_path / "resumed", changes={"run.steps": 3})) == 0
    assert train_consistency(tiny_sprint(sana, tmp_path / "resumed", changes={"run.resume": "latest"})) == 0
    left, right = (load_checkpoint(list_checkpoints(tmp_path / folder)[-1]) for folder in ("straight", "resumed"))
    assert left.step == 4
    assert {"student", "student_ema", "heads", "heads_optimizer"} <= left.tensors.keys()
    assert_same_checkpoint(left, right)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_train_as_one_does(sana: TinyInputs, tmp_path: Path) -> None:
    """Without misaligned pairs, whose wrong prompts come from the own slice of the batch."""
    changes = {"sana_sprint.discriminator": SprintDiscriminatorConfig(**HEADS, misaligned=False)}
    save_resolved(tmp_path / "two.yaml", tiny_sprint(sana, tmp_path / "two", changes=changes))
    assert "2 process(es) on cpu" in launch_two(str(SCRIPT), "--config", str(tmp_path / "two.yaml"))
    assert train_consistency(tiny_sprint(sana, tmp_path / "one", changes=changes)) == 0
    assert_same_run(tmp_path / "two", tmp_path / "one", roles=("student", "student_ema", "heads"))


def test_tangent_check_and_grid_have_the_guidance(sana: TinyInputs, tmp_path: Path) -> None:
    config = tiny_sprint(sana, tmp_path, changes={"sana_sprint.consistency": SprintConsistencyConfig()})
    setup, trainer = start_consistency(config)
    text = check_tangent(config, setup, trainer)
    assert text is not None
    assert text.startswith("tangent against differences: off by ")
    told = setup.prompts.rows([0, 1]).guidance
    assert told is not None
    assert told.tolist() == [1.5, 1.5]
    # Equal captions share their embedding, and each latent has that of its own.
    captions = setup.real.conditions.rows(range(7)).text
    assert captions.shape[0] == 7
    assert torch.equal(captions[1], captions[5])
    assert (captions[1] - captions[2]).abs().max() > 1e-3
    watch = Watch(setup, trainer, sample_count=2, guidance=config.teacher.guidance)
    watch.save_samples()
    assert (tmp_path / "samples").is_dir()
    assert len(list((tmp_path / "samples").glob("*.png"))) == 1
    assert watch.pictures.brightness is not None
    assert 0 < watch.pictures.brightness < 1
    trainer.close()


@pytest.mark.slow
def test_one_run_is_exported_at_one_two_and_four_steps(sana: TinyInputs, tmp_path: Path) -> None:
    assert train_consistency(tiny_sprint(sana, tmp_path / "run")) == 0
    losses = [name for record in read_metrics(tmp_path / "run" / METRICS_FILE) for name in record if "_loss" in name]
    assert losses.count("scm_loss") == losses.count("discriminator_loss") == 2
    pictures = []
    for steps in (1, 2, 4):
        path, record = export_run(tmp_path / "run", steps=steps, output=tmp_path / f"export_{steps}")
        assert (record.pipeline, record.method, record.guidance_scale) == ("SanaSprintPipeline", "sana_sprint", 1.5)
        assert record.times == sprint_times(steps)
        assert record.verification is not None
        assert record.verification.sampler_difference < 1e-4
        system = read_system(path)
        assert (system.steps, system.guidance) == (steps, 1.5)
        arguments: dict[str, Any] = {"seed": 3, "steps": steps, "guidance": 1.5, "grid": system.grid}
        pictures.append(generate(load_pipeline(path), ["a red cat"], indices=[0], **arguments))
    assert pictures[0].shape == (1, 3, 32, 32)
    assert (pictures[0] - pictures[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student.lora_rank": 2}, r"student\.lora_rank is 2"),
        ({"student.shift": 3.0}, r"student\.shift 3\.0.*; sana_sprint"),
        ({"teacher.guidance": 2.5}, r"teacher\.guidance is 2\.5.*from 1\.0 to 2\.0"),
        ({"sana_sprint.discriminator": None, "sana_sprint.consistency": None}, "nothing would be learnt"),
        ({"sana_sprint.guidance_scales": ()}, r"guidance_scales is \(\)"),
        ({"sana_sprint.time_std": 0.0}, "time_std: given 0.0"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    sana: TinyInputs, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_sprint(sana, tmp_path, changes=changes)


def test_sections_that_do_not_fit_are_named(sana: TinyInputs, inputs: TinyInputs, tmp_path: Path) -> None:
    config = tiny_sprint(sana, tmp_path)
    with pytest.raises(ValueError, match="no method is given"):
        dataclasses.replace(config, sana_sprint=None)
    with pytest.raises(ValueError, match="the sections scm and sana_sprint are given"):
        dataclasses.replace(tiny_consistency(inputs, tmp_path, "scm"), sana_sprint=config.sana_sprint)
    with pytest.raises(ValueError, match="the section matching beside sana_sprint"):
        dataclasses.replace(config, **MATCHED)
    assert OPTIMIZER.learning_rate == 1e-3


@pytest.mark.slow
def test_teachers_that_do_not_fit_are_named(sana: TinyInputs, inputs: TinyInputs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sana_sprint distils a SanaPipeline"):
        start_consistency(
            tiny_sprint(
                sana,
                tmp_path / "sd3",
                changes={"teacher.path": str(inputs.teacher), "data.latents": str(inputs.latents)},
            )
        )
    slow = save_pipeline(build_sana(), tmp_path / "slow_teacher")
    with pytest.raises(ValueError, match="calls its network at 1000 t and not at t"):
        start_consistency(tiny_sprint(sana, tmp_path / "slow", changes={"teacher.path": str(slow)}))
    with pytest.raises(ValueError, match="blocks must be distinct numbers from 0 to 2"):
        start_consistency(
            tiny_sprint(
                sana,
                tmp_path / "blocks",
                changes={"sana_sprint.discriminator": SprintDiscriminatorConfig(**HEADS, blocks=(7,))},
            )
        )
    export = tmp_path / "export"
    assert train_consistency(tiny_sprint(sana, tmp_path / "run", changes={"run.steps": 1})) == 0
    export_run(tmp_path / "run", output=export)
    with pytest.raises(ValueError, match="a few-step SANA-Sprint already"):
        start_consistency(tiny_sprint(sana, tmp_path / "twice", changes={"teacher.path": str(export)}))
    weights = export / "transformer" / "diffusion_pytorch_model.safetensors"
    setup, trainer = start_consistency(
        tiny_sprint(sana, tmp_path / "again", changes={"student.init": str(weights), "data.cache_prompts": False})
    )
    trainer.close()
    exported: Any = load_pipeline(export)
    for name, value in setup.student.denoiser.network.state_dict().items():
        assert torch.equal(value, exported.transformer.state_dict()[name])
