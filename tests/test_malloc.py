"""Threads share few of malloc's pools, what is large comes from the system, and so does what a load leaves;
controls without each."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parity.zoo import BY_NAME, save_model

CODE = """
import ctypes, sys, threading
from server.malloc import keep_little
if sys.argv[1] == "few":
    keep_little()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
together = threading.Barrier(12)
def allocate():
    together.wait()
    libc.malloc(ctypes.c_size_t(1000))
    together.wait()
threads = [threading.Thread(target=allocate) for _ in range(12)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc.fopen.restype = ctypes.c_void_p
stream = ctypes.c_void_p(libc.fopen(sys.argv[2].encode(), b"w"))
libc.malloc_info(0, stream)
libc.fclose(stream)
print(open(sys.argv[2]).read().count("<heap nr="))
"""


MAPPED = """
import ctypes, sys
from contextlib import nullcontext
from server.malloc import keep_little, mapping
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
libc.mallinfo2.restype = Info
def num_mapped(num_bytes):
    before = libc.mallinfo2().hblks
    libc.malloc(ctypes.c_size_t(num_bytes))
    return libc.mallinfo2().hblks - before
"""

LARGE = (
    MAPPED
    + """
if sys.argv[1] == "little":
    keep_little()
libc.free(libc.malloc(ctypes.c_size_t(16 << 20)))
print(num_mapped(16 << 20))
"""
)

LOADING = (
    MAPPED
    + """
keep_little()
with mapping() if sys.argv[1] == "mapping" else nullcontext():
    print(num_mapped(2 << 20))
print(num_mapped(2 << 20), num_mapped(16 << 20))
"""
)

LOADED = (
    MAPPED
    + """
from server.config import Settings
from server.model.prepare import prepare
keep_little()
settings = Settings(model=sys.argv[2], device="cpu", kv_cache_bytes=32 << 20)
before = libc.mallinfo2().hblks
prepared = (prepare if sys.argv[1] == "prepare" else prepare.__wrapped__)(settings)
cache = prepared.runner.cache
assert 1 << 20 <= cache.keys[0].nbytes < 8 << 20, cache.keys[0].nbytes
print(libc.mallinfo2().hblks - before >= 2 * len(cache.keys), num_mapped(2 << 20))
"""
)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_threads_share_few_arenas(tmp_path: object) -> None:
    found = {}
    for how in ("few", "many"):
        words = [sys.executable, "-c", CODE, how, f"{tmp_path}/{how}"]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        found[how] = int(said)
    assert found["few"] <= 2 < found["many"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
@pytest.mark.parametrize(("how", "num_own"), [("little", 1), ("default", 0)])
def test_what_is_large_is_a_mapping_of_its_own_the_second_time_too(how: str, num_own: int) -> None:
    words = [sys.executable, "-c", LARGE, how]
    assert int(subprocess.run(words, capture_output=True, text=True, check=True).stdout) == num_own


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
@pytest.mark.parametrize(("how", "num_own"), [("mapping", 1), ("not", 0)])
def test_what_is_allocated_during_a_load_is_a_mapping_of_its_own(how: str, num_own: int) -> None:
    said = subprocess.run(
        [sys.executable, "-c", LOADING, how], capture_output=True, text=True, check=True
    ).stdout
    during, *after = map(int, said.split())
    assert during == num_own
    assert after == [0, 1]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
@pytest.mark.parametrize("how", ["prepare", "without"])
def test_a_model_is_loaded_into_mappings_of_their_own(how: str, tmp_path: Path) -> None:
    save_model(BY_NAME["llama"], tmp_path)
    said = subprocess.run(
        [sys.executable, "-c", LOADED, how, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.split()[-2:] == [str(how == "prepare"), "0"]  # after the log
