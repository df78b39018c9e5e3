"""Many threads share few of malloc's pools; the control gives each its own."""

import platform
import subprocess
import sys

import pytest

CODE = """
import ctypes, sys, threading
from server.malloc import keep_few_arenas
if sys.argv[1] == "few":
    keep_few_arenas()
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_threads_share_few_arenas(tmp_path: object) -> None:
    found = {}
    for how in ("few", "many"):
        words = [sys.executable, "-c", CODE, how, f"{tmp_path}/{how}"]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        found[how] = int(said)
    assert found["few"] <= 2 < found["many"]
