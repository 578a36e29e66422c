"""Objects in pictures: Mask2Former's instance segmentation, read as GenEval's detector reads it.

The class, its post-processing and its thresholds are those of GenEval (arXiv:2310.11513), which runs them in mmdet;
here the network is that of transformers, and its own post-processing, which scales masks to 384 x 384 first, is not
used.

Legend: Q queries, K classes, H x W the picture's size; boxes (left, top, right, bottom) in pixels, the last two just
behind the object.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.evaluation.scorers.preprocess import normalise
from fewstep.evaluation.scorers.weights import require_files

SHORT_SIDE, LONG_SIDE, STRIDE = 800, 1333, 32
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MOST_OBJECTS = 16
# COCO's 80 classes in their order, as GenEval's prompts call them.
NAMES = """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign
parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase
frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle
wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch
potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,oven
toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"""
CLASSES = tuple(name for line in NAMES.splitlines() for name in line.split(","))


@dataclass(frozen=True, eq=False)
class FoundObject:
    """One object: its `score` in [0, 1], `box` and `mask` [H, W] (bool)."""

    score: float
    box: tuple[float, float, float, float]
    mask: Tensor


Objects = Mapping[str, list[FoundObject]]


class Detector(nn.Module):
    """Objects by class. `network` is transformers' Mask2FormerForUniversalSegmentation for the 80 classes of COCO.

    Raises:
        ValueError: the network was not trained on these classes.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network.requires_grad_(False).eval()
        labels = self.network.config.id2label
        ends = labels.get(0), labels.get(len(CLASSES) - 1)
        if len(labels) != len(CLASSES) or ends != ("person", "toothbrush"):
            raise ValueError(
                f"the detector knows {len(labels)} classes from {ends[0]!r} on; GenEval needs the 80 of COCO's "
                "instances, as facebook/mask2former-swin-small-coco-instance has them"
            )

    @torch.no_grad()
    def forward(self, pixels: Tensor, threshold: float) -> dict[str, list[FoundObject]]:
        """Objects of one picture [3, H, W] in [0, 1], surest first, at most 16 of a class, none below the threshold."""
        height, width = pixels.shape[-2:]
        resized, padded = fitted(pixels[None])
        output = self.network(pixel_values=normalise(padded, mean=IMAGENET_MEAN, std=IMAGENET_STD))
        sure = candidates(output.class_queries_logits[0].float(), threshold)
        if not sure:
            return {}
        # Of a hundred masks few are sure; at the picture's size all would take 400 MB for 1024 x 1024.
        small = output.masks_queries_logits[:, [each.query for each in sure]].float()
        large = F.interpolate(small, size=padded.shape[-2:], mode="bilinear", align_corners=False)
        large = large[..., : resized[0], : resized[1]]
        masks = F.interpolate(large, size=(height, width), mode="bilinear", align_corners=False)[0]
        return objects_of(sure, masks, threshold)


def fitted(pixels: Tensor) -> tuple[tuple[int, int], Tensor]:
    """The size that a picture [1, 3, H, W] is scaled to, and the scaled picture, padded to multiples of 32.

    The shorter side becomes 800, unless the longer one would then exceed 1333.
    """
    height, width = pixels.shape[-2:]
    scale = min(LONG_SIDE / max(height, width), SHORT_SIDE / min(height, width))
    size = int(height * scale + 0.5), int(width * scale + 0.5)
    scaled = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    bottom, right = (math.ceil(side / STRIDE) * STRIDE - side for side in size)
    # Padding is black after normalising, so it is the mean before.
    mean = scaled.new_tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    return size, F.pad(scaled - mean, (0, right, 0, bottom)) + mean


@dataclass(frozen=True)
class Candidate:
    """A query that is sure of a class."""

    query: int
    name: str
    probability: float


def candidates(class_logits: Tensor, threshold: float) -> list[Candidate]:
    """Of logits [Q, K + 1], the last class being none: the Q surest pairs of query and class, those above threshold."""
    count, classes = class_logits.shape[0], class_logits.shape[1] - 1
    scores, places = class_logits.softmax(dim=-1)[:, :-1].flatten().topk(count)
    pairs = zip(scores.tolist(), places.tolist(), strict=True)
    return [Candidate(place // classes, CLASSES[place % classes], p) for p, place in pairs if p > threshold]


def objects_of(sure: list[Candidate], mask_logits: Tensor, threshold: float) -> dict[str, list[FoundObject]]:
    """Objects of candidates and their masks' logits [len(sure), H, W] at the picture's size.

    A score is the class's probability times the mean probability of the mask inside itself.
    """
    found: dict[str, list[FoundObject]] = {}
    for candidate, logits in zip(sure, mask_logits, strict=True):
        mask = logits > 0
        score = candidate.probability * float((logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6))
        if score > threshold:
            found.setdefault(candidate.name, []).append(FoundObject(score, box_of(mask), mask))
    return {name: sorted(each, key=lambda one: -one.score)[:MOST_OBJECTS] for name, each in found.items()}


def box_of(mask: Tensor) -> tuple[float, float, float, float]:
    """The smallest box around a mask [H, W] that is not empty."""
    rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def load_detector(folder: str | Path, *, device: str = "cpu") -> Detector:
    """From a folder in transformers' layout: config.json and safetensors.

    Raises:
        ValueError: a file is missing, or the model is another one.
    """
    from transformers import Mask2FormerForUniversalSegmentation

    place = Path(folder)
    require_files(place, ("config.json",), scorer="GenEval's detector")
    if not list(place.glob("*.safetensors")):
        raise ValueError(f"{place} holds no .safetensors file; GenEval's detector is loaded from no other format")
    network = Mask2FormerForUniversalSegmentation.from_pretrained(place, use_safetensors=True)
    return Detector(network).to(device)
