"""ImageReward (arXiv:2304.05977) on transformers' BLIP, from local weights.

The published checkpoint names its tensors as BLIP's own repository does; `convert_image_reward` renames them. The text
encoder has the same names in both, up to a prefix; the vision tower is a timm ViT there.

Shapes: pixels [B, 3, H, W] in [0, 1], scores [B].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.evaluation.scorers.preprocess import Preprocess
from fewstep.evaluation.scorers.scorer import ScorerCard
from fewstep.evaluation.scorers.weights import ScoreHead, load_strictly, part_of, read_weights, require_files

# Of the published model, over its training set: scores are (output - mean) / std.
OUTPUT_MEAN, OUTPUT_STD = 0.16717363, 1.03333950
MAX_TOKENS = 35
VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"^norm\.", "post_layernorm."),
)


class ImageReward(nn.Module):
    """The z-score of ImageReward, about -2 to 2, not bounded; differentiable in the pixels.

    The prompt attends to the picture (BLIP's text encoder with cross-attention), and the head reads the first token.
    Prompts are cut at 35 tokens.
    """

    def __init__(
        self, vision: nn.Module, text: nn.Module, head: ScoreHead, tokenizer: Any, *, weights: str | None = None
    ) -> None:
        super().__init__()
        self.vision: Any = vision.requires_grad_(False).eval()
        self.text: Any = text.requires_grad_(False).eval()
        self.head = head.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        size = self.vision.config.image_size
        self.preprocess = Preprocess((size, size))
        self.card = ScorerCard("image_reward", differentiable=True, weights=weights)

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        length = min(MAX_TOKENS, self.text.config.max_position_embeddings)
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(pixels.device)
        picture = self.vision(pixel_values=self.preprocess(pixels)).last_hidden_state
        seen = torch.ones(picture.shape[:2], dtype=torch.long, device=pixels.device)
        states = self.text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=picture,
            encoder_attention_mask=seen,
        ).last_hidden_state
        return (self.head(states[:, 0]) - OUTPUT_MEAN) / OUTPUT_STD


def image_reward_config() -> Any:
    """The BlipConfig of ImageReward-v1.0: ViT-L/16 at 224 pixels and a BERT of 12 layers and 12 heads."""
    from transformers import BlipConfig

    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
    }
    return BlipConfig(text_config={"num_attention_heads": 12, "encoder_hidden_size": 1024}, vision_config=vision)


def convert_image_reward(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of the published checkpoint to `vision.`, `text.` and `head.`; index buffers are dropped.

    Raises ValueError for a tensor that belongs to none of them.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("position_ids"):
            continue
        if name.startswith("blip.visual_encoder."):
            short = name.removeprefix("blip.visual_encoder.")
            for pattern, target in VISION_NAMES:
                short, hits = re.subn(pattern, target, short)
                if hits:
                    break
            found[f"vision.{short}"] = tensor
        elif name.startswith("blip.text_encoder."):
            found[f"text.{name.removeprefix('blip.text_encoder.')}"] = tensor
        elif name.startswith("mlp."):
            found[f"head.{name.removeprefix('mlp.')}"] = tensor
        else:
            raise ValueError(f"{name} is no tensor of ImageReward; its names start with blip. or mlp.")
    return found


def load_image_reward(folder: str | Path, *, device: str = "cpu") -> ImageReward:
    """ImageReward from a folder with the converted checkpoint and the files of its tokenizer (bert-base-uncased).

    A config.json (BlipConfig) beside them describes another size; without it the published architecture is meant.

    Raises:
        ValueError: weights or tokenizer are missing, or the weights are not those of ImageReward.
    """
    folder = Path(folder)
    tensors = convert_image_reward(read_weights(folder, scorer="ImageReward"))
    require_files(folder, ("tokenizer_config.json",), scorer="ImageReward")
    # Slow imports; mistakes above are answered without them.
    from transformers import AutoTokenizer, BlipConfig, BlipTextModel, BlipVisionModel

    # Any: transformers types the parts of a configuration as dictionaries too.
    config: Any = BlipConfig.from_pretrained(folder) if (folder / "config.json").is_file() else image_reward_config()
    vision, text = BlipVisionModel(config.vision_config), BlipTextModel(config.text_config, add_pooling_layer=False)
    head = ScoreHead(config.text_config.hidden_size)
    for module, prefix in ((vision, "vision."), (text, "text."), (head, "head.")):
        load_strictly(module, part_of(tensors, prefix), scorer="ImageReward")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return ImageReward(vision, text, head, tokenizer, weights=str(folder)).to(device)
