"""Several processes that train one SAE together, as torchrun starts them: each works on its slice of every batch.

Sums over all ranks give every rank the gradients of the whole batch, so all ranks take the same step. With one process
every method returns at once.
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
    """This process among all. Every method that communicates must be called on all ranks, in the same order."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """True on rank 0, the one that writes files."""
        return self.rank == 0

    def local_slice(self, n: int) -> slice:
        """This rank's slice of n tokens; `TokenStream.batches` cuts batches in the same way."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def all_reduce_sum(self, n: int) -> int:
        """The sum of n over all ranks."""
        if self.size == 1:
            return n
        counts = [0] * self.size
        dist.all_gather_object(counts, n)
        return sum(counts)

    def all_reduce_sum_(self, *tensors: torch.Tensor) -> None:
        """In place: the sum over all ranks."""
        if self.size > 1:
            for tensor in tensors:
                # the gradient of a transposed weight is dense in memory, which is all that a sum needs
                dist.all_reduce(tensor.T if tensor.dim() == 2 and not tensor.is_contiguous() else tensor)

    def all_reduce_any_(self, flags: torch.Tensor) -> None:
        """In place, for booleans: True where any rank has True."""
        if self.size > 1:
            counts = flags.to(torch.int32)
            dist.all_reduce(counts)
            flags.copy_(counts > 0)

    def all_gather(self, values: torch.Tensor, most: int) -> torch.Tensor:
        """The values of all ranks, one after the other.

        values : (n,) finite numbers, n <= most; n may differ between ranks, `most` may not
        """
        if self.size == 1:
            return values
        mine = torch.full((most,), -torch.inf, device=values.device, dtype=values.dtype)
        mine[: len(values)] = values
        of_all = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(of_all, mine)
        together = torch.cat(of_all)
        return together[together > -torch.inf]

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0, on every rank; it is pickled."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait until every rank has come here."""
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
