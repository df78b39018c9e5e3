"""Who records a step, so that it can run again without Python: a CUDA device does, as a CUDA graph.

Knows streams and what cuBLAS is to do, and nothing of models; `graphs` says what is recorded and when.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from server.model.replay.lowered import Beside, Join


class Recording(Protocol):
    """A step that can run again."""

    def replay(self) -> None:
        """Compute the same from what its inputs hold now, into the same outputs."""


class Recorder(Protocol):
    """Makes recordings. A CUDA device has one; tests have one that needs none."""

    def warm_up(self, step: Callable[[], None]) -> None:
        """Run a step where and as it will be recorded, so that whatever it sets up is there."""

    def settle(self) -> None:
        """Wait until no recording runs, so that one may be let go."""

    def record(self, step: Callable[[], None]) -> Recording:
        """Note what a step does with tensors. Raises what torch does for what cannot be recorded."""

    def fork(self) -> Beside:
        """While a step is warmed up or recorded. See `lowered.Fork`."""


class CudaRecorder:
    """Records CUDA graphs, all in one pool of memory, as no two of them run at once."""

    def __init__(self, device: torch.device) -> None:
        # A product has one block a processor until its last tile is done, so one that begins late delays it
        # all: they go first, and what runs beside them takes the processors that they leave.
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, step: Callable[[], None]) -> None:
        """See `Recorder.warm_up`."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), _cublaslt():
            step()
        current.wait_stream(self._stream)

    def settle(self) -> None:
        """See `Recorder.settle`."""
        torch.cuda.synchronize(self._stream.device)

    def record(self, step: Callable[[], None]) -> Recording:
        """See `Recorder.record`."""
        graph = torch.cuda.CUDAGraph()
        # Another thread may well allocate memory meanwhile, which is no fault of this recording.
        recording = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        with recording, _cublaslt():
            step()
        return graph

    def fork(self) -> Beside:
        """See `Recorder.fork`."""
        ready = self._stream.record_event()

        def beside(launch: Callable[[], None]) -> Join:
            self._side.wait_event(ready)
            with torch.cuda.stream(self._side):
                launch()
            done = self._side.record_event()
            return lambda: self._stream.wait_event(done)

        return beside


@contextmanager
def _cublaslt() -> Iterator[None]:
    """Products by cuBLASLt, which picks other kernels for few rows than cuBLAS does.

    A step of 64 rows of a Llama of 8 billion parameters took 1.5 % less on an H100, with LoRA beside it 3 %.
    """
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)
