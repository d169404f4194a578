"""Several processes that train one SAE together, as torchrun starts them: each has a part of every batch.

Sums over ranks give every rank the gradients of the whole batch, so all take the same step. One process is the trivial
case, in which nothing is done.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """The one that writes."""
        return self.rank == 0

    def part(self, n: int) -> slice:
        """This rank's part of n tokens; as `TokenStream.batches` cuts them."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def sum_(self, *tensors: torch.Tensor) -> None:
        """In place: the sum over all ranks."""
        if self.size > 1:
            for tensor in tensors:
                # a transposed weight's gradient is dense in memory, which is all that a sum needs
                dist.all_reduce(tensor.T if tensor.dim() == 2 and not tensor.is_contiguous() else tensor)

    def any_(self, flags: torch.Tensor) -> None:
        """In place: True where it is True on any rank."""
        if self.size > 1:
            counts = flags.to(torch.int32)
            dist.all_reduce(counts)
            flags.copy_(counts > 0)

    def total(self, n: int) -> int:
        """The sum of n over all ranks."""
        if self.size == 1:
            return n
        counts = [0] * self.size
        dist.all_gather_object(counts, n)
        return sum(counts)

    def gathered(self, values: torch.Tensor, most: int) -> torch.Tensor:
        """The finite numbers of all ranks, of which each has at most `most`."""
        if self.size == 1:
            return values
        mine = torch.full((most,), -torch.inf, device=values.device, dtype=values.dtype)
        mine[: len(values)] = values
        everyones = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyones, mine)
        together = torch.cat(everyones)
        return together[together > -torch.inf]

    def shared(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier()


ALONE = Ranks()


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun started (it sets WORLD_SIZE), or this process alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
