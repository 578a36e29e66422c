"""Small agreements between the processes of a data-parallel run."""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor, nn


class Processes:
    """This process among `world_size`; with one process nothing is sent.

    Flags and integers travel over gloo, so that no device has to be synchronised for them.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._control: torch.distributed.ProcessGroup | None = None
        if world_size > 1 and torch.distributed.get_backend() != "gloo":
            group = torch.distributed.new_group(backend="gloo")
            assert isinstance(group, torch.distributed.ProcessGroup), "every process is a member of this group"
            self._control = group

    def maximum(self, values: list[int]) -> list[int]:
        """The largest of each integer over processes."""
        if self.world_size == 1:
            return values
        shared = torch.tensor(values, dtype=torch.int64)
        torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX, group=self._control)
        return [int(value) for value in shared]

    def from_first(self, value: int) -> int:
        """The value of process 0."""
        if self.world_size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.int64)
        torch.distributed.broadcast(shared, src=0, group=self._control)
        return int(shared)

    @torch.no_grad()
    def copy_from_first(self, module: nn.Module) -> None:
        """Give a module the trained parameters and the buffers of process 0.

        Frozen weights are what every process has read of the same file, and may be shared by several networks.
        """
        if self.world_size == 1:
            return
        for tensor in [*(p for p in module.parameters() if p.requires_grad), *module.buffers()]:
            shared = tensor.contiguous()
            torch.distributed.broadcast(shared, src=0)
            tensor.copy_(shared)

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean of a tensor over processes, on its device; a copy without gradient."""
        total = tensor.detach().clone()
        if self.world_size == 1:
            return total
        torch.distributed.all_reduce(total)
        return total / self.world_size

    def rows(self, tensor: Tensor) -> Tensor:
        """A CPU tensor of every process, stacked: [world_size, ...]."""
        if self.world_size == 1:
            return tensor[None]
        rows = [torch.empty_like(tensor) for _ in range(self.world_size)]
        torch.distributed.all_gather(rows, tensor, group=self._control)
        return torch.stack(rows)
