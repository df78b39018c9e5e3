"""Threads share few of malloc's pools, and what is large comes from the system; controls without either."""

import platform
import subprocess
import sys

import pytest

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


LARGE = """
import ctypes, sys
from server.malloc import keep_little
if sys.argv[1] == "little":
    keep_little()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
libc.mallinfo2.restype = Info
large = ctypes.c_size_t(16 << 20)
libc.free(libc.malloc(large))
before = libc.mallinfo2().hblks
libc.malloc(large)
print(libc.mallinfo2().hblks - before)
"""


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
