"""Scorers on CLIP embeddings: CLIP score, PickScore, HPSv2 and the LAION aesthetic predictor, from local weights.

All are differentiable in the pixels. Shapes: pixels [B, 3, H, W] in [0, 1], embeddings [B, D], scores [B].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.evaluation.clip_score import ClipScorer, load_clip_scorer
from fewstep.evaluation.scorers.preprocess import Preprocess
from fewstep.evaluation.scorers.scorer import ScorerCard
from fewstep.evaluation.scorers.weights import ScoreHead, load_strictly, read_weights, require_files

PICKSCORE_TOKENS = 77


class ClipScore(nn.Module):
    """`ClipScorer` as a scorer: 100 * max(cosine, 0) (arXiv:2104.08718, Eq. 1 with w = 100), in [0, 100]."""

    def __init__(self, clip: ClipScorer, *, weights: str | None = None) -> None:
        super().__init__()
        self.clip = clip
        self.card = ScorerCard("clip_score", 0.0, 100.0, differentiable=True, weights=weights)

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        return self.clip(pixels, prompts)


class HumanPreferenceScore(nn.Module):
    """HPSv2 (arXiv:2306.09341): cosine of the fine-tuned ViT-H/14 embeddings; v2.1 is the same with other weights.

    Published figures multiply it by 100; here it is the cosine, about 0.2 to 0.35. As its package does, pictures are
    fitted by their longer side and padded with black.
    """

    def __init__(self, clip: ClipScorer, *, weights: str | None = None) -> None:
        super().__init__()
        self.clip = clip
        self.card = ScorerCard("hpsv2", -1.0, 1.0, differentiable=True, weights=weights)
        self.preprocess = preprocess_of(clip, fit="longest")

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        images = self.clip.model.encode_image(self.preprocess(pixels), normalize=True)
        texts = self.clip.model.encode_text(self.clip.tokenizer(prompts).to(pixels.device), normalize=True)
        return (images * texts).sum(dim=-1)


class AestheticScore(nn.Module):
    """The LAION aesthetic predictor v2: an affine head on the normalised CLIP ViT-L/14 embedding of the picture.

    About 1 to 10, typically 5 to 6.5, not bounded. Prompts are not read. Source: the repository
    christophschuhmann/improved-aesthetic-predictor, which is the only description.
    """

    def __init__(self, clip: ClipScorer, head: ScoreHead, *, weights: str | None = None) -> None:
        super().__init__()
        self.clip = clip
        self.head = head.requires_grad_(False).eval()
        self.card = ScorerCard("aesthetic", differentiable=True, weights=weights)
        self.preprocess = preprocess_of(clip, fit="shortest")

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        return self.head(self.clip.model.encode_image(self.preprocess(pixels), normalize=True))


class PickScore(nn.Module):
    """PickScore (arXiv:2305.01569, Eq. 1): exp(logit scale) * cosine of a fine-tuned CLIP ViT-H/14.

    About 18 to 24 for pictures of models; some codes divide by 26. `model` is a transformers CLIPModel.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, weights: str | None = None) -> None:
        super().__init__()
        # CLIPModel's submodules are typed as modules or tensors.
        self.model: Any = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        size = self.model.config.vision_config.image_size
        self.preprocess = Preprocess((size, size), crop_low=True)
        scale = self.model.logit_scale.exp().item()
        self.card = ScorerCard("pickscore", -scale, scale, differentiable=True, weights=weights)

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        length = min(PICKSCORE_TOKENS, self.model.config.text_config.max_position_embeddings)
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        tokens = tokens.to(pixels.device)
        # The features by their parts: what get_image_features returns differs between versions of transformers.
        vision = self.model.vision_model(pixel_values=self.preprocess(pixels)).pooler_output
        text = self.model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        images = F.normalize(self.model.visual_projection(vision), dim=-1)
        texts = F.normalize(self.model.text_projection(text.pooler_output), dim=-1)
        return self.model.logit_scale.exp() * (images * texts).sum(dim=-1)


def preprocess_of(clip: ClipScorer, *, fit: str) -> Preprocess:
    """Size, mean and std of an open_clip model, with the way of fitting that its scorer was trained with."""
    mean, std = (tuple(cast(Tensor, buffer).flatten().tolist()) for buffer in (clip.mean, clip.std))
    return Preprocess(clip.image_size, fit=cast(Any, fit), mean=mean, std=std)


def load_clip_score(weights: str | Path, *, model: str | None = None, device: str = "cpu") -> ClipScore:
    """CLIP score; `weights` and `model` as in `load_clip_scorer`. Raises ValueError as that does."""
    return ClipScore(load_clip_scorer(weights, model=model, device=device), weights=str(weights))


def load_hpsv2(weights: str | Path, *, model: str | None = "ViT-H-14", device: str = "cpu") -> HumanPreferenceScore:
    """HPSv2 or v2.1 from a folder in open_clip's layout or a .safetensors file.

    Raises:
        ValueError: weights are missing, pickled (it says how to convert them) or of another architecture.
    """
    _require_no_pickle(weights, "HPSv2")
    return HumanPreferenceScore(load_clip_scorer(weights, model=model, device=device), weights=str(weights))


def load_aesthetic(
    head: str | Path, *, clip: str | Path, clip_model: str | None = "ViT-L-14-quickgelu", device: str = "cpu"
) -> AestheticScore:
    """The aesthetic predictor: `head` is its .safetensors file, `clip` OpenAI's ViT-L/14 for open_clip.

    OpenAI trained with the quick GELU, so the architecture of a bare file must say so.

    Raises:
        ValueError: weights are missing, pickled (it says how to convert them) or of another architecture.
    """
    tensors = read_weights(head, scorer="the aesthetic predictor")
    _require_no_pickle(clip, "CLIP ViT-L/14")
    network = load_clip_scorer(clip, model=clip_model, device=device)
    first = tensors.get("layers.0.weight")
    if first is None:
        raise ValueError(f"{head} holds {sorted(tensors)[:3]} ...; the aesthetic head has layers.0.weight and so on")
    module = ScoreHead(first.shape[1])
    load_strictly(module, tensors, scorer="the aesthetic predictor")
    return AestheticScore(network, module.to(device), weights=str(head))


def load_pickscore(folder: str | Path, *, device: str = "cpu") -> PickScore:
    """PickScore from a folder with config.json, safetensors and the tokenizer's files (those of CLIP ViT-H/14).

    Raises:
        ValueError: the folder, its configuration, weights or tokenizer are missing or do not fit together.
    """
    folder = Path(folder)
    tensors = read_weights(folder, scorer="PickScore")
    require_files(folder, ("config.json", "tokenizer_config.json"), scorer="PickScore")
    # Slow imports; mistakes above are answered without them.
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    model = CLIPModel(CLIPConfig.from_pretrained(folder))
    known = set(model.state_dict())
    # Older transformers wrote these index buffers into the file; they are no weights.
    indices = {f"{part}_model.embeddings.position_ids" for part in ("text", "vision")} - known
    load_strictly(model, {k: v for k, v in tensors.items() if k not in indices}, scorer="PickScore")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return PickScore(model, tokenizer, weights=str(folder)).to(device)


def _require_no_pickle(weights: str | Path, scorer: str) -> None:
    place = Path(weights)
    if not place.exists() or (place.is_file() and place.suffix != ".safetensors"):
        read_weights(place, scorer=scorer)
