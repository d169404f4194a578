"""Pixels to a GPU and tokens back, beside the forward pass: reused pinned buffers, copies on streams of their own.

Only copies from and to pinned memory run beside the GPU's work; to pin memory takes longer than to fill it, so each
buffer is made once. A copy on the stream that computes would delay the next batch: 50 MB of tokens take 2 ms.
On a CPU nothing is copied to the device, and tokens are rounded straight into their buffer.
"""

import queue
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

_ON_THE_WAY = 3  # batches of pixels: one that is computed with, one that is copied, one that is filled


@dataclass(frozen=True)
class HostChunk:
    """The tokens of one chunk in the host's memory; whole once `wait` has returned."""

    tokens: list[torch.Tensor]  # per block (images, tokens_per_image, width) float16
    largest: list[torch.Tensor]  # per block (images,) float32: largest magnitude before rounding to float16
    copied: "torch.cuda.Event | None"  # recorded behind the last copy from the GPU

    def wait(self) -> None:
        """Wait until every copy into the chunk is done; the waiting thread uses no core."""
        if self.copied is not None:
            self.copied.synchronize()


class PixelSender:
    """Sends batches of pixels to one device. Memory on a GPU's host: three pinned batches."""

    def __init__(self, device: torch.device, *, batch_size: int, size: int) -> None:
        self._device, self._n_sent = device, 0
        if device.type != "cpu":
            shape = (batch_size, size, size, 3)
            self._stream = torch.cuda.Stream(device)
            self._buffers = [torch.empty(shape, dtype=torch.uint8, pin_memory=True) for _ in range(_ON_THE_WAY)]
            # nothing recorded yet: to wait for one returns at once
            self._sent = [torch.cuda.Event(blocking=True) for _ in range(_ON_THE_WAY)]

    def send(self, pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
        """(B, size, size, 3) uint8, on the device for the stream that is current; `pixels` may be changed afterwards.

        On a CPU they are the same memory: do not change them before they were used.
        """
        if self._device.type == "cpu":
            return torch.from_numpy(pixels)
        turn = self._n_sent % _ON_THE_WAY
        self._n_sent += 1
        buffer, sent = self._buffers[turn][: len(pixels)], self._sent[turn]
        sent.synchronize()  # an earlier copy may still read the buffer; this also keeps the host near the GPU
        buffer.copy_(torch.from_numpy(pixels))
        with torch.cuda.stream(self._stream):
            there = buffer.to(self._device, non_blocking=True)
            sent.record(self._stream)
        current = torch.cuda.current_stream(self._device)
        current.wait_event(sent)
        there.record_stream(current)  # so that its memory is not reused before this stream has read it
        return there


class ChunkBuffers:
    """A fixed number of chunks of tokens in the host's memory, pinned for a GPU; filled, saved, and used again."""

    def __init__(self, device: torch.device, *, n_chunks: int, n_blocks: int, shape: tuple[int, int, int]) -> None:
        """`shape`: images of the largest chunk, tokens per image, width."""
        is_pinned = device.type != "cpu"
        self._device = device
        self._stream = torch.cuda.Stream(device) if is_pinned else None
        self._free: queue.SimpleQueue[HostChunk] = queue.SimpleQueue()
        for _ in range(n_chunks):
            tokens = [torch.empty(shape, dtype=torch.float16, pin_memory=is_pinned) for _ in range(n_blocks)]
            largest = [torch.empty(shape[0], pin_memory=is_pinned) for _ in range(n_blocks)]
            self._free.put(HostChunk(tokens, largest, torch.cuda.Event(blocking=True) if is_pinned else None))

    def take(self) -> HostChunk:
        """A chunk that nobody uses; waits for one to be given back."""
        return self._free.get()

    def give_back(self, chunk: HostChunk) -> None:
        """The chunk is saved: it may be filled again. From any thread."""
        self._free.put(chunk)

    def fill(self, chunk: HostChunk, where: slice, full: list[torch.Tensor]) -> None:
        """Round the tokens of one batch (per block (B, T, width), any float type) into the images `where`.

        On a GPU the copies are only begun; `HostChunk.wait` waits for them.
        """
        if self._stream is None:
            for own, tokens in enumerate(full):
                chunk.tokens[own][where].copy_(tokens)
                chunk.largest[own][where].copy_(_magnitude(tokens))
            return
        made = [(tokens.to(torch.float16), _magnitude(tokens)) for tokens in full]
        computed = torch.cuda.Event()
        computed.record(torch.cuda.current_stream(self._device))
        self._stream.wait_event(computed)
        with torch.cuda.stream(self._stream):
            for own, (rounded, magnitude) in enumerate(made):
                chunk.tokens[own][where].copy_(rounded, non_blocking=True)
                chunk.largest[own][where].copy_(magnitude, non_blocking=True)
                for source in (rounded, magnitude):
                    source.record_stream(self._stream)  # its memory is reused only after the copy
            assert chunk.copied is not None
            chunk.copied.record(self._stream)  # the one of the last batch counts


def _magnitude(tokens: torch.Tensor) -> torch.Tensor:
    """(B,) float32: the largest magnitude among the tokens of each image; NaN if one of them is."""
    return torch.linalg.vector_norm(tokens.float(), torch.inf, dim=(1, 2))
