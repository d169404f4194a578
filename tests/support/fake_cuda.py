"""A GPU that is late: as much of torch.cuda as copies use, on CPU tensors.

Copies that do not block are put into the queue of the current stream, and run when somebody waits for an event behind
them, and no sooner: they then read and write what the memory holds at that moment. So a buffer that is reused too
early, or read before it was waited for, gives other numbers. Computation runs at once.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

Job = Callable[[], object]


class FakeCuda:
    """Counts what was done: pinned buffers, copies, `record_stream`.

    computes_late : what the stream that computes waits for is not run before `finish`, for tests that only look at
        what arrives
    """

    def __init__(self, *, computes_late: bool = False) -> None:
        self.computes_late = computes_late
        self.finish: Job = lambda: None
        self.pinned: list[int] = []  # bytes of each pinned buffer
        self.n_copies = 0
        self.n_recorded = 0  # tensors whose memory another stream uses

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Replace what is used of torch.cuda, and the copies of tensors, until `patch` is undone."""
        fake = self
        real_empty, real_to, real_copy = torch.empty, torch.Tensor.to, torch.Tensor.copy_

        class Stream:
            """Jobs in order; one that waits for an event runs what stands before the event in its own stream."""

            def __init__(self, device: Any = None) -> None:
                self.jobs: list[Job] = []
                self.n_done = 0

            def wait_event(self, event: "Event") -> None:
                assert event.stream is not None, "nothing was recorded"
                self.jobs.append(event.synchronize)
                if self is default and not fake.computes_late:  # computation runs at once: it must be there
                    self.run_until(len(self.jobs))

            def run_until(self, stop: int) -> None:
                with lock:
                    while self.n_done < stop:
                        self.n_done += 1
                        self.jobs[self.n_done - 1]()

        class Event:
            def __init__(self, blocking: bool = False) -> None:
                self.stream: Stream | None = None
                self.at = 0

            def record(self, stream: Stream | None = None) -> None:
                self.stream = stream or current()
                self.at = len(self.stream.jobs)

            def synchronize(self) -> None:
                if self.stream is not None:
                    self.stream.run_until(self.at)

        default, lock, of_thread = Stream(), threading.RLock(), threading.local()
        self.finish = lambda: default.run_until(len(default.jobs))

        def current() -> Stream:
            return getattr(of_thread, "stream", default)

        @contextmanager
        def on_stream(stream: Stream) -> Iterator[None]:
            before, of_thread.stream = current(), stream
            try:
                yield
            finally:
                of_thread.stream = before

        def empty(*shape: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
            made: torch.Tensor = real_empty(*shape, **more)
            if pin_memory:
                fake.pinned.append(made.numel() * made.element_size())
            return made

        def copy_now(target: torch.Tensor, source: torch.Tensor) -> None:
            with torch.inference_mode():  # whoever waits
                real_copy(target, source)

        def begin(target: torch.Tensor, source: torch.Tensor) -> None:
            assert current() is not default, "a copy on the stream that computes"
            assert torch.is_inference_mode_enabled() or not target.is_inference(), "torch refuses to write to it here"
            fake.n_copies += 1
            current().jobs.append(lambda: copy_now(target, source))

        def copy_(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            if not non_blocking:
                return real_copy(target, source)
            begin(target, source)
            return target

        def to(tensor: torch.Tensor, *where: Any, non_blocking: bool = False, **more: Any) -> torch.Tensor:
            if not where or not str(where[0]).startswith("cuda"):
                return real_to(tensor, *where, **more)
            assert non_blocking
            there = torch.full_like(tensor, 77)
            begin(there, tensor)
            return there

        def record_stream(tensor: torch.Tensor, stream: Stream) -> None:
            fake.n_recorded += 1

        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "stream", on_stream)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: current())
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU that is late")
        patch.setattr(torch, "autocast", lambda *settings, **more: nullcontext())
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch.Tensor, "to", to)
        patch.setattr(torch.Tensor, "copy_", copy_)
        patch.setattr(torch.Tensor, "record_stream", record_stream)
        patch.setattr(torch.nn.Module, "to", lambda module, *where, **more: module)
