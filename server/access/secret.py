"""A key's text, `fathom-ID-SECRET`, and the hash that is kept in its place.

The secret is 256 random bits. Of it only a salted scrypt hash (RFC 7914) is kept, in the form
`$scrypt$ln=14,r=8,p=1$SALT$HASH`. All hashes have the same cost, and others are refused, so that to
check one takes the same work whichever it is; `DECOY` gives an unknown id that same work.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import re
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

LOG2_N, R, P = 14, 8, 1
"""16 MiB and 45 ms on a slow core. A fifth of what OWASP asks for passwords, which can be guessed; 256
random bits cannot, at any cost."""
SALT_BYTES, HASH_BYTES = 16, 32
ID_BYTES, SECRET_BYTES = 8, 32

_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fathom-scrypt")
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_HEADER = f"$scrypt$ln={LOG2_N},r={R},p={P}$"
_TEXT = re.compile(r"fathom-([0-9a-f]{16})-[A-Za-z0-9_-]{43}")


def make_id() -> str:
    """A new key's id, which is no secret."""
    return secrets.token_hex(ID_BYTES)


def make_text(id: str) -> str:
    """A new key with this id, as its holder keeps it."""
    return f"fathom-{id}-{secrets.token_urlsafe(SECRET_BYTES)}"


def id_of(text: str) -> str | None:
    """The id that a text claims; None where it has not the form of a key."""
    match = _TEXT.fullmatch(text)
    return None if match is None else match[1]


def is_id(id: str) -> bool:
    """Whether a string can be a key's id, before anything is asked for it."""
    return re.fullmatch("[0-9a-f]{16}", id) is not None


def hashed(text: str) -> str:
    """What is kept of a key."""
    salt = secrets.token_bytes(SALT_BYTES)
    return _encoded(salt, _scrypt(text, salt))


def matches(text: str, hash: str) -> bool:
    """Whether a text is what was hashed. The same work whatever the answer; 45 ms without the GIL.

    hash: what `is_hash` is true of.
    """
    salt, expected = _decoded(hash)
    return hmac.compare_digest(_scrypt(text, salt), expected)


def is_hash(hash: str) -> bool:
    """Whether this is a hash of the only kind that is kept."""
    try:
        _decoded(hash)
    except ValueError:
        return False
    return True


async def aside(
    function: Callable[_Arguments, _Result], /, *args: _Arguments.args, **kwargs: _Arguments.kwargs
) -> _Result:
    """Call something that hashes on the one thread that does.

    Two at once would take twice the memory, which malloc does not give back, and a second core from those
    who have a key.
    """
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_thread, partial(function, *args, **kwargs))


def _scrypt(text: str, salt: bytes) -> bytes:
    secret = text.encode("utf-8", "surrogatepass")
    return hashlib.scrypt(secret, salt=salt, n=1 << LOG2_N, r=R, p=P, dklen=HASH_BYTES)


def _encoded(salt: bytes, digest: bytes) -> str:
    return _HEADER + "$".join(base64.b64encode(each).decode() for each in (salt, digest))


def _decoded(hash: str) -> tuple[bytes, bytes]:
    if not hash.startswith(_HEADER):
        raise ValueError("no hash of a key, or one of another cost")
    try:
        parts = hash.removeprefix(_HEADER).split("$")
        salt, digest = (base64.b64decode(part, validate=True) for part in parts)
    except (ValueError, binascii.Error) as error:
        raise ValueError("a hash of a key that is cut or changed") from error
    if (len(salt), len(digest)) != (SALT_BYTES, HASH_BYTES):
        raise ValueError("a hash of a key that is cut or changed")
    return salt, digest


DECOY = _encoded(secrets.token_bytes(SALT_BYTES), secrets.token_bytes(HASH_BYTES))
"""A hash that no text is known to have."""
