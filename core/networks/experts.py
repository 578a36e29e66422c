"""Two networks of one class as one, of which the time of a sample chooses (Wan 2.2 A14B).

Legend: B batch; x_t [B, C, F, h, w]; t [B].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.condition import Condition

HIGH, LOW = "transformer", "transformer_2"


class Experts(nn.Module):
    """The expert of much noise, at times from `boundary` up, and the one of little noise.

    Adapters, gradient checkpointing and saving reach both. In training a batch may be on one side alone; the other
    expert then has gradients of zero, as the loss of that batch says, so that every process has gradients of all.

    Args:
        transformer: the expert of much noise.
        transformer_2: the expert of little noise.
        boundary: canonical time in (0, 1), `boundary_ratio` of the pipeline.
        time_scale: the scheduler's time at t = 1, in whose units the stock call compares.
    """

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module, *, boundary: float, time_scale: float) -> None:
        super().__init__()
        self.transformer: Any = transformer
        self.transformer_2: Any = transformer_2
        self.boundary, self.time_scale = boundary, time_scale

    @property
    def parts(self) -> dict[str, Any]:
        return {HIGH: self.transformer, LOW: self.transformer_2}

    @property
    def config(self) -> Mapping[str, Any]:
        """That of the expert of much noise; both are alike in shape."""
        return self.transformer.config

    @property
    def peft_config(self) -> Any:
        """That of the adapters, which are alike on both."""
        return self.transformer.peft_config

    def is_high(self, t: Tensor) -> Tensor:
        """[B] bool, compared as the stock call does: in timesteps."""
        return t * self.time_scale >= self.boundary * self.time_scale

    def forward(
        self, call: Callable[[Any, Tensor, Tensor, Condition], Tensor], x_t: Tensor, t: Tensor, condition: Condition
    ) -> Tensor:
        """`call(expert, x_t, t, condition)` of each sample's expert, each expert once for its samples.

        Raises:
            ValueError: t is not [B].
        """
        if t.ndim != 1:
            raise ValueError(f"a network of two experts takes one time a sample, got shape {tuple(t.shape)}")
        t = t.expand(len(x_t))
        high = self.is_high(t.detach())
        rows = {HIGH: high.nonzero()[:, 0], LOW: (~high).nonzero()[:, 0]}
        outputs, order, idle = [], [], []
        for name, chosen in rows.items():
            if len(chosen) == 0:
                idle.append(self.parts[name])
            else:
                outputs.append(call(self.parts[name], x_t[chosen], t[chosen], condition.index(chosen)))
                order.append(chosen)
        joined = torch.cat(outputs)[torch.cat(order).argsort()]
        for expert in idle if torch.is_grad_enabled() else ():
            for weight in expert.parameters():
                if weight.requires_grad:
                    joined = joined + 0.0 * weight.flatten()[0].to(joined)
        return joined

    def enable_gradient_checkpointing(self) -> None:
        """Of both."""
        for network in self.parts.values():
            network.enable_gradient_checkpointing()

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Of both, alike."""
        for network in self.parts.values():
            network.add_adapter(adapter_config, adapter_name)

    def fuse_lora(self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: Any = None) -> None:
        """Of both."""
        for network in self.parts.values():
            network.fuse_lora(lora_scale=lora_scale, safe_fusing=safe_fusing, adapter_names=adapter_names)

    def unload_lora(self) -> None:
        """Of both."""
        for network in self.parts.values():
            network.unload_lora()
