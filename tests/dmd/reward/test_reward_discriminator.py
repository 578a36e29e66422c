"""The pixel discriminator: frozen features of the digits classifier and of vision models, trained heads."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, SamConfig, SamModel

from fewstep.core.data import REAL_SEED, LatentDataset, rows_of_samples
from fewstep.core.teacher import Teacher
from fewstep.dmd.gan_loss import discriminator_loss
from fewstep.dmd.reward.pixel_discriminator import (
    PixelDiscriminator,
    RealPictures,
    VisionFeatures,
    build_discriminator,
    load_features,
)
from fewstep.dmd.reward.sections import PixelGanConfig
from fewstep.embedded.digits.classifier import load_classifier
from tests.dmd.reward.reward_run import QUICK, write_pixel_backbone
from tests.dmd.tiny_run import TinyInputs


def save_vision_model(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    settings = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def tiny_dinov2(folder: Path) -> Path:
    """Eight blocks of width 16 on pictures of 28 x 28 pixels, four patches and a class token."""
    size: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 8, "num_attention_heads": 2, "mlp_ratio": 2}
    return save_vision_model(Dinov2Model(Dinov2Config(**size, image_size=28, patch_size=14)), folder)


def tiny_sam(folder: Path) -> Path:
    """Two blocks of width 16 on 32 x 32 pixels, patches of 8."""
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    vision |= {"output_channels": 8, "num_pos_feats": 4, "mlp_dim": 16, "window_size": 2, "global_attn_indexes": [1]}
    decoder = {
        "hidden_size": 8,
        "mlp_dim": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 8,
    }
    prompt = {"hidden_size": 8, "image_size": 32, "patch_size": 8, "image_embedding_size": 4, "mask_input_channels": 4}
    return save_vision_model(
        SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)), folder
    )


def pixels(count: int, size: int) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_features_of_the_digits_are_the_classifiers_activations(tmp_path: Path) -> None:
    folder = write_pixel_backbone(tmp_path)
    found = load_features(folder)
    maps = found(pixels(2, 32))
    assert found.channels == (16, 32, 64)
    assert [tuple(part.shape) for part in maps] == [(2, 16, 256), (2, 32, 256), (2, 64, 64)]
    expected = load_classifier(folder).trunk(2 * pixels(2, 32) - 1)
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(maps[2].view(2, 64, 8, 8), 2), expected)
    assert load_features(folder, (2,)).channels == (64,)
    with pytest.raises(ValueError, match=r"layers is \(3,\); this network has layers 0 to 2"):
        load_features(folder, (3,))


def test_features_of_a_vision_model_are_its_hidden_states(tmp_path: Path) -> None:
    folder = tiny_dinov2(tmp_path)
    found = load_features(folder)
    assert isinstance(found, VisionFeatures)
    assert (found.layers, found.channels) == ((2, 4, 6, 8), (16,) * 4)
    small = pixels(2, 28)
    states = Dinov2Model.from_pretrained(folder)(pixel_values=(small - 0.5) / 0.25, output_hidden_states=True)
    for layer, part in zip(found.layers, found(small), strict=True):
        torch.testing.assert_close(part, states.hidden_states[layer].transpose(1, 2), rtol=1e-4, atol=1e-5)
    # Pictures of another size are resized, and the gradient reaches them.
    large = pixels(1, 40).requires_grad_()
    found(large)[0].square().sum().backward()
    assert large.grad is not None
    assert float(large.grad.abs().max()) > 0


def test_of_sam_the_encoder_is_taken(tmp_path: Path) -> None:
    found = load_features(tiny_sam(tmp_path), (0, 2))
    assert found.channels == (16, 16)
    assert [tuple(part.shape) for part in found(pixels(1, 20))] == [(1, 16, 16), (1, 16, 16)]


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no weights of the pixel discriminator's backbone at"):
        load_features(tmp_path / "none")
    folder = tiny_dinov2(tmp_path / "dino")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"lacks preprocessor_config\.json"):
        load_features(folder)


def test_only_the_heads_learn_and_gradients_pass(tmp_path: Path) -> None:
    """Logits start at 0, where both losses are log 2; after a few steps bright and dark pictures are apart."""
    settings = PixelGanConfig(
        latents="", weight=1.0, backbone=str(write_pixel_backbone(tmp_path)), head_width=8, optimizer=QUICK
    )
    discriminator = build_discriminator(settings, seed=4)
    assert isinstance(discriminator, PixelDiscriminator)
    trained = [name for name, weight in discriminator.named_parameters() if weight.requires_grad]
    assert trained
    assert all(name.startswith("heads.") for name in trained)
    bright, dark = 0.5 + 0.5 * pixels(8, 16), 0.5 * pixels(8, 16)
    first = discriminator_loss(discriminator(dark), discriminator(bright))
    assert first.item() == pytest.approx(2 * math.log(2), rel=1e-6)
    optimizer = torch.optim.Adam([weight for weight in discriminator.parameters() if weight.requires_grad], lr=0.02)
    for _ in range(15):
        optimizer.zero_grad()
        discriminator_loss(discriminator(dark), discriminator(bright)).backward()
        optimizer.step()
    assert discriminator_loss(discriminator(dark), discriminator(bright)).item() < 0.2
    leaf = dark.clone().requires_grad_()
    discriminator(leaf).sum().backward()
    assert leaf.grad is not None
    # What the student is pushed to is brighter.
    assert float(leaf.grad.mean()) > 0


def test_real_pictures_are_decoded_latents_in_their_own_order(inputs: TinyInputs) -> None:
    teacher, dataset = Teacher.load(inputs.teacher), LatentDataset.load(inputs.latents)
    real = RealPictures(dataset, seed=5)
    found = real.pixels([3, 4], teacher, device=torch.device("cpu"))
    rows = rows_of_samples([3, 4], 7, 5 + REAL_SEED)
    assert found.shape == (2, 3, 16, 16)
    assert torch.equal(found, teacher.decode(dataset.latents[rows]))
    assert sorted(rows_of_samples(range(7), 7, 5 + REAL_SEED)) == list(range(7))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": 0.0}, "weight 0.0.*leave pixel_gan out for no discriminator"),
        ({"head_width": 0}, "head_width 0"),
        ({"boundary": 1.0}, "boundary 1.0"),
    ],
)
def test_settings_are_checked(changes: dict[str, float], message: str) -> None:
    settings: dict[str, Any] = {"latents": "x", "backbone": "x", "weight": 1.0, "optimizer": QUICK}
    with pytest.raises(ValueError, match=message):
        PixelGanConfig(**{**settings, **changes})
