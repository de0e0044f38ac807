"""A stand-in for `torch.cuda` whose clock moves only when work says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


class FakeStream:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.log.append("wait")


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.ms = cuda, 0.0

    def replay(self) -> None:
        self.cuda.log.append("replay")
        self.cuda.now += self.ms


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.at = cuda, None

    def record(self) -> None:
        self.at = self.cuda.now

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.cuda.idle, "events are read only when the device is done"
        return end.at - self.at


class FakeCuda:
    """What `CudaClock` asks of `torch.cuda`.

    `work(ms)` is a kernel; within a capture it is recorded, and does not run.
    """

    def __init__(self) -> None:
        self.now, self.idle, self.log, self.graphs = 0.0, True, [], []
        self.capturing: FakeGraph | None = None

    def work(self, ms: float, *, waits: bool = False) -> None:
        if self.capturing is not None:
            if waits:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.capturing.ms += ms
            return
        self.log.append("run")
        self.idle = False
        self.now += ms + 0.5  # what it takes to start it from Python

    def Stream(self) -> FakeStream:
        return FakeStream(self)

    def current_stream(self) -> FakeStream:
        return FakeStream(self)

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.log.append("side stream")
        yield
        self.log.append("main stream")

    def CUDAGraph(self) -> FakeGraph:
        return FakeGraph(self)

    @contextmanager
    def graph(self, graph: FakeGraph) -> Iterator[None]:
        assert self.idle, "a capture begins when nothing runs"
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None

    def Event(self, *, enable_timing: bool) -> FakeEvent:
        assert enable_timing
        return FakeEvent(self)

    def synchronize(self) -> None:
        self.idle = True


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()
