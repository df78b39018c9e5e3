"""Broken and hostile adapters and paths, by the doors through which they come: each with its reason.

Checkpoints are `tests.model.hostile`'s, which spoil a good one. Here are those that only a server
can be given: paths that lead out of its root, files that are none, names that are no names.
"""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.model import hostile

OUTSIDE = "outside"
"""A good adapter that lies beside the root, which nobody may reach."""


class Given(NamedTuple):
    """What a client says, and how it is answered."""

    name: str
    path: str
    status: int
    words: tuple[str, ...]


Make = Callable[[Path], str]
"""Lays out what a case needs below the root, where `good` lies, and returns the path to ask for."""


class PathCase(NamedTuple):
    make: Make
    status: int
    words: tuple[str, ...]


def copied(edit: Callable[[Path], object]) -> Make:
    """A copy of the good adapter in which something was changed."""

    def make(root: Path) -> str:
        path = Path(shutil.copytree(root / "good", root / f"copy-{len(list(root.iterdir()))}"))
        edit(path)
        return path.name

    return make


def linked(target: str) -> Make:
    """A link below the root to what is relative to it."""

    def make(root: Path) -> str:
        link = root / f"link-{len(list(root.iterdir()))}"
        link.symlink_to(target)
        return link.name

    return make


def file_linked(name: str, target: str) -> Make:
    """An adapter of which one file is a link."""

    def edit(path: Path) -> None:
        (path / name).unlink()
        (path / name).symlink_to(target)

    return copied(edit)


def _socket_at(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


def said(path: str) -> Make:
    return lambda _: path


CONFIG, WEIGHTS = hostile.CONFIG, hostile.WEIGHTS
REFUSED, GONE = 400, 404
PATHS: dict[str, PathCase] = {
    "up": PathCase(said(f"../{OUTSIDE}"), REFUSED, ("'..'",)),
    "up and down": PathCase(said("good/../good"), REFUSED, ("'..'",)),
    "deep up": PathCase(said(f"good/../../{OUTSIDE}"), REFUSED, ("'..'",)),
    "absolute": PathCase(lambda root: str(root.parent / OUTSIDE), REFUSED, ("leads out",)),
    "absolute and nowhere": PathCase(said("/no/such/place"), REFUSED, ("leads out",)),
    "the whole disk": PathCase(said("/"), REFUSED, ("leads out",)),
    "a neighbour of the root's name": PathCase(
        lambda root: f"{root}-{OUTSIDE}", REFUSED, ("leads out",)
    ),
    "passwd": PathCase(said("/etc/passwd"), REFUSED, ("leads out",)),
    "a device": PathCase(said("/dev/zero"), REFUSED, ("leads out",)),
    "a process": PathCase(said("/proc/self"), REFUSED, ("leads out",)),
    "missing": PathCase(said("missing"), GONE, ("no adapter at",)),
    "missing below a file": PathCase(said(f"good/{CONFIG}/x"), GONE, ("no adapter at",)),
    "a file": PathCase(said(f"good/{CONFIG}"), REFUSED, (CONFIG, "Not a directory")),
    "the root": PathCase(said("."), REFUSED, (CONFIG, "missing")),
    "a null byte": PathCase(said("good\0"), REFUSED, ("path", "pattern")),
    "a line break": PathCase(said("good\n"), REFUSED, ("control character",)),
    "an escape sequence": PathCase(said("\x1b[2Jgood"), REFUSED, ("control character",)),
    "text that runs backwards": PathCase(said("good\u202e"), REFUSED, ("control character",)),
    "a backslash": PathCase(said("..\\outside"), REFUSED, ("backslash",)),
    **{
        what: PathCase(said(place), REFUSED, ("no --adapter-source allows it",))
        for what, place in {
            "a URL": "https://host.example/adapter",
            "the hub": "hf://org/name",
            "an object store": "s3://bucket.example/adapter",
        }.items()
    },
    "a file as a URL": PathCase(said("file:///etc/passwd"), REFUSED, ("without a scheme",)),
    "a hub's name": PathCase(said("someone/adapter"), GONE, ("no adapter at",)),
    "a home": PathCase(said("~/adapter"), GONE, ("no adapter at",)),
    "a variable": PathCase(said("$HOME/adapter"), GONE, ("no adapter at",)),
    "a name of 300 characters": PathCase(said("x" * 300), GONE, ("no adapter at",)),
    "a path of 5000 characters": PathCase(said("x/" * 2500), REFUSED, ("4096",)),
    "nothing": PathCase(said(""), REFUSED, ("1 character",)),
    "a link out": PathCase(linked(f"../{OUTSIDE}"), REFUSED, ("leads out",)),
    "a link to the disk": PathCase(linked("/"), REFUSED, ("leads out",)),
    "a link to itself": PathCase(
        lambda root: void_link(root / "itself", "itself"), GONE, ("no adapter at",)
    ),
    "a link to nothing": PathCase(linked("nothing"), GONE, ("no adapter at",)),
    "a config elsewhere": PathCase(
        file_linked(CONFIG, f"../../{OUTSIDE}/{CONFIG}"), REFUSED, (CONFIG, "leads out")
    ),
    "weights elsewhere": PathCase(
        file_linked(WEIGHTS, f"../../{OUTSIDE}/{WEIGHTS}"), REFUSED, (WEIGHTS, "leads out")
    ),
    "a config that is passwd": PathCase(
        file_linked(CONFIG, "/etc/passwd"), REFUSED, (CONFIG, "leads out")
    ),
    "weights that never end": PathCase(
        file_linked(WEIGHTS, "/dev/zero"), REFUSED, (WEIGHTS, "leads out")
    ),
    "weights that are memory": PathCase(
        file_linked(WEIGHTS, "/proc/self/mem"), REFUSED, (WEIGHTS, "leads out")
    ),
    "weights that are a terminal": PathCase(
        file_linked(WEIGHTS, "/dev/tty"), REFUSED, (WEIGHTS, "leads out")
    ),
    "a config that is a pipe": PathCase(
        copied(hostile.replace_by(CONFIG, os.mkfifo)), REFUSED, (CONFIG, "not a regular file")
    ),
    "weights that are a socket": PathCase(
        copied(hostile.replace_by(WEIGHTS, _socket_at)), REFUSED, (WEIGHTS, "not a regular file")
    ),
    "rank over the server's limit": PathCase(
        copied(
            hostile.both(
                hostile.config(rank_pattern={"0.self_attn.q_proj": 300}),
                hostile.sparse(A0=[300, 16], B0=[16, 300]),
            )
        ),
        REFUSED,
        (hostile.A0, "rank 300", "max_lora_rank is 256"),
    ),
}


def void_link(link: Path, target: str) -> str:
    link.symlink_to(target)
    return link.name


NAMES: dict[str, tuple[str, ...]] = {
    "": ("1 character",),
    ".": ("begin with '.'",),
    "..": ("begin with '.'",),
    ".hidden": ("begin with '.'",),
    "a/b": ("without '/'",),
    f"../{OUTSIDE}": ("without '/'",),
    "a\\b": ("printable",),
    "a\nb": ("printable",),
    "a\0b": ("printable",),
    "a\x1b[2Jb": ("printable",),
    "a\u202eb": ("printable",),
    "a@2": ("'@'",),
    "a:b": ("':'",),
    "x" * 257: ("256",),
}
"""Names that no adapter gets."""
