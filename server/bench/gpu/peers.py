"""The same streams through PEFT's mixed batch and through transformers' continuous batching.

Both are measured as the engine is: tokens a second while every stream decodes, prompts left out.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.utils import logging as transformers_logging

from server.bench.baseline import StaticModel
from server.bench.workload import WorkItem

_NO_TOKEN = -1
_SPARE_BLOCKS = 64
_PAGE_SIZE = next(
    name
    for name in ("page_size", "block_size")  # as older versions of transformers call it
    if name in signature(ContinuousBatchingConfig).parameters
)


def static_rate(model: StaticModel, items: Sequence[WorkItem], num_steps: int) -> float:
    """Tokens a second of a static batch: of a completion the time that one token does not take."""
    seconds = []
    for output_len in (1, num_steps + 1):
        batch = [replace(item, output_len=output_len) for item in items]
        started_s = time.perf_counter()
        model.complete(batch)  # its token ids are on the host: there is nothing to wait for
        seconds.append(time.perf_counter() - started_s)
    return len(items) * num_steps / (seconds[1] - seconds[0])


class ContinuousBatching:
    """transformers' own engine over a base model, with the attention it likes best here."""

    def __init__(self, model: PreTrainedModel, page_size: int) -> None:
        self._model: Any = model
        self._page_size = page_size

    @property
    def attention(self) -> str:
        """What it chose; it may choose when it first runs."""
        return str(self._model.config._attn_implementation)

    @classmethod
    def load(cls, path: str, dtype: str, device: str, page_size: int = 256) -> "ContinuousBatching":
        """The model at `path`, beside the engine's own copy."""
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        model: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
        )
        return cls(model.to(device).eval(), page_size)

    def rate(self, items: Sequence[WorkItem], num_steps: int) -> float:
        """Tokens a second between the last stream's first token and the first stream's last.

        It captures its CUDA graphs before it takes the first request. Raises RuntimeError for a
        request that failed.
        """
        longest = max(len(item.prompt) for item in items) + num_steps
        num_pages = len(items) * -(-longest // self._page_size) + _SPARE_BLOCKS
        config: dict[str, Any] = {"num_blocks": num_pages, _PAGE_SIZE: self._page_size}
        results = self._model.generate_batch(
            [list(item.prompt) for item in items],
            generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
                do_sample=False, max_new_tokens=num_steps, eos_token_id=_NO_TOKEN, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(**config),
            record_timestamps=True,
        )
        times = [result.timestamps for result in results.values()]
        failed = [result.error for result in results.values() if result.error is not None]
        if failed or len(times) != len(items) or any(len(each) != num_steps for each in times):
            raise RuntimeError(f"continuous batching gave {len(times)} of {len(items)}: {failed}")
        first_s, last_s = max(each[0] for each in times), min(each[-1] for each in times)
        num_tokens = sum(first_s < moment <= last_s for each in times for moment in each)
        if num_tokens == 0:
            raise RuntimeError("its streams never ran at once: raise --steps")
        return float(num_tokens / (last_s - first_s))
