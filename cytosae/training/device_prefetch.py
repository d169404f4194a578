"""Batches copied to the device; to a GPU while it works on the batch before, so that no step waits for a copy."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

Float16 = npt.NDArray[np.float16]
Batch = TypeVar("Batch")


def on_device(batches: Iterator[Float16], device: str) -> Iterator[torch.Tensor]:
    """The batches as float16 tensors on `device`. For a GPU, a thread copies one batch ahead.

    Memory: two batches on the GPU, one in pinned memory on the host.
    """
    if not device.startswith("cuda"):
        return map(torch.from_numpy, batches)
    return one_ahead(batches, _Sender(device).send)


def one_ahead(batches: Iterator[Batch], send: Callable[[Batch], Callable[[], torch.Tensor]]) -> Iterator[torch.Tensor]:
    """Read and send each batch in a thread while the caller works on the one before.

    send : called in the thread; returns a function that is called in the caller's thread and gives the tensor

    An error from reading or sending a batch is raised when that batch is asked for.
    """

    def send_next() -> Callable[[], torch.Tensor] | None:
        batch = next(batches, None)
        return None if batch is None else send(batch)

    with ThreadPoolExecutor(1, thread_name_prefix="to device") as thread:
        pending = thread.submit(send_next)
        while receive := pending.result():
            pending = thread.submit(send_next)
            yield receive()


class _Sender:
    """Copies through one pinned buffer on its own CUDA stream; only copies from pinned memory are asynchronous."""

    def __init__(self, device: str) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._buffer = torch.empty(0, dtype=torch.float16)
        self._sent = torch.cuda.Event()  # nothing recorded yet: synchronising returns at once

    def send(self, batch: Float16) -> Callable[[], torch.Tensor]:
        """Start to copy a batch. The returned function makes the current stream wait for the copy, not the host."""
        if self._buffer.shape != batch.shape:
            self._buffer = torch.empty(batch.shape, dtype=torch.float16, pin_memory=True)
        self._sent.synchronize()  # the copy of the batch before may still read the buffer
        self._buffer.copy_(torch.from_numpy(batch))
        with torch.cuda.stream(self._stream):
            tokens = self._buffer.to(self._device, non_blocking=True)
            self._sent = sent = torch.cuda.Event()
            sent.record(self._stream)

        def receive() -> torch.Tensor:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(sent)
            tokens.record_stream(current)  # so that its memory is not reused before this stream has read it
            return tokens

        return receive
