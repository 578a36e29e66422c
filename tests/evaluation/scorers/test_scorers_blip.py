"""ImageReward on tiny random BLIP towers: published names map to transformers, and the score is the plain formula."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from transformers import BlipConfig, BlipTextModel, BlipVisionModel, CLIPTokenizer

from fewstep.evaluation.scorers.blip import convert_image_reward, image_reward_config, load_image_reward
from fewstep.evaluation.scorers.scorer import score
from fewstep.evaluation.scorers.weights import ScoreHead, part_of

PROMPTS = ["a bold three", "the digit seven"]


@pytest.fixture(scope="module")
def tokenizer(repository) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(repository / "assets" / "digits_image" / "tokenizer")


@pytest.fixture(scope="module")
def towers(tokenizer):
    """The towers as the published checkpoint has them: a timm ViT, a BERT with cross-attention, a head."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**small, "image_size": 32, "patch_size": 16, "layer_norm_eps": 1e-6}
    text = {**small, "vocab_size": len(tokenizer), "encoder_hidden_size": 32, "max_position_embeddings": 40}
    config: Any = BlipConfig(text_config=text, vision_config=vision)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        vit = VisionTransformer(
            img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2, num_classes=0
        )
        for parameter in vit.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        bert = BlipTextModel(config.text_config, add_pooling_layer=False).eval()
        head = ScoreHead(32).eval()
    return config, vit.eval(), bert, head


@pytest.fixture(scope="module")
def folder(towers, tmp_path_factory, tokenizer) -> Path:
    config, vit, bert, head = towers
    place = tmp_path_factory.mktemp("image_reward")
    tensors = {f"blip.visual_encoder.{name}": tensor for name, tensor in vit.state_dict().items()}
    tensors |= {f"blip.text_encoder.{name}": tensor for name, tensor in bert.state_dict().items()}
    tensors |= {f"mlp.{name}": tensor for name, tensor in head.state_dict().items()}
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, place / "image_reward.safetensors")
    config.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def test_the_vision_tower_is_the_vit_of_the_checkpoint(towers) -> None:
    config, vit, _, _ = towers
    model = BlipVisionModel(config.vision_config).eval()
    named = convert_image_reward({f"blip.visual_encoder.{name}": tensor for name, tensor in vit.state_dict().items()})
    model.load_state_dict(part_of(named, "vision."), strict=True)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        difference = model(pixel_values=pixels).last_hidden_state - vit.forward_features(pixels)
    assert difference.abs().max() < 1e-5
    assert vit.forward_features(pixels).std() > 0.05


def test_score_is_the_normalised_head_on_the_first_token(folder, towers) -> None:
    _, vit, bert, head = towers
    scorer = load_image_reward(folder)
    pixels = torch.rand(2, 3, 32, 32)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    tokens = scorer.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    assert tokens["input_ids"].shape == (2, 35)
    with torch.no_grad():
        picture = vit.forward_features((pixels - mean) / std)
        states = bert(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=picture,
            encoder_attention_mask=torch.ones(2, 5),
        ).last_hidden_state
        expected = (head(states[:, 0]) - 0.16717362830052426) / 1.0333394966054072
    assert (score(scorer, pixels, PROMPTS) - expected).abs().max() < 1e-5
    assert (score(scorer, pixels, PROMPTS, chunk=1) - expected).abs().max() < 1e-5


def test_gradient_reaches_the_pixels(folder) -> None:
    scorer = load_image_reward(folder)
    coarse = torch.rand(2, 3, 4, 4)
    pixels = (0.25 + 0.5 * F.interpolate(coarse, size=(40, 33), mode="bilinear")).requires_grad_()
    (gradient,) = torch.autograd.grad(score(scorer, pixels, PROMPTS, gradient=True).sum(), pixels)
    assert gradient.shape == (2, 3, 40, 33)
    assert gradient.abs().max() > 0.0
    assert all(not parameter.requires_grad for parameter in scorer.parameters())


def test_the_published_size() -> None:
    config = image_reward_config()
    assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers) == (1024, 24)
    assert (config.text_config.encoder_hidden_size, config.text_config.vocab_size) == (1024, 30524)
    assert config.text_config.num_attention_heads == 12


def test_foreign_weights_are_errors(folder, tmp_path) -> None:
    with pytest.raises(ValueError, match="visual is no tensor of ImageReward"):
        convert_image_reward({"visual": torch.ones(1)})
    save_file({"mlp.layers.0.weight": torch.ones(1024, 32)}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"lacks tokenizer_config\.json"):
        load_image_reward(tmp_path)
    for name in ("tokenizer_config.json", "tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ValueError, match=r"not those of ImageReward(?s:.)*Missing key"):
        load_image_reward(tmp_path)
