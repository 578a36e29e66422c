"""The optimizers that settings name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fewstep.core.config import OptimizerConfig

OTHERS = {"adamw_8bit": "bitsandbytes", "adam_8bit": "bitsandbytes", "came": "came-pytorch"}


def build_optimizer(parameters: Iterable[tuple[str, nn.Parameter]], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of one network. Weight decay is decoupled in AdamW, its 8-bit form and CAME.

    Raises:
        ValueError: its package is not installed.
    """
    trained = [parameter for _, parameter in parameters]
    shared: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    eps = 1e-8 if settings.eps is None else settings.eps
    if settings.kind == "came":
        # Its pair of eps is the paper's (arXiv:2307.02047), which SANA-Sprint trains with.
        return _class_of("came")(trained, betas=settings.betas, eps=(1e-30, 1e-16), **shared)
    first, second = settings.betas
    shared |= {"betas": (first, second), "eps": eps}
    match settings.kind:
        case "adamw":
            # One kernel for all parameters: a third of the time of the loop over them on a CPU.
            return torch.optim.AdamW(trained, fused=True, **shared)
        case "adam":
            return torch.optim.Adam(trained, fused=True, **shared)
        case "radam":
            return torch.optim.RAdam(trained, **shared)
        case _:
            return _class_of(settings.kind)(trained, **shared)


def _class_of(kind: str) -> Any:
    """The class of a kind that another package brings."""
    try:
        if kind == "came":
            from came_pytorch import CAME

            return CAME
        from bitsandbytes import optim

        return optim.AdamW8bit if kind == "adamw_8bit" else optim.Adam8bit
    except ImportError as error:
        raise ValueError(
            f"optimizer.kind is {kind}, and {OTHERS[kind]} is not installed ({error}): pip install {OTHERS[kind]}, or "
            "take adamw"
        ) from error
