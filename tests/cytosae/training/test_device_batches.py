"""Batches on their way to the device: in order, one ahead, never written over before they have left."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cytosae.training import device_prefetch, on_device
from cytosae.training.device_prefetch import one_ahead

Float16 = npt.NDArray[np.float16]


def numbered(n: int, read: list[int]) -> Iterator[Float16]:
    """Batches of equal numbers; which ones were asked for."""
    for number in range(n):
        read.append(number)
        yield np.full((3, 2), number, np.float16)


def test_without_a_gpu_a_batch_is_the_memory_it_was_gathered_into() -> None:
    read: list[int] = []
    batches = list(numbered(2, read))
    found = on_device(iter(batches), "cpu")
    assert [np.shares_memory(tensor.numpy(), batch) for tensor, batch in zip(found, batches, strict=True)] == [True] * 2
    assert not any(thread.name.startswith("to device") for thread in threading.enumerate())


def test_one_is_sent_ahead_in_a_thread_and_taken_in_here() -> None:
    """Not more than one: a pinned buffer holds one."""
    read: list[int] = []
    here = threading.get_ident()

    def send(batch: Float16) -> Callable[[], torch.Tensor]:
        assert threading.get_ident() != here

        def take_in() -> torch.Tensor:
            assert threading.get_ident() == here
            return torch.from_numpy(batch)

        return take_in

    found = one_ahead(numbered(5, read), send)
    for number in range(5):
        assert next(found)[0, 0] == number
        deadline = time.monotonic() + 5
        while len(read) < min(number + 2, 5) and time.monotonic() < deadline:
            time.sleep(0.001)  # while this batch is worked on
        assert read == list(range(min(number + 2, 5)))
    assert next(found, None) is None


@pytest.mark.parametrize("where", ["reading", "sending"])
def test_an_error_comes_when_its_batch_would_and_leaves_no_thread(where: str) -> None:
    def batches() -> Iterator[Float16]:
        yield np.zeros((3, 2), np.float16)
        if where == "reading":
            raise OSError("the cache is gone")
        yield np.ones((3, 2), np.float16)

    def send(batch: Float16) -> Callable[[], torch.Tensor]:
        if batch.any():
            raise OSError("the cache is gone")
        return lambda: torch.from_numpy(batch)

    found = one_ahead(batches(), send)
    assert not next(found).any()
    with pytest.raises(OSError, match="the cache is gone"):
        next(found)
    assert not any(thread.name.startswith("to device") for thread in threading.enumerate())


def test_a_run_that_ends_lets_go_of_the_stream_it_read() -> None:
    """Closed in the middle, as by an interrupt: the thread is done before the stream of batches is closed."""
    read: list[int] = []
    source = numbered(10, read)
    found = one_ahead(source, lambda batch: lambda: torch.from_numpy(batch))
    next(found)
    found.close()  # type: ignore[attr-defined]  # a generator
    assert not any(thread.name.startswith("to device") for thread in threading.enumerate())
    source.close()  # type: ignore[attr-defined]  # would fail if a thread were still in it


class FakeCuda:
    """As much of torch.cuda as a sender uses; a copy that was begun is done when its event is waited for."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        fake = self

        class Event:
            is_recorded = False

            def record(self, stream: Any) -> None:
                self.is_recorded = True

            def synchronize(self) -> None:
                if self.is_recorded:
                    fake.finish()

        class Stream:
            def __init__(self, device: str) -> None:
                pass

            def __enter__(self) -> None:
                pass

            def __exit__(self, *error: object) -> None:
                pass

            def wait_event(self, event: Event) -> None:
                assert event.is_recorded
                fake.log.append("wait")
                fake.finish()

        real_empty = torch.empty

        def empty(*shape: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
            if pin_memory:
                fake.log.append("pin")
            return real_empty(*shape, **more)

        def to(tensor: torch.Tensor, device: str, *, non_blocking: bool) -> torch.Tensor:
            assert non_blocking
            there = torch.full_like(tensor, torch.nan)
            fake.pending.append((there, tensor))
            return there

        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "stream", lambda stream: stream)
        patch.setattr(torch.cuda, "current_stream", Stream)
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch.Tensor, "to", to)
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: fake.log.append("record"))

    def finish(self) -> None:
        for there, here in self.pending:
            there.copy_(here)
        self.pending.clear()


def test_the_pinned_buffer_is_not_written_over_before_its_batch_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """All is sent before anything is taken in: each batch must have waited for the one before to leave the buffer."""
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    send = device_prefetch._Sender("cuda").send
    given = [np.full((3, 2), number, np.float16) for number in range(4)] + [np.full((2, 2), 9, np.float16)]
    taken_in = [take_in() for take_in in [send(batch) for batch in given]]
    monkeypatch.undo()
    for found, batch in zip(taken_in, given, strict=True):
        assert np.array_equal(found.numpy(), batch)
    assert cuda.log == ["pin"] * 2 + ["wait", "record"] * 5  # one buffer as long as batches are of one size


@pytest.mark.parametrize(
    ("gib", "precision", "wanted"),
    [(80, "fp32", 16_448), (80, "bf16", 16_448), (24, "bf16", 8_224), (24, "fp32", 5_483), (8, "fp32", 4_112)],
)
def test_a_batch_is_one_micro_batch_where_a_sixteenth_of_the_gpu_holds_it(
    gib: int, precision: str, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all memory, whatever else is on the card; else parts of equal size. On fake CUDA tensors."""
    from types import SimpleNamespace

    from torch._subclasses.fake_tensor import FakeTensorMode

    from cytosae.sae import SparseAutoencoder
    from cytosae.training import losses

    properties = SimpleNamespace(total_memory=gib << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with FakeTensorMode(), torch.device("cuda"):
        model = SparseAutoencoder(768, 49_152)
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        assert losses._micro_batch(16_448, model, dtype) == wanted
