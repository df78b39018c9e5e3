"""Advice on memory: taken or not, nothing of what lies there changes."""

import sys

import pytest
import torch

from server.model import huge_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="advice to Linux")

MIB = 1 << 20


def test_what_lies_there_stays() -> None:
    untouched = torch.empty(16 * MIB)
    huge_pages.advise(untouched)
    untouched.copy_(torch.arange(16 * MIB))
    before = untouched.clone()
    assert huge_pages.collapse(32 * MIB) >= untouched.nbytes
    assert torch.equal(untouched, before)


def test_only_large_pieces_are_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    held = torch.ones(16 * MIB)
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(
        huge_pages, "_madvise", lambda start, end, advice: advised.append((start, end))
    )
    num_bytes = huge_pages.collapse(32 * MIB)
    # Each is advised twice: to be in large pages from now on, and to be moved there at once.
    assert sum(end - start for start, end in advised) == 2 * num_bytes > 0
    assert all(end - start >= 32 * MIB for start, end in advised)
    assert any(start <= held.data_ptr() < end for start, end in advised)
    advised.clear()
    assert huge_pages.collapse(1 << 50) == 0
    assert advised == []


def test_only_whole_large_pages_within_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    class Libc:
        def madvise(self, start, length, advice) -> int:  # type: ignore[no-untyped-def]
            calls.append((start.value, length.value))
            return -1

    monkeypatch.setattr(huge_pages.ctypes, "CDLL", lambda name: Libc())
    huge_pages._madvise(2 * MIB + 1, 9 * MIB, 14)
    assert calls == [(4 * MIB, 4 * MIB)]
    huge_pages._madvise(2 * MIB + 1, 5 * MIB, 14)
    assert len(calls) == 1
