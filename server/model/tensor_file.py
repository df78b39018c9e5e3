"""One safetensors file, read without trusting it: the header first, then one tensor at a time.

`safetensors`' own reader maps the file into memory, so that overwriting it in place changes served
weights, and truncating it kills the process with SIGBUS. Here the bytes are copied out instead,
after the header was bounded and checked by the format's rules: length of the header, one JSON
object, unique names, offsets in order without holes or overlaps, and exactly the file's size.
Called by `checkpoint`; knows nothing of LoRA.
"""

import io
import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from reprlib import Repr
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from server import confined
from server.errors import AdapterError

MAX_HEADER_BYTES = 8 << 20  # a LoRA on every Linear of 100 layers needs 0.2 MB
MAX_TENSORS = 1 << 16  # the same of 100 layers with 64 experts each is 40,000
MAX_NAME_CHARS = 512

_repr = Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 120

FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """What the header says of one tensor: `begin` and `end` are offsets into the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A checked safetensors file, open for reading; use it with `with`.

    Raises `AdapterError`, on opening if the file is missing, not a regular file, or its header is
    not sound or has a dtype other than F32, F16, BF16; in `read` if the file has shrunk since or
    the tensor is not finite. The message names the file, and the tensor where one is at fault.
    """

    entries: dict[str, TensorEntry]

    def __init__(self, path: Path, root: Path | None = None) -> None:
        self.name = path.name
        self._file, size = open_regular(path, root)
        try:
            self.entries = self._read_header(size)
        except OSError as error:
            self._file.close()
            raise AdapterError(f"{self.name}: cannot be read: {error.strerror}") from error
        except AdapterError:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def read(self, name: str) -> Tensor:
        """Copy tensor `name` out: the entry's shape and dtype, CPU, every value finite."""
        entry = self.entries[name]
        buffer = bytearray(entry.end - entry.begin)
        try:
            self._file.seek(entry.begin)
            num_read = self._file.readinto(buffer)
        except OSError as error:
            raise AdapterError(f"tensor {name!r} cannot be read: {error.strerror}") from error
        if num_read != len(buffer):
            raise AdapterError(f"tensor {name!r} is cut off: the file shrank while it was read")
        tensor = torch.frombuffer(buffer, dtype=entry.dtype).view(entry.shape)
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"tensor {name!r} holds NaN or Inf")
        return tensor

    def _read_header(self, size: int) -> dict[str, TensorEntry]:
        if size < 8:
            raise AdapterError(f"{self.name}: {size} bytes is too short for a safetensors file")
        num_bytes = int.from_bytes(self._file.read(8), "little")
        if num_bytes > MAX_HEADER_BYTES:
            raise AdapterError(
                f"{self.name}: header of {num_bytes} bytes is over the limit of {MAX_HEADER_BYTES}"
            )
        if 8 + num_bytes > size:
            raise AdapterError(
                f"{self.name}: header of {num_bytes} bytes does not fit in {size} bytes: "
                "the file is truncated or no safetensors file"
            )
        text = self._file.read(num_bytes)
        if not text.startswith(b"{"):
            raise AdapterError(f"{self.name}: header does not start with '{{'")
        num_tensors = text.count(b'"data_offsets"')  # before it takes seconds to parse them
        if num_tensors > MAX_TENSORS:
            raise AdapterError(
                f"{self.name}: header of {num_tensors} tensors is over the limit of {MAX_TENSORS}"
            )
        header = parse_object(text, f"{self.name}: header")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise AdapterError(f"{self.name}: header's __metadata__ is not a map of strings")
        start = 8 + num_bytes
        entries = {name: _entry(name, fields, start) for name, fields in header.items()}
        end = start
        for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
            if entry.begin != end:
                raise AdapterError(f"tensor {name!r}: data_offsets leave a hole or overlap")
            end = entry.end
            if end > size:
                raise AdapterError(
                    f"tensor {name!r} ends at byte {end} of a file of {size}: it is truncated"
                )
        if end != size:
            raise AdapterError(f"{self.name}: {size - end} bytes after the last tensor")
        return entries


def open_regular(path: Path, root: Path | None = None) -> tuple[io.BufferedReader, int]:
    """Open a regular file (or a link to one) and tell its size; never block on a pipe or device.

    With a `root`, nothing that lies outside of it is opened, whatever links say.
    """
    if root is not None:
        try:
            return confined.open_file(root, path)
        except FileNotFoundError as error:
            raise AdapterError(f"{path.name} is missing") from error
        except confined.PathRefused as error:
            raise AdapterError(f"{path.name} {error}") from error
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise AdapterError(f"{path.name} is missing") from error
    except OSError as error:
        raise AdapterError(f"{path.name} cannot be opened: {error.strerror}") from error
    except ValueError as error:  # a NUL in the path
        raise AdapterError(f"{path.name} cannot be opened: {error}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise AdapterError(f"{path.name} is not a regular file")
    return os.fdopen(descriptor, "rb"), status.st_size


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """Parse one JSON object, `what` naming it in errors; strict about UTF-8 and repeated keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for key, value in pairs:
            if key in fields:
                raise ValueError(f"the key {shown(key)} is repeated")
            fields[key] = value
        return fields

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique)
        json.dumps(value, ensure_ascii=False).encode()  # lone surrogates pass as escapes only
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise AdapterError(f"{what} is not valid UTF-8: {error.reason}") from error
    except RecursionError as error:
        raise AdapterError(f"{what} is nested too deeply") from error
    except ValueError as error:
        raise AdapterError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{what} is not a JSON object")
    return value


def shown(value: object) -> str:
    """Represent `value` for a message, cut short: it may be a megabyte of somebody's file."""
    return _repr.repr(value)


def _entry(name: str, fields: object, start: int) -> TensorEntry:
    if len(name) > MAX_NAME_CHARS:
        raise AdapterError(f"tensor name {shown(name)} is over {MAX_NAME_CHARS} characters")
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise AdapterError(f"tensor {name!r}: header entry is not dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in FLOAT_DTYPES:
        raise AdapterError(
            f"tensor {name!r}: dtype {shown(dtype)} is not one of {', '.join(FLOAT_DTYPES)}"
        )
    if not _are_counts(shape) or len(shape) > 8:
        raise AdapterError(f"tensor {name!r}: shape is not a short list of sizes")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise AdapterError(f"tensor {name!r}: data_offsets is not a pair of offsets")
    begin, end = offsets
    num_bytes = math.prod(shape) * FLOAT_DTYPES[dtype].itemsize
    if end - begin != num_bytes:
        raise AdapterError(
            f"tensor {name!r}: {end - begin} bytes in data_offsets, but its shape and dtype "
            f"need {num_bytes}"
        )
    if num_bytes == 0:
        raise AdapterError(f"tensor {name!r} is empty: shape {shape}")
    return TensorEntry(FLOAT_DTYPES[dtype], tuple(shape), start + begin, start + end)


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)
