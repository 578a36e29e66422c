"""Qwen-Image-Edit and Edit-Plus in canonical coordinates, against the stock pipelines."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline

from fewstep.core.families.qwen_image_edit import require_qwen_image_edit
from fewstep.core.families.table import configs_of
from fewstep.core.grids import step_grid
from tests.core.families.checks import (
    PARITY,
    TANGENT,
    FamilyChecks,
    TinyModel,
    alone_difference,
    export_student,
    network_times,
    noise_of,
    picture_of,
    tangent_errors,
    told,
    trajectory_difference,
)
from tests.core.families.test_families_qwen_image import build_qwen_image

# The stock call makes every picture one of 1,024 x 1,024 pixels, here 256 tokens.
HALVINGS = 5
EDIT = functools.partial(build_qwen_image, kind=QwenImageEditPipeline, halvings=HALVINGS)
# The network of Edit-2511, which tells the tokens of the picture that they are clean.
PLUS = functools.partial(build_qwen_image, kind=QwenImageEditPlusPipeline, halvings=HALVINGS, zero_cond_t=True)
SIZE = {"height": 128, "width": 192}
EDIT_MODEL = TinyModel(EDIT, SIZE, guidance=4.0, calls_one=True)
PLUS_MODEL = TinyModel(PLUS, SIZE, guidance=4.0, calls_one=True)


class TestEdit(FamilyChecks):
    model = EDIT_MODEL


def test_edit_plus_is_the_stock_pipeline() -> None:
    # All that holds for Edit is measured for it in the recorded table of the families.
    assert trajectory_difference(PLUS_MODEL) < PARITY
    stock, ours = network_times(PLUS_MODEL, torch.bfloat16)
    assert len(stock) == 3
    assert ours == stock
    assert max(tangent_errors(PLUS_MODEL)) < TANGENT
    assert alone_difference(PLUS_MODEL) < 1e-5


@pytest.mark.slow
def test_edit_plus_is_exported(tmp_path: Path) -> None:
    PLUS().save_pretrained(tmp_path / "model")
    record = export_student(PLUS_MODEL, tmp_path / "model", tmp_path / "export", step_grid(4, shift=3.0), "sde")
    assert record.verification is not None
    assert record.verification.sampler_difference < 3e-5
    assert record.call_arguments()["height"] == SIZE["height"]


def test_the_unconditional_side_is_encoded_with_the_picture() -> None:
    teacher = EDIT_MODEL.teacher()
    condition = told(EDIT_MODEL, teacher)
    null = teacher.null_condition.expand(2).of_same_samples(condition)
    assert condition.null_tokens is not None
    assert torch.equal(null.text, condition.null_tokens)
    # The text alone was read with a grey picture.
    assert null.text.shape[1:] != teacher.null_condition.text.shape[1:]
    dropped = condition.where(torch.tensor([True, False]), teacher.null_condition)
    assert torch.equal(dropped.text[1, : null.text.shape[1]], condition.null_tokens[1])
    assert dropped.token_mask is not None
    assert int(dropped.token_mask[1].sum()) == null.text.shape[1]


def test_text_is_not_told_of_a_picture_afterwards() -> None:
    teacher = EDIT_MODEL.teacher()
    condition = teacher.encode(list(EDIT_MODEL.prompts))
    x_t, t = noise_of(EDIT_MODEL.shape(teacher)), torch.tensor([0.4, 0.7])
    with pytest.raises(ValueError, match="is told a picture, and the condition has none"):
        teacher.denoiser(x_t, t, condition)
    with pytest.raises(ValueError, match="is shown the pictures: encode the prompts with them"):
        teacher.with_pictures(condition, picture_of(EDIT_MODEL).expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match="1 pictures are given for 2 prompts"):
        teacher.encode(list(EDIT_MODEL.prompts), pictures=picture_of(EDIT_MODEL))


def test_a_layered_model_is_refused_by_its_configs() -> None:
    configs = configs_of(EDIT())
    layered = {**configs["transformer"], "use_layer3d_rope": True}
    with pytest.raises(ValueError, match="with use_layer3d_rope: a layered model"):
        require_qwen_image_edit({**configs, "transformer": layered})
