"""DiT in canonical coordinates, against the stock pipeline."""

# diffusers annotates constructors with the types of their defaults, which are narrower than what they take.
# pyright: reportArgumentType=false

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel

from fewstep.core.families.dit import require_dit
from fewstep.core.families.table import configs_of
from fewstep.core.settings import ModelSource
from fewstep.core.teacher_files import check_teacher
from tests.core.families.checks import FamilyChecks, TinyModel, noise_of
from tests.core.families.test_families_pixart import INDICES, linear_ddim
from tests.tiny_networks import widen_weights
from tests.tiny_pipelines import build_vae


def build_dit(*, seed: int = 0) -> DiTPipeline:
    """DiT with two blocks and three names of classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = DiTTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_embeds_ada_norm=1000,
        )
        widen_weights(transformer)
        pipeline = DiTPipeline(
            transformer=transformer.eval(),
            vae=build_vae(scaling_factor=0.18215, shift_factor=None, quant_conv=True),
            scheduler=linear_ddim(),
            id2label={"0": "tench, Tinca tinca", "1": "goldfish", "207": "golden retriever"},
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


MODEL = TinyModel(
    build_dit,
    {"height": 16, "width": 16},
    guidance=4.0,
    prompts=("207", "1"),
    grids={},
    lora=False,
    indices=INDICES,
)


class TestDit(FamilyChecks):
    model = MODEL


def test_prompts_are_classes_by_number_or_name(tmp_path: Path) -> None:
    teacher = MODEL.teacher()
    condition = teacher.encode(["golden retriever", " 207 ", "tench", "1"])
    assert condition.labels is not None
    assert condition.labels.tolist() == [207, 207, 0, 1]
    assert teacher.null_condition.labels is not None
    assert teacher.null_condition.labels.tolist() == [1000]
    for prompt in ("cat", "1000", "-1", "", "\u00b2", "\u2460"):
        with pytest.raises(ValueError, match=r"is no class: write its number, 0 to 999"):
            teacher.encode([prompt])
    with pytest.raises(ValueError, match="has class labels and no text"):
        _ = condition.text
    build_dit().save_pretrained(tmp_path / "model")
    check_teacher(ModelSource(path=str(tmp_path / "model")))


def test_labels_are_kept_in_training_mode() -> None:
    teacher = MODEL.teacher()
    student = teacher.denoiser.copy().train()
    condition, x_t, t = teacher.encode(list(MODEL.prompts)), noise_of(MODEL.shape(teacher)), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        expected = teacher.denoiser(x_t, t, condition)
        for _ in range(20):
            assert torch.equal(student(x_t, t, condition), expected)


def test_it_makes_one_size() -> None:
    teacher = MODEL.teacher()
    with pytest.raises(ValueError, match="makes 16 pixels alone"):
        teacher.latent_shape(32, None)


@pytest.mark.parametrize(
    ("component", "changes", "message"),
    [
        ("transformer", {"num_embeds_ada_norm": 10}, "knows 10 classes"),
        ("scheduler", {"prediction_type": "sample"}, "predicts eps"),
    ],
)
def test_what_is_no_teacher_is_refused_by_its_configs(component: str, changes: dict, message: str) -> None:
    configs = configs_of(build_dit())
    with pytest.raises(ValueError, match=message):
        require_dit({**configs, component: {**configs[component], **changes}})
