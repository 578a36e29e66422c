"""The differentiable preprocessing equals the libraries' own on 8-bit pictures, up to PIL's rounding."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import image_transform
from PIL import Image
from transformers import CLIPImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from fewstep.evaluation.scorers.preprocess import Preprocess, crop_or_pad_centre, fit_to_patches, resize

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
# Before normalisation, in units of one of 255 grey levels.
SMOOTH_TOLERANCE, NOISE_TOLERANCE = 1.5, 30.0


def picture(height: int, width: int, *, smooth: bool) -> torch.Tensor:
    """An 8-bit picture as floats [1, 3, H, W]: low frequencies, or noise, whose overshoot PIL cuts between passes."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    if smooth:
        coarse = torch.rand(1, 3, 4, 4, generator=generator)
        noise = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    else:
        noise = torch.rand(1, 3, height, width, generator=generator)
    return (noise * 255.0).round() / 255.0


def as_pil(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray((pixels[0] * 255.0).round().to(torch.uint8).permute(1, 2, 0).numpy())


SIZES = [(64, 64), (32, 32), (96, 61), (45, 128), (20, 24), (33, 31)]


@pytest.mark.parametrize("fit", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", SIZES)
def test_open_clip_preprocessing(fit, size) -> None:
    theirs: Any = image_transform(32, is_train=False, mean=MEAN, std=STD, resize_mode=fit, fill_color=0)
    std = torch.tensor(STD).view(1, 3, 1, 1)
    for smooth, tolerance in ((True, SMOOTH_TOLERANCE), (False, NOISE_TOLERANCE)):
        pixels = picture(*size, smooth=smooth)
        ours = Preprocess((32, 32), fit=fit, mean=MEAN, std=STD)(pixels)
        assert ours.shape == (1, 3, 32, 32)
        difference = (ours - theirs(as_pil(pixels))[None]) * std * 255.0
        assert difference.abs().max() < tolerance
        assert difference.abs().mean() < 1.0


@pytest.mark.parametrize("size", SIZES)
def test_clip_processor_of_transformers(size) -> None:
    pixels = picture(*size, smooth=True)
    theirs = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = theirs(images=as_pil(pixels), return_tensors="pt")["pixel_values"]
    difference = (Preprocess((32, 32), crop_low=True)(pixels) - expected) * 0.27 * 255.0
    assert difference.abs().max() < SMOOTH_TOLERANCE


def test_equal_size_is_exact_and_gradients_flow() -> None:
    pixels = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    prepared = Preprocess((32, 32), mean=MEAN, std=STD)(pixels)
    expected = (pixels - pixels.new_tensor(MEAN).view(1, 3, 1, 1)) / pixels.new_tensor(STD).view(1, 3, 1, 1)
    assert torch.equal(prepared, expected)
    small = (0.4 + 0.2 * torch.rand(1, 3, 7, 9, dtype=torch.float64)).requires_grad_()
    for fit in ("shortest", "longest", "squash"):
        assert torch.autograd.gradcheck(Preprocess((4, 4), fit=fit), (small,))


def test_constant_pictures_stay_constant_and_black_is_the_padding() -> None:
    pixels = torch.full((1, 3, 40, 20), 0.7)
    assert (resize(pixels, (16, 16)) - 0.7).abs().max() < 1e-6
    padded = Preprocess((16, 16), fit="longest", mean=(0.0,) * 3, std=(1.0,) * 3)(pixels)
    assert (padded[..., 4:12] - 0.7).abs().max() < 1e-6
    assert padded[..., :4].abs().max() == 0.0
    assert padded[..., 12:].abs().max() == 0.0
    assert crop_or_pad_centre(torch.ones(1, 3, 5, 3), (3, 6)).sum() == 27.0


@settings(max_examples=200, deadline=None)
@given(st.integers(16, 3000), st.integers(16, 3000), st.sampled_from([(3136, 200704), (100352, 200704), (200704,) * 2]))
def test_patch_sizes_are_those_of_qwen(height, width, area) -> None:
    if max(height, width) / min(height, width) > 100:
        return
    found = fit_to_patches(height, width, factor=28, min_pixels=area[0], max_pixels=area[1])
    assert found == smart_resize(height, width, factor=28, min_pixels=area[0], max_pixels=area[1])
    assert found[0] % 28 == found[1] % 28 == 0


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="fit is 'crop'"):
        Preprocess((8, 8), fit="crop")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="needs a square"):
        Preprocess((8, 9))(torch.rand(1, 3, 8, 8))
    assert np.isclose(Preprocess((8, 9), fit="squash")(torch.rand(1, 3, 4, 4)).shape[-1], 9)
