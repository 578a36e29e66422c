"""SANA-Sprint with a ControlNet: edges, its teacher's training, runs, export to the stock pipeline, and mistakes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from studies.sana_control import edge_pictures, train_controlnet

from fewstep.consistency.config import ConsistencyConfig
from fewstep.consistency.sana_sprint.config import SprintConsistencyConfig
from fewstep.consistency.sana_sprint.teacher import FineTuneRecipe
from fewstep.consistency.tangent_check import check_tangent
from fewstep.consistency.train import train_consistency, train_step
from fewstep.core.data import LatentDataset
from fewstep.core.export.run import export_run
from fewstep.core.export.sana import sprint_times
from fewstep.core.export.sana_control import draw_control_grid, export_control_run, read_call
from fewstep.core.randomness import sample_noise
from fewstep.core.teacher import Teacher
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from fewstep.evaluation.generation import load_pipeline
from tests.consistency.sana_sprint.tiny_sprint_run import tiny_sprint, write_sprint_inputs
from tests.consistency.tiny_consistency_run import start_consistency
from tests.dmd.tiny_run import TinyInputs, assert_same_checkpoint
from tests.tiny_pipelines import save_pipeline
from tests.tiny_sana import LATENT_SHAPE, build_controlled_sana


@pytest.fixture(scope="module")
def sana(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    """A teacher with a ControlNet, and beside the latents those of what it follows."""
    folder = tmp_path_factory.mktemp("control_inputs")
    inputs = write_sprint_inputs(folder)
    teacher = save_pipeline(build_controlled_sana(), folder / "controlled")
    data = LatentDataset.load(inputs.latents)
    LatentDataset(sample_noise(11, range(7), LATENT_SHAPE, stream="edges"), data.prompts).save(folder / "edges")
    return dataclasses.replace(inputs, teacher=teacher)


def controlled(inputs: TinyInputs, directory: Path, **changes: Any) -> ConsistencyConfig:
    settings = {"sana_sprint.control": str(inputs.latents.parent / "edges"), "sana_sprint.guidance_scales": (1.5,)}
    return tiny_sprint(inputs, directory, changes={**settings, **changes})


def test_edges_of_a_step_are_at_the_step() -> None:
    pixels = torch.zeros(2, 3, 6, 8, dtype=torch.float64)
    pixels[0, :, :, 4:] = 0.7
    found = edge_pictures(pixels)
    assert found.shape == (2, 3, 6, 8)
    # Sobel's filter sees a vertical step in the two columns beside it, whatever its height is.
    assert torch.allclose(found[0, :, :, 3:5], torch.ones(3, 6, 2, dtype=torch.float64))
    assert found[0, :, :, :3].abs().max() < 1e-12
    assert found[1].abs().max() == 0
    across = edge_pictures(pixels.transpose(2, 3))
    assert torch.allclose(across, found.transpose(2, 3))
    with pytest.raises(ValueError, match=r"must be \[N, 3, H, W\]"):
        edge_pictures(pixels[:, :1])


@pytest.mark.slow
def test_the_controlnet_alone_learns_to_follow(sana: TinyInputs) -> None:
    teacher = Teacher(build_controlled_sana(), path="tiny")
    pipeline: Any = teacher.pipeline
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    # What is to be drawn is what is followed.
    latents = sample_noise(3, range(8), LATENT_SHAPE, stream="data")
    data = LatentDataset(latents, ("a", "b") * 4)
    recipe = FineTuneRecipe(steps=60, batch_size=16, learning_rate=5e-3, clip_norm=1.0)
    losses = train_controlnet(teacher, data, latents, recipe=recipe)
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert all(torch.equal(value, before[name]) for name, value in pipeline.transformer.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.denoiser.parameters())
    with pytest.raises(ValueError, match="give one for each of the data"):
        train_controlnet(teacher, data, latents[:3], recipe=recipe)


def test_both_networks_of_the_student_learn_in_its_step(sana: TinyInputs, tmp_path: Path) -> None:
    config = controlled(sana, tmp_path, **{"sana_sprint.consistency": SprintConsistencyConfig()})
    setup, trainer = start_consistency(config)
    assert "off by" in (check_tangent(config, setup, trainer) or "")
    told = setup.prompts.rows([1, 0])
    assert told.control is not None
    assert torch.equal(told.control, LatentDataset.load(sana.latents.parent / "edges").latents[[1, 0]])
    before = {name: value.detach().clone() for name, value in setup.student_role.parameters}
    logged = []
    for _ in range(3):
        logged.append(sorted(name for name in train_step(config, setup, trainer) if name.endswith("_grad_norm")))
        trainer.advance()
    moved = {name for name, value in setup.student_role.parameters if not torch.equal(value, before[name])}
    trainer.close()
    assert logged == [["student_grad_norm"], ["heads_grad_norm"], ["student_grad_norm"]]
    assert moved == set(before)
    assert {name.split(".")[1] for name in moved} == {"transformer", "controlnet"}


@pytest.mark.slow
def test_a_run_goes_on_exactly_and_is_exported_to_the_stock_pipeline(sana: TinyInputs, tmp_path: Path) -> None:
    assert train_consistency(controlled(sana, tmp_path / "straight")) == 0
    assert train_consistency(controlled(sana, tmp_path / "run", **{"run.steps": 3})) == 0
    assert train_consistency(controlled(sana, tmp_path / "run", **{"run.resume": "latest"})) == 0
    left, right = (load_checkpoint(list_checkpoints(tmp_path / folder)[-1]) for folder in ("straight", "run"))
    assert_same_checkpoint(left, right)
    pictures = []
    for steps in (1, 2, 4):
        folder = tmp_path / f"export_{steps}"
        call = export_control_run(tmp_path / "run", folder, steps=steps)
        assert call == read_call(folder)
        assert (call.sigmas, call.guidance_scale, call.training_guidance) == (sprint_times(steps), 1.0, 1.5)
        assert (call.height, call.width, call.training_step) == (32, 32, 4)
        assert call.sampler_difference < 1e-4
        pipeline: Any = load_pipeline(folder)
        assert type(pipeline).__name__ == "SanaControlNetPipeline"
        picture = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(2))
        arguments: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "output_type": "pt"}
        pictures.append(pipeline("a two", control_image=2 * picture - 1, **call.arguments(), **arguments).images)
    assert pictures[0].shape == (1, 3, 32, 32)
    assert (pictures[0] - pictures[1]).abs().max() > 1e-4
    data = LatentDataset.load(sana.latents.parent / "edges")
    file = draw_control_grid(tmp_path / "run", data.latents[:2], data.prompts[:2], tmp_path / "grid.png", steps=(1, 2))
    assert file.stat().st_size > 1000
    with pytest.raises(FileExistsError, match="export_1 exists"):
        export_control_run(tmp_path / "run", tmp_path / "export_1")
    with pytest.raises(ValueError, match=r"use scripts/export_sana_control\.py"):
        export_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"control_call\.json does not exist"):
        read_call(tmp_path / "run")


def test_what_does_not_fit_is_named(sana: TinyInputs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="with a control: a student with a ControlNet has no guidance"):
        controlled(sana, tmp_path, **{"sana_sprint.guidance_scales": (1.0, 2.0)})
    with pytest.raises(ValueError, match=r"has a ControlNet and sana_sprint\.control is empty"):
        start_consistency(controlled(sana, tmp_path / "a", **{"sana_sprint.control": None}))
    plain = str(sana.latents.parent / "teacher")
    with pytest.raises(ValueError, match=r"has no ControlNet and sana_sprint\.control is set"):
        start_consistency(controlled(sana, tmp_path / "b", **{"teacher.path": plain}))
    few = LatentDataset.load(sana.latents)
    LatentDataset(few.latents[:3], few.prompts[:3]).save(tmp_path / "few")
    with pytest.raises(ValueError, match=r"sana_sprint\.control holds latents \(3, 8, 4, 4\)"):
        start_consistency(controlled(sana, tmp_path / "c", **{"sana_sprint.control": str(tmp_path / "few")}))
    assert (
        train_consistency(tiny_sprint(sana, tmp_path / "plain", changes={"teacher.path": plain, "run.steps": 1})) == 0
    )
    with pytest.raises(ValueError, match=r"without a ControlNet: use scripts/export_pipeline\.py"):
        export_control_run(tmp_path / "plain", tmp_path / "export")
