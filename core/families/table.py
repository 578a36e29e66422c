"""The one table from the class of a pipeline to its family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import DiffusionPipeline

from fewstep.core.families.family import Family
from fewstep.core.families.sana import SanaFamily
from fewstep.core.families.sana_control import SanaControlFamily
from fewstep.core.families.sd3 import Sd3Family
from fewstep.core.families.unet import UnetFamily
from fewstep.core.families.wan import WanFamily

FAMILIES: dict[str, Callable[[Any], Family]] = {
    "SanaControlNetPipeline": SanaControlFamily.from_pipeline,
    "SanaPipeline": SanaFamily.from_pipeline,
    "SanaSprintPipeline": SanaFamily.from_pipeline,
    "StableDiffusion3Pipeline": Sd3Family.from_pipeline,
    "StableDiffusionPipeline": UnetFamily.from_pipeline,
    "StableDiffusionXLPipeline": UnetFamily.from_pipeline,
    "WanPipeline": WanFamily.from_pipeline,
}


def build_family(pipeline: DiffusionPipeline) -> Family:
    """The family of a pipeline.

    Raises:
        ValueError: no family is known for its class, or the family cannot express its scheduler.
    """
    name = type(pipeline).__name__
    require_known_class(name)
    return FAMILIES[name](pipeline)


def require_known_class(name: str) -> None:
    """Raises ValueError for the class of a pipeline that no family is for, with those that are known."""
    if name not in FAMILIES:
        raise ValueError(f"no family for the pipeline class {name}; known are {', '.join(sorted(FAMILIES))}")
