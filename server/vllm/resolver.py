"""vLLM asks here for every model name that it does not know yet.

Names that mean no adapter below the root are left to vLLM and its other resolvers. What is wrong with
the rest is raised as vLLM's own errors, which become a 400, 404, 500 or 503 with the words.
"""

import asyncio
import logging
import os
from http import HTTPStatus

import vllm.envs as envs
from vllm.exceptions import (
    GracefulHTTPError,
    VLLMError,
    VLLMNotFoundError,
    VLLMServerError,
    VLLMValidationError,
)
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from server.errors import FathomError
from server.vllm.adapter_root import AdapterRoot
from server.vllm.base import Base
from server.vllm.cut_cache import CutCache
from server.vllm.cutter import Cutter
from server.vllm.live_names import LiveNames, asking_models
from server.vllm.model_name import parse
from server.vllm.settings import ResolverSettings

log = logging.getLogger("vllm.fathom")


class DepthResolver(LoRAResolver):
    """See `LoRAResolver`. One event loop."""

    def __init__(self, settings: ResolverSettings) -> None:
        if not envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
            log.warning(
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING is not set: vLLM will not ask for adapters and depths"
            )
        self._root = AdapterRoot(settings.adapter_root)
        cache = CutCache(settings.cache_dir, settings.max_cache_bytes)
        self._cutter = Cutter(self._root, cache, settings.default_depth)
        self._live = LiveNames(self._cutter)
        self._bases: dict[str, Base] = {}

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter that the name means now, cut at its depth."""
        models = asking_models()
        base = self._bases.setdefault(base_model_name, Base(base_model_name))
        try:
            asked = await asyncio.to_thread(parse, lora_name, self._root.is_adapter)
            if asked is None:
                return None
            answer = await asyncio.to_thread(self._cutter.answer, asked, base)
        except FathomError as error:
            log.warning("%r is not served: %s", lora_name, error)
            raise _as_vllms(error, lora_name) from error
        except OSError as error:
            log.error("%r is not served: %s", lora_name, error)
            raise VLLMServerError(f"{lora_name}: {os.strerror(error.errno or 0)}") from error
        log.info(
            "%r is adapter %r at depth %d of %d",
            lora_name,
            asked.adapter,
            answer.depth,
            answer.num_layers,
        )
        return self._live.add(lora_name, asked, base, answer, models)


def _as_vllms(error: FathomError, lora_name: str) -> VLLMError:
    message = f"{lora_name}: {error}"
    if error.status == HTTPStatus.NOT_FOUND:
        return VLLMNotFoundError(message)
    if error.status == HTTPStatus.BAD_REQUEST:
        return VLLMValidationError(message, parameter="model")
    if error.status == HTTPStatus.SERVICE_UNAVAILABLE:
        return GracefulHTTPError(message, HTTPStatus.SERVICE_UNAVAILABLE)
    return VLLMServerError(message)
