"""A SANA teacher is stabilised and fine-tuned on latents: what changes, and that it learns."""

from pathlib import Path

import pytest
import torch

from fewstep.consistency.sana_sprint.teacher import (
    FineTuneRecipe,
    fine_tune_teacher,
    stabilised_teacher,
    train_stabilised,
)
from fewstep.core.data import LatentDataset
from fewstep.core.families.sana import SanaFamily
from fewstep.core.teacher import Teacher
from tests.tiny_pipelines import build_sd15, save_pipeline
from tests.tiny_sana import LATENT_SHAPE, build_sana


@pytest.fixture(scope="module")
def data() -> LatentDataset:
    generator = torch.Generator().manual_seed(2)
    latents = 1.0 + 0.1 * torch.randn(6, *LATENT_SHAPE, generator=generator)
    return LatentDataset(latents, tuple(f"the digit {word}" for word in ("one", "two", "six", "ten", "four", "five")))


def test_stabilised_teacher_learns_and_loads_again(tmp_path: Path, data: LatentDataset) -> None:
    source = save_pipeline(build_sana(), tmp_path / "source")
    recipe = FineTuneRecipe(steps=40, batch_size=8, learning_rate=3e-3, clip_norm=1.0)
    losses = fine_tune_teacher(source, data, tmp_path / "made", recipe=recipe)
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    teacher = Teacher.load(tmp_path / "made")
    assert teacher.family == SanaFamily(time_scale=1.0)
    assert teacher.pipeline.transformer.config["qk_norm"] == "rms_norm_across_heads"
    with pytest.raises(ValueError, match="already"):
        stabilised_teacher(teacher)
    with pytest.raises(FileExistsError, match="made exists"):
        fine_tune_teacher(source, data, tmp_path / "made", recipe=recipe)


def test_fine_tuning_is_a_function_of_its_seed(data: LatentDataset) -> None:
    runs = []
    for seed in (0, 0, 1):
        teacher = stabilised_teacher(Teacher(build_sana(), path="tiny"))
        runs.append(train_stabilised(teacher, data, FineTuneRecipe(steps=2, batch_size=4, seed=seed)))
        assert not any(parameter.requires_grad for parameter in teacher.denoiser.parameters())
    assert runs[0] == runs[1]
    assert abs(runs[0][0] - runs[2][0]) > 1e-4


def test_what_does_not_fit_is_named(data: LatentDataset) -> None:
    with pytest.raises(ValueError, match="only a SanaPipeline"):
        stabilised_teacher(Teacher(build_sd15(), path="tiny"))
    wrong = LatentDataset(data.latents[:, :4], data.prompts)
    with pytest.raises(ValueError, match=r"latents have shape \(4, 4, 4\)"):
        train_stabilised(Teacher(build_sana(), path="tiny"), wrong, FineTuneRecipe(steps=1))
    with pytest.raises(ValueError, match="steps is -1"):
        FineTuneRecipe(steps=-1)
    with pytest.raises(ValueError, match=r"clip_norm 0\.0"):
        FineTuneRecipe(clip_norm=0.0)
    with pytest.raises(ValueError, match=r"condition_dropout is 1\.0"):
        FineTuneRecipe(condition_dropout=1.0)
