"""Disks that a test fills and frees: a small one of its own, or the size that a process's files may have.

The first needs the right to mount. The second works for anybody, on files of one process; an
administrator's quota looks like it.
"""

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

SIZE = "4m"


class Disk(Protocol):
    """A directory whose room a test takes and gives back."""

    path: Path

    def fill(self, pid: int) -> None: ...
    def free(self, pid: int) -> None: ...


class Mounted:
    """A tmpfs of `SIZE`, full by a file beside the others."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self, pid: int) -> None:
        descriptor = os.open(self.path / "ballast", os.O_WRONLY | os.O_CREAT)
        try:
            for size in (1 << 16, 1 << 12, 1):
                self._write(descriptor, size)
        finally:
            os.close(descriptor)

    def free(self, pid: int) -> None:
        (self.path / "ballast").unlink()

    @staticmethod
    def _write(descriptor: int, size: int) -> None:
        while True:
            try:
                os.write(descriptor, bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                return


class Limited:
    """A directory in which no file of the process may grow beyond what the largest has."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self, pid: int) -> None:
        largest = max(file.stat().st_size for file in self.path.iterdir())
        self._limit(pid, largest)

    def free(self, pid: int) -> None:
        self._limit(pid, resource.RLIM_INFINITY)

    @staticmethod
    def _limit(pid: int, size: int) -> None:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def can_mount(path: Path) -> bool:
    """Whether this process may mount anything there."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "fathom-test", str(path)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        return False
    subprocess.run(["umount", str(path)], check=True)
    return True


@contextmanager
def mounted(path: Path) -> Iterator[Mounted]:
    """A disk of its own at an empty directory, taken away at the end."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "fathom-test", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield Mounted(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
