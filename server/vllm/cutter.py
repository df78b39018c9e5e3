"""An adapter's name and a depth in; the directory that vLLM loads out.

1. Copy the adapter's files out of the root, once for each content (`adapter_root`).
2. Tell the depth: given, calibrated, or full.
3. Cut the copy there, once for each content and depth (`boundary.export`, `cut_cache`).

Knows no vLLM.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from boundary import record
from boundary.checkpoint_files import WEIGHTS_NAME
from boundary.export.cut import ExportError, export
from boundary.export.nothing import export_nothing
from boundary.export.places import lora_modules, needed_depth, where_of
from server.confined import PathRefused
from server.errors import AdapterError, BadRequest, FathomError, NotFound
from server.model.content_digest import content_digest
from server.vllm.adapter_root import AdapterRoot, Signature
from server.vllm.base import Base
from server.vllm.cut_cache import Cut, CutCache
from server.vllm.model_name import Asked

log = logging.getLogger("vllm.fathom")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a name means now. `signature` is older than `cut`: if it still holds, so does the cut."""

    cut: Cut
    depth: int
    num_layers: int
    adapter: str
    signature: Signature


class Cutter:
    """Any thread. What it is asked for is read and written there and then."""

    def __init__(
        self, root: AdapterRoot, cache: CutCache, default_depth: Literal["auto", "full"]
    ) -> None:
        self._root = root
        self._cache = cache
        self._default_depth = default_depth
        self._digests: dict[Path, tuple[Signature, str]] = {}
        """Content of adapters that were copied before."""

    def answer(self, asked: Asked, base: Base) -> Answer:
        """The adapter at its depth, on the disk and held.

        Raises NotFound, BadRequest for the depth, AdapterError, ModelError, Overloaded, OSError.
        """
        name = asked.adapter
        signature = self._root.signature(name)
        if signature is None:
            raise NotFound(f"the adapter {name!r} does not exist")
        adapter = Path(signature[0])
        digest, whole = self._copy(adapter, signature)
        try:
            wanted = self._default_depth if asked.depth is None else asked.depth
            num_layers = base.num_layers
            if wanted == "auto":
                wanted = self._calibrated(name, adapter, whole.path, base)
            depth = num_layers if wanted == "full" else wanted
            if not 0 <= depth <= num_layers:
                raise BadRequest(
                    f"the depth must be from 0 to {num_layers} (the model's layers); got {depth}"
                )
            if depth == num_layers:
                return Answer(whole, depth, num_layers, name, signature)
            cut = self._cut(whole, digest, depth, num_layers)
        except BaseException:
            whole.release()
            raise
        if cut is not whole:
            whole.release()
        return Answer(cut, depth, num_layers, name, signature)

    def signature(self, answer: Answer) -> Signature | None:
        """What the disk says now; another one than the answer's own means that it should be asked anew."""
        return self._root.signature(answer.adapter)

    def _copy(self, adapter: Path, signature: Signature) -> tuple[str, Cut]:
        known = self._digests.get(adapter)
        if known is not None and known[0] == signature:
            found = self._cache.get(_key(known[1], None))
            if found is not None:
                return known[1], found
        with self._cache.room() as room:
            digest = self._root.copy(adapter, room / "cut", self._cache.max_bytes)
            cut = self._cache.put(_key(digest, None), room / "cut")
        self._digests[adapter] = signature, digest
        return digest, cut

    def _calibrated(
        self, name: str, adapter: Path, whole: Path, base: Base
    ) -> int | Literal["full"]:
        """The depth of the record beside the adapter, if it is about this content and base; or full."""
        try:
            content = self._root.record(adapter)
            if content is None:
                return "full"
            found = record.parse(content, record.FILE_NAME)
            reason = found.mismatch(
                base=base.revision, adapter=content_digest(whole), num_layers=base.num_layers
            )
            if reason is None:
                return found.depth
            reason = f"it was {reason}"
        except (record.RecordError, PathRefused, FathomError) as error:
            reason = str(error)
        log.warning(
            "%s of adapter %r is not applied, auto means full: %s", record.FILE_NAME, name, reason
        )
        return "full"

    def _cut(self, whole: Cut, digest: str, depth: int, num_layers: int) -> Cut:
        try:
            needed = _needed_depths(whole.path, num_layers)
        except ValueError as error:
            raise AdapterError(str(error)) from error
        reached = max((d for d in needed if d <= depth), default=0)
        if needed and reached == max(needed):
            return whole
        try:
            if reached == 0:
                smallest = min(needed, default=num_layers)
                return self._cache.make(
                    _key(digest, 0),
                    lambda out: export_nothing(whole.path, out, smallest, num_layers),
                )
            return self._cache.make(
                _key(digest, reached), lambda out: export(whole.path, out, reached, num_layers)
            )
        except ExportError as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from error
            raise AdapterError(str(error)) from error


def _key(digest: str, depth: int | None) -> str:
    return f"{digest[:40]}-{'whole' if depth is None else depth}"


def _needed_depths(adapter: Path, num_layers: int) -> set[int]:
    """Depths at which something more of the adapter is on. Raises ValueError."""
    try:
        with safe_open(adapter / WEIGHTS_NAME, framework="pt") as file:
            names = list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS_NAME} cannot be read: {error}") from error
    return {needed_depth(where_of(name), num_layers) for name in lora_modules(names)}
