"""Batches on their way to the device: to a GPU while it works on the batch before, so that no step waits for a copy."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

Float16 = npt.NDArray[np.float16]


def on_device(batches: Iterator[Float16], device: str) -> Iterator[torch.Tensor]:
    """The batches as tensors on `device`, in float16. To a GPU one is sent ahead, by a thread of its own.

    Memory on a GPU: two batches there, one in pinned memory here.
    """
    if not device.startswith("cuda"):
        return map(torch.from_numpy, batches)
    return one_ahead(batches, _Sender(device).send)


def one_ahead(
    batches: Iterator[Float16], send: Callable[[Float16], Callable[[], torch.Tensor]]
) -> Iterator[torch.Tensor]:
    """Each batch sent in a thread while the one before is worked on; `send` gives what takes it in, here, when its turn
    comes. Raises what reading or sending it raises, when its turn comes.
    """

    def send_next() -> Callable[[], torch.Tensor] | None:
        batch = next(batches, None)
        return None if batch is None else send(batch)

    with ThreadPoolExecutor(1, thread_name_prefix="to device") as thread:
        coming = thread.submit(send_next)
        while take_in := coming.result():
            coming = thread.submit(send_next)
            yield take_in()


class _Sender:
    """Copies through one pinned buffer on a stream of its own: only from pinned memory is a copy not waited for."""

    def __init__(self, device: str) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._buffer = torch.empty(0, dtype=torch.float16)
        self._sent = torch.cuda.Event()  # nothing was: waiting for it returns at once

    def send(self, batch: Float16) -> Callable[[], torch.Tensor]:
        """Begin to copy a batch; what it gives makes the current stream wait for the copy, not the host."""
        if self._buffer.shape != batch.shape:
            self._buffer = torch.empty(batch.shape, dtype=torch.float16, pin_memory=True)
        self._sent.synchronize()  # the batch before may still be on its way out of the buffer
        self._buffer.copy_(torch.from_numpy(batch))
        with torch.cuda.stream(self._stream):
            tokens = self._buffer.to(self._device, non_blocking=True)
            self._sent = sent = torch.cuda.Event()
            sent.record(self._stream)

        def take_in() -> torch.Tensor:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(sent)
            tokens.record_stream(current)  # its memory is this stream's to use: not given to another batch before
            return tokens

        return take_in
