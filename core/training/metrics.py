"""Means of metrics since the last record, without a device synchronisation per step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class MetricWindow:
    """Sums of scalars by name; a metric that is given in some steps only is averaged over those steps."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Take in the scalars of one step; tensors stay on their device.

        Raises:
            ValueError: a tensor has more than one element.
        """
        for name, value in metrics.items():
            if isinstance(value, Tensor):
                if value.numel() != 1:
                    raise ValueError(f"metric {name} has shape {tuple(value.shape)}; give one number, such as its mean")
                value = value.detach().reshape(()).double()
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def sums(self, device: torch.device) -> tuple[list[str], Tensor]:
        """Names in order, and their sums on this process as one fp64 tensor [number of names] on `device`."""
        names = sorted(self._sums)
        if not names:
            return [], torch.zeros(0, dtype=torch.float64, device=device)
        values = [torch.as_tensor(self._sums[name], dtype=torch.float64, device=device) for name in names]
        return names, torch.stack(values)

    def count(self, name: str) -> int:
        """In how many steps of the window a metric was given."""
        return self._counts[name]

    def clear(self) -> None:
        self._sums.clear()
        self._counts.clear()

    def load(self, window: Mapping[str, tuple[float, int]]) -> None:
        """Go on from sums and counts by name, as a checkpoint in the middle of a window keeps them."""
        self.clear()
        for name, (total, count) in window.items():
            self._sums[name], self._counts[name] = total, count


def mean_records(records: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each metric over the slices of a step."""
    if not records:
        return {}
    return {name: torch.stack([record[name] for record in records]).mean() for name in records[0]}
