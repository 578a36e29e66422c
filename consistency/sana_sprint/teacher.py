"""A SANA teacher made ready for SANA-Sprint (arXiv:2503.09641): dense time, normalised queries and keys, fine-tuned.

Both make another function of a pretrained network, so that it is trained again for a while as it was before, by flow
matching. The paper: 5,000 steps, learning rate 2e-5, batch 1024. A teacher that was trained so needs none of this.

Legend: B batch; latents [N, C, h, w].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fewstep.consistency.times import logit_normal
from fewstep.core.condition import Condition
from fewstep.core.data import LatentDataset, PromptConditions
from fewstep.core.denoiser import Denoiser
from fewstep.core.families.sana import SanaFamily
from fewstep.core.families.table import build_family
from fewstep.core.networks.sana_networks import with_dense_time, with_qk_norm
from fewstep.core.paths import add_noise
from fewstep.core.randomness import Draw
from fewstep.core.teacher import Teacher

ADAM_BETAS = (0.9, 0.999)


@dataclass(frozen=True, kw_only=True)
class FineTuneRecipe:
    """Length and rate of the fine-tuning; `condition_dropout` keeps the unconditional side of guidance alive."""

    steps: int = 5000
    batch_size: int = 64
    learning_rate: float = 2e-5
    condition_dropout: float = 0.1
    clip_norm: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch_size < 1 or not (self.learning_rate > 0 and self.clip_norm > 0):
            raise ValueError(
                f"steps is {self.steps}, batch_size {self.batch_size}, learning_rate {self.learning_rate}, clip_norm "
                f"{self.clip_norm}; use 0 or more, 1 or more, and positive numbers"
            )
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(f"condition_dropout is {self.condition_dropout}; use a share from 0 to below 1")


def stabilised_teacher(teacher: Teacher) -> Teacher:
    """A teacher in which the network has dense time and query and key norms, with its weights, not fine-tuned yet.

    The given teacher is of no use afterwards: its pipeline gets the new network.

    Raises:
        ValueError: the teacher is no SanaPipeline, or its network has both already.
    """
    family = teacher.family
    pipeline: Any = teacher.pipeline
    if not isinstance(family, SanaFamily) or family.sprint:
        raise ValueError(f"only a SanaPipeline is stabilised for SANA-Sprint, this is a {type(pipeline).__name__}")
    network: Any = family.network(pipeline)
    is_dense, has_norm = family.time_scale <= 1, network.config["qk_norm"] is not None
    if is_dense and has_norm:
        raise ValueError("this network has dense time and query and key norms already: distil it as it is")
    network = network if is_dense else with_dense_time(network)
    network = network if has_norm else with_qk_norm(network)
    pipeline.register_modules(transformer=network)
    return Teacher(pipeline, path=teacher.path)


def train_stabilised(
    teacher: Teacher, data: LatentDataset, recipe: FineTuneRecipe, *, show_progress: bool = False
) -> list[float]:
    """Flow matching of the teacher's network on latents with prompts, in place; returns the losses.

    Logit-normal(0, 1) times (SD3, arXiv:2403.03206, Sec. 3.1), AdamW without decay, constant rate; one process. The
    network ends frozen and in eval mode.

    Raises:
        ValueError: the latents are not of the teacher's shape. FloatingPointError: a loss is not finite.
    """
    shape = teacher.latent_shape()
    if tuple(data.latents.shape[1:]) != shape:
        raise ValueError(f"the latents have shape {tuple(data.latents.shape[1:])}, the teacher makes {shape}")
    denoiser = Denoiser(teacher.family.network(teacher.pipeline), build_family(teacher.pipeline))
    prompts = PromptConditions(teacher, data.prompts, cache=True)
    return train_flow_matching(
        denoiser, denoiser, data.latents, prompts=prompts, recipe=recipe, show_progress=show_progress
    )


def train_flow_matching(
    denoiser: Denoiser,
    trained: nn.Module,
    latents: Tensor,
    *,
    prompts: PromptConditions,
    recipe: FineTuneRecipe,
    show_progress: bool = False,
) -> list[float]:
    """Flow matching of `trained`, all of the denoiser or a part of it, in place; returns the losses.

    The picture that a ControlNet follows stays where the prompt is dropped. See `train_stabilised` for the rest.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    denoiser.requires_grad_(False)
    trained.requires_grad_(True).train()
    device = next(denoiser.parameters()).device
    optimizer = torch.optim.AdamW(trained.parameters(), lr=recipe.learning_rate, betas=ADAM_BETAS, weight_decay=0.0)
    losses: list[float] = []
    for step in tqdm(range(recipe.steps), desc="flow matching", disable=not show_progress):
        first = step * recipe.batch_size
        draw = Draw(recipe.seed, list(range(first, first + recipe.batch_size)), device)
        rows = (draw.uniform("stabilise_row") * len(latents)).long().clamp(max=len(latents) - 1).cpu()
        keep = draw.uniform("stabilise_drop") >= recipe.condition_dropout
        condition = prompts.rows(rows.tolist())
        null = prompts.teacher.null_condition.expand(recipe.batch_size)
        null = replace(null, control=condition.control, guidance=condition.guidance)
        loss = flow_matching_loss(denoiser, latents[rows].to(device), condition.where(keep, null), draw)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}; lower learning_rate or clip_norm")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), recipe.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    denoiser.requires_grad_(False).eval()
    return losses


def flow_matching_loss(denoiser: Denoiser, x0: Tensor, condition: Condition, draw: Draw) -> Tensor:
    """mean |velocity(x_t, t) - (eps - x0)|^2 (arXiv:2210.02747)."""
    eps = draw.noise(tuple(x0.shape[1:]), "stabilise_noise")
    t = logit_normal(draw.noise((), "stabilise_time"), mean=0.0, std=1.0)
    return (denoiser(add_noise(x0, eps, t), t, condition) - (eps - x0)).square().mean()


def fine_tune_teacher(
    path: str | Path, data: LatentDataset, output: str | Path, *, recipe: FineTuneRecipe, device: str = "cpu"
) -> list[float]:
    """Stabilise the SANA teacher at `path`, fine-tune it, and write the pipeline to `output`; returns the losses.

    Raises:
        ValueError: see `stabilised_teacher` and `train_stabilised`. FileExistsError: `output` exists.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"{output} exists; give another directory")
    teacher = stabilised_teacher(Teacher.load(path, device=device))
    losses = train_stabilised(teacher, data, recipe, show_progress=True)
    teacher.pipeline.save_pretrained(output, safe_serialization=True)
    return losses
