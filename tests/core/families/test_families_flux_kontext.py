"""FLUX.1 Kontext in canonical coordinates, against the stock pipeline."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers import FluxKontextPipeline

from fewstep.core.families.table import build_family
from tests.core.families.checks import FamilyChecks, TinyModel, noise_of, told
from tests.core.families.test_families_flux import build_flux

BUILD = functools.partial(build_flux, kind=FluxKontextPipeline)
MODEL = TinyModel(BUILD, {"height": 16, "width": 24})


class TestKontext(FamilyChecks):
    model = MODEL


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 1024), {}),
        ((1568, 672), {"max_area": 1568 * 672}),
        ((512, 512), {"max_area": 512 * 512, "_auto_resize": False}),
    ],
)
def test_a_call_says_what_keeps_the_size(size: tuple[int, int], expected: dict) -> None:
    pipeline = BUILD()
    found = build_family(pipeline).call_arguments(pipeline, height=size[0], width=size[1])
    usual = {"height": size[0], "width": size[1], "max_sequence_length": 24}
    assert found == usual | expected


def test_it_needs_a_picture_and_is_moved_by_it() -> None:
    teacher = MODEL.teacher()
    x_t, t = noise_of(MODEL.shape(teacher)), torch.tensor([0.4, 0.7])
    with pytest.raises(ValueError, match="is told a picture, and the condition has none"):
        teacher.denoiser(x_t, t, teacher.encode(list(MODEL.prompts)))
    condition = told(MODEL, teacher)
    assert condition.image_latents is not None
    assert tuple(condition.image_latents.shape) == (2, 4, 1, 8, 12)
    grey = teacher.with_pictures(condition, torch.full((2, 3, 16, 24), 0.5))
    with torch.no_grad():
        assert (teacher.denoiser(x_t, t, condition) - teacher.denoiser(x_t, t, grey)).abs().max() > 1e-3
