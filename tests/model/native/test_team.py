"""Steps that threads share: every item is done once, and nobody is waited for who holds an open one."""

import ctypes
import threading
from collections.abc import Callable
from ctypes import CFUNCTYPE, byref, c_int, c_int64, c_void_p

import pytest

from server.model.native import library as library_module
from server.model.native.library import Library, load
from server.model.native.structures import Step

NUM_ITEMS = 7
PATIENCE_S = 30.0
"""Far more than any thread needs, and the end of a test in which nobody comes."""


@pytest.fixture
def library() -> Library:
    found = load()
    assert isinstance(found, Library), found
    assert found.has_team
    return found


class Worker:
    """`struct worker`, as a kernel in Python sees it."""

    def __init__(self, library: Library, address: int) -> None:
        self._functions, self._address = library.functions, address
        self._functions.open_item.argtypes = (c_void_p, c_int, c_int64, c_void_p)
        self._functions.open_item.restype = c_int64
        self._functions.may_write.argtypes = (c_void_p,)
        self._functions.await_items.argtypes = (c_void_p, c_int, c_int64)
        self._functions.await_items.restype = None
        shares = c_void_p.from_address(address).value
        assert shares is not None
        self._next, self._num_done = c_int64.from_address(shares), c_int64.from_address(shares + 8)

    def open_item(self) -> int:
        return int(self._functions.open_item(self._address, 0, NUM_ITEMS, byref(c_int64())))

    def may_write(self) -> bool:
        return bool(self._functions.may_write(self._address))

    def take_item(self) -> int:
        self._next.value += 1  # one thread at a time has the GIL, and nobody else takes items here
        return self._next.value - 1

    def item_done(self) -> None:
        self._num_done.value += 1

    def await_items(self) -> None:
        self._functions.await_items(self._address, 0, NUM_ITEMS)


Kernel = Callable[[Worker], None]


def run(library: Library, num_threads: int, *kernels: Kernel) -> None:
    """Each in turn, by so many threads."""
    prototype = CFUNCTYPE(None, c_void_p, c_void_p)
    functions = [
        prototype(lambda _call, worker, kernel=kernel: kernel(Worker(library, worker)))
        for kernel in kernels
    ]
    steps = (Step * len(kernels))(
        *(Step(ctypes.cast(function, c_void_p).value, None) for function in functions)
    )
    library.functions.fathom_run_steps(ctypes.addressof(steps), len(kernels), num_threads, None)


def write_all(written: list[int]) -> Kernel:
    def kernel(worker: Worker) -> None:
        while (item := worker.open_item()) >= 0:
            if worker.may_write():
                written.append(item)
                worker.item_done()

    return kernel


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_every_item_is_written_once(library: Library, num_threads: int) -> None:
    for _ in range(20):
        written: list[int] = []
        run(library, num_threads, write_all(written))
        assert sorted(written) == list(range(NUM_ITEMS))


def test_nobody_waits_for_a_thread_that_holds_an_open_item(library: Library) -> None:
    written: list[int] = []
    dropped: list[int] = []
    is_held, are_written = threading.Event(), threading.Event()

    def kernel(worker: Worker) -> None:
        while (item := worker.open_item()) >= 0:
            if not is_held.is_set():
                is_held.set()
                are_written.wait(PATIENCE_S)  # as if it had lost its core, with another in reserve
            if not worker.may_write():
                dropped.append(item)
                continue
            written.append(item)
            if len(written) == NUM_ITEMS:
                are_written.set()
            worker.item_done()

    then: list[int] = []
    run(library, 2, kernel, write_all(then))
    assert are_written.is_set()
    assert dropped == [0]
    assert sorted(written) == sorted(then) == list(range(NUM_ITEMS))


def test_an_item_that_is_being_written_is_waited_for(library: Library) -> None:
    """As half of it may be there; and so is one of a kernel that changes what it reads."""
    events: list[str] = []
    is_held, waits = threading.Event(), threading.Event()

    def open_kernel(worker: Worker) -> None:
        while worker.open_item() >= 0:
            assert worker.may_write()
            if not is_held.is_set():
                is_held.set()
                waits.wait(0.2)  # ten thousand times what others have patience for
                events.append("written")
            worker.item_done()

    def plain_kernel(worker: Worker) -> None:
        events.append("next step")
        while (item := worker.take_item()) < NUM_ITEMS:
            if item == 0:
                waits.wait(0.2)
                events.append("changed")
            worker.item_done()
        worker.await_items()

    def last(_: Worker) -> None:
        events.append("end")

    run(library, 2, open_kernel, plain_kernel, last)
    assert events[0] == "written"
    assert events.index("changed") < events.index("end")
    assert events.count("next step") == events.count("end") == 2


def test_without_other_threads_the_caller_does_it_all(library: Library) -> None:
    threads = set()

    def kernel(worker: Worker) -> None:
        threads.add(threading.get_ident())
        write_all([])(worker)

    run(library, 3, kernel)
    assert len(threads) == 3
    threads.clear()
    library.functions.fathom_use_team(None)
    try:
        run(library, 3, kernel)
    finally:
        assert library_module._share_team(library.functions)
    assert threads == {threading.get_ident()}
