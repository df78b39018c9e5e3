"""The page's files as they are sent: types, compressed copies, and one digest that names them all.

Every file but the page itself lives below that digest, so that browsers may keep it for good, and a
page never runs modules of two versions. Nothing is built: what lies in `assets/` is what is sent.
"""

import gzip
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

FOLDER = Path(__file__).parent / "assets"
PAGE = "index.html"

# Said here and not guessed: what a machine's own table of types holds differs between machines, and
# a module of a wrong type does not run.
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
MODULES = (".js", ".mjs")


@dataclass(frozen=True, slots=True)
class Asset:
    """One file in memory."""

    media_type: str
    content: bytes
    compressed: bytes
    """The same in gzip."""
    etag: str

    @classmethod
    def of(cls, name: str, content: bytes) -> "Asset":
        """The file `name` with this content."""
        return cls(
            media_type=MEDIA_TYPES[PurePosixPath(name).suffix],
            content=content,
            compressed=gzip.compress(content, mtime=0),
            etag=f'"{hashlib.sha256(content).hexdigest()[:32]}"',
        )


@dataclass(frozen=True, slots=True)
class Assets:
    """The page, and what it loads from below `console/DIGEST/`."""

    digest: str
    page: Asset
    files: dict[str, Asset]


@cache
def load_assets() -> Assets:
    """Read all files once a process. Raises KeyError for one of a kind that is not served."""
    contents = {
        path.relative_to(FOLDER).as_posix(): path.read_bytes()
        for path in sorted(FOLDER.rglob("*"))
        if path.is_file()
    }
    page = contents.pop(PAGE).decode()
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(f"{name} {len(content)}\n".encode() + content)
    version = digest.hexdigest()[:16]
    preloads = "\n".join(
        f'<link rel="modulepreload" href="console/{version}/{name}">'
        for name in contents
        if name.endswith(MODULES)
    )
    # Without them a browser would find the modules import by import, one round trip each.
    page = page.replace("<!-- modules -->", preloads).replace("DIGEST", version)
    return Assets(
        digest=version,
        page=Asset.of(PAGE, page.encode()),
        files={name: Asset.of(name, content) for name, content in contents.items()},
    )
