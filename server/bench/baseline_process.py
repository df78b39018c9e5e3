"""The baselines in a process of their own, so that each side has its threads to itself.

OpenMP's threads spin at a barrier while a process has no more of them than cores, and sleep where it has
more: an engine and a baseline with a pool each in one process would both be slower than either is alone
(a step of 22 ms took 30, see `engine/brief_thread`). Only one of the processes works at a time.
"""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from torch import Tensor

from server.bench import baseline
from server.bench.baseline import CacheKind, StaticModel
from server.bench.load import LoadResult
from server.bench.mix import Choice
from server.bench.workload import WorkItem
from server.config import Settings
from server.logs import configure_logs

_models: dict[str, StaticModel] = {}
"""In the process of the baselines: those that it has loaded."""


class RemoteBaseline:
    """A `StaticModel` of the other process, and whole runs of it."""

    def __init__(self, name: str, pool: ProcessPoolExecutor) -> None:
        self.name = name
        self._pool = pool

    def complete(self, batch: Sequence[WorkItem]) -> list[list[int]]:
        """See `StaticModel.complete`."""
        return self._pool.submit(_complete, self.name, batch).result()

    def log_probabilities(self, item: WorkItem, completion: Sequence[int]) -> Tensor:
        """See `StaticModel.log_probabilities`."""
        return self._pool.submit(_log_probabilities, self.name, item, completion).result()

    def compute_in(self, dtype: str) -> None:
        """See `StaticModel.compute_in`."""
        self._pool.submit(_compute_in, self.name, dtype).result()

    def run_batches(
        self, items: Sequence[WorkItem], batch_size: int, *, is_open: bool
    ) -> LoadResult:
        """See `baseline.run_batches`; timed over there."""
        return self._pool.submit(_run_batches, self.name, items, batch_size, is_open).result()


@contextmanager
def baseline_process(
    names: Sequence[str], settings: Settings, choices: Sequence[Choice], cache: CacheKind
) -> Iterator[dict[str, RemoteBaseline]]:
    """The named baselines, loaded; none starts no process. Raises what loading raises."""
    if not names:
        yield {}
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        pool.submit(_load, names, settings, choices, cache).result()
        yield {name: RemoteBaseline(name, pool) for name in names}


def _load(
    names: Sequence[str], settings: Settings, choices: Sequence[Choice], cache: CacheKind
) -> None:
    configure_logs("warning")
    made = baseline.load_baselines(names, settings, choices, cache)
    _models.update({model.name: model for model in made})


def _complete(name: str, batch: Sequence[WorkItem]) -> list[list[int]]:
    return _models[name].complete(batch)


def _log_probabilities(name: str, item: WorkItem, completion: Sequence[int]) -> Tensor:
    return _models[name].log_probabilities(item, completion)


def _compute_in(name: str, dtype: str) -> None:
    _models[name].compute_in(dtype)


def _run_batches(
    name: str, items: Sequence[WorkItem], batch_size: int, is_open: bool
) -> LoadResult:
    return baseline.run_batches(_models[name], items, batch_size, is_open=is_open)
