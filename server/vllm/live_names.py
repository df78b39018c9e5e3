"""Names that vLLM serves already, kept equal to the disk.

vLLM asks a resolver for a name once and never again, so a retrained adapter or a new calibration would
not be seen. Here the files behind each name are looked at every second. When they have changed, the new
cut is loaded the way vLLM loads one, and only then takes the name over: requests that run finish with
the old one, and one that vLLM cannot load changes nothing.

To vLLM's workers two adapters of one name are the same, and a step that has both may lose one, which ends
the engine. So whatever takes a name over is `NAME/v2`, `NAME/v3` and so on to them, and to vLLM's metrics;
clients see the name that they ask for.
"""

import asyncio
import inspect
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm.lora.request import LoRARequest

from server.errors import FathomError, NotFound
from server.vllm.adapter_root import Signature
from server.vllm.base import Base
from server.vllm.cutter import Answer, Cutter
from server.vllm.model_name import Asked

REFRESH_S = 1.0
HOLD_S = 3600.0
"""How long a cut outlives its name: no request that still uses it takes longer."""
_NEEDED = (
    "engine_client",
    "lora_id_counter",
    "lora_requests",
    "lora_resolver_lock",
    "model_name",
    "show_available_models",
)

log = logging.getLogger("vllm.fathom")


@dataclass(slots=True)
class _Name:
    """`request` is what vLLM holds under the name, and `seen` what the disk said when last looked at."""

    name: str
    request: LoRARequest
    asked: Asked
    base: Base
    answer: Answer
    models: Any
    seen: Signature | None


class LiveNames:
    """One event loop; the disk is read on other threads."""

    def __init__(self, cutter: Cutter) -> None:
        self._cutter = cutter
        self._names: dict[str, _Name] = {}
        self._num_versions: Counter[str] = Counter()
        self._asked_names: dict[str, str] = {}
        """Of later versions: vLLM's name -> the one that is asked for."""
        self._shown: object | None = None
        self._task: asyncio.Task[None] | None = None

    def add(
        self, lora_name: str, asked: Asked, base: Base, answer: Answer, models: object | None
    ) -> LoRARequest:
        """What vLLM is to hold under the name, which is followed from now on if vLLM lets us.

        Its cut is held in any case.
        """
        before = self._names.get(lora_name)
        if before is not None and before.answer.cut.path == answer.cut.path:
            answer.cut.release()  # one that vLLM cannot load is asked for again and again
            answer = replace(answer, cut=before.answer.cut)
        elif before is not None:
            _retire(before)
        # vLLM replaces the number by one of its own.
        request = self._request(lora_name, 1, answer)
        self._names[lora_name] = _Name(
            lora_name, request, asked, base, answer, models, answer.signature
        )
        if models is None:
            log.warning("this vLLM is not known: unload %r to have it read anew", lora_name)
            return request
        if self._shown is not models:
            _show_asked_names(models, self._asked_names)
            self._shown = models
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._follow())
        return request

    def _request(self, lora_name: str, number: int, answer: Answer) -> LoRARequest:
        self._num_versions[lora_name] += 1
        version = self._num_versions[lora_name]
        path = str(answer.cut.path)
        if version == 1:
            return LoRARequest(lora_name, number, path)
        versioned = f"{lora_name}/v{version}"  # no name of an adapter below the root holds a slash
        self._asked_names[versioned] = lora_name
        return LoRARequest(versioned, number, path)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                await self._look()
            except Exception:  # whatever it is, the next look is another
                log.exception("adapters that changed on the disk were not all seen")

    async def _look(self) -> None:
        followed = [name for name in self._names.values() if name.models is not None]
        signatures = await asyncio.to_thread(
            lambda: [self._cutter.signature(name.answer) for name in followed]
        )
        for name, signature in zip(followed, signatures, strict=True):
            if signature != name.seen:
                await self._refresh(name, signature)

    async def _refresh(self, name: _Name, signature: Signature | None) -> None:
        lora_name = name.name
        async with name.models.lora_resolver_lock[lora_name]:
            if name.models.lora_requests.get(lora_name) is not name.request:
                if self._names.get(lora_name) is name:  # it was unloaded, or never loaded
                    del self._names[lora_name]
                    _retire(name)
                return
            name.seen = signature
            try:
                answer = await asyncio.to_thread(self._cutter.answer, name.asked, name.base)
            except NotFound:
                log.warning("%r is gone from the disk and is not served any more", lora_name)
                del name.models.lora_requests[lora_name], self._names[lora_name]
                _retire(name)
                return
            except (FathomError, OSError) as error:
                log.error("%r changed on the disk and stays as it was: %s", lora_name, error)
                return
            name.seen = answer.signature
            if answer.cut.path == name.answer.cut.path:
                answer.cut.release()
                name.answer = replace(answer, cut=name.answer.cut)
                return
            number = name.models.lora_id_counter.inc(1)
            request = self._request(lora_name, number, answer)
            try:
                await name.models.engine_client.add_lora(request)
            except Exception as error:  # noqa: BLE001 - as vLLM does: it raises what its worker raised
                log.error("%r changed on the disk and stays as it was: %s", lora_name, error)
                answer.cut.release()
                return
            name.models.lora_requests[lora_name] = request
            _retire(name)
            name.request, name.answer = request, answer
            log.info("%r changed on the disk and is at depth %d now", lora_name, answer.depth)


def asking_models() -> object | None:
    """vLLM's own table of names, which is what awaits the resolver; None in a vLLM that has another.

    A resolver is not given it. Must be called before anything is awaited.
    """
    frame = inspect.currentframe()
    caller = frame and frame.f_back and frame.f_back.f_back
    models: object | None = caller.f_locals.get("self") if caller else None
    return models if all(hasattr(models, name) for name in _NEEDED) else None


def _show_asked_names(models: Any, asked_names: Mapping[str, str]) -> None:
    """Let vLLM's answers and its list of models say names as they are asked for."""
    show, tell = models.show_available_models, models.model_name

    async def show_available_models() -> Any:
        found = await show()
        for card in found.data:
            card.id = asked_names.get(card.id, card.id)
        return found

    def model_name(lora_request: LoRARequest | None = None) -> str:
        name: str = tell(lora_request)
        return asked_names.get(name, name)

    models.show_available_models, models.model_name = show_available_models, model_name


def _retire(name: _Name) -> None:
    asyncio.get_running_loop().call_later(HOLD_S, name.answer.cut.release)
