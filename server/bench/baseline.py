"""What is measured beside the engine: transformers' `generate` and PEFT's mixed batch, at their best.

Static batches: a batch starts together and ends when its longest completion does. Given what such
batching allows: a KV cache, SDPA attention, `inference_mode`, the engine's dtype, device and threads,
no padding where lengths are equal and left padding where not, no end-of-sequence checks (as the
engine is told to ignore them), adapters in the model's dtype. Where all requests are there from the
start they are sorted by length, so that a batch waits as little as it can for its longest.

A depth is an adapter of its own here: loaded once more under another name, with the LoRA of the
upper layers deleted, so that PEFT too does no work for layers that a request does not reach.
"""

import copy
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from server.bench.load import LoadResult, Timing
from server.bench.mix import Choice
from server.bench.workload import WorkItem
from server.config import Settings
from server.model.loader import pick_device
from server.model.quantization import quantize
from server.model.targets import Targets

CacheKind = Literal["dynamic", "static"]
_PAD = 0


class StaticModel(Protocol):
    """A model that completes a whole batch at once."""

    name: str

    def complete(self, batch: Sequence[WorkItem]) -> list[list[int]]:
        """Greedy tokens of each row, exactly `output_len` of them."""

    def log_probabilities(self, item: WorkItem, completion: Sequence[int]) -> Tensor:
        """`[len(completion), vocab_size]` float32 on the CPU: what each token was chosen from."""

    def compute_in(self, dtype: str) -> None:
        """From here on, with all other baselines over the same weights. A wider dtype changes no weight."""


class GenerateBaseline:
    """The base model alone, whatever adapters the items ask for."""

    name = "generate"

    def __init__(self, model: PreTrainedModel, cache: CacheKind = "dynamic") -> None:
        self._model: Any = model
        self._cache = "static" if cache == "static" else None
        # `generate` fills what a config leaves open from the model's own, which may sample or stop.
        model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            pad_token_id=_PAD
        )

    @torch.inference_mode()
    def complete(self, batch: Sequence[WorkItem]) -> list[list[int]]:
        """See `StaticModel.complete`."""
        prompt_len = max(len(item.prompt) for item in batch)
        rows = [[_PAD] * (prompt_len - len(item.prompt)) + list(item.prompt) for item in batch]
        mask = [[0] * (prompt_len - len(item.prompt)) + [1] * len(item.prompt) for item in batch]
        output_len = max(item.output_len for item in batch)
        output: Tensor = self._model.generate(
            input_ids=torch.tensor(rows, device=self._model.device),
            attention_mask=torch.tensor(mask, device=self._model.device),
            generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
                do_sample=False,
                use_cache=True,
                cache_implementation=self._cache,
                max_new_tokens=output_len,
                pad_token_id=_PAD,
            ),
            **self._selection(batch),
        )
        completions: list[list[int]] = output[:, prompt_len:].tolist()
        if len(completions[0]) != output_len:
            raise RuntimeError(f"generate ended after {len(completions[0])} of {output_len} tokens")
        return [tokens[: item.output_len] for tokens, item in zip(completions, batch, strict=True)]

    @torch.inference_mode()
    def log_probabilities(self, item: WorkItem, completion: Sequence[int]) -> Tensor:
        """See `StaticModel.log_probabilities`; one forward pass, no cache, no padding."""
        token_ids = [*item.prompt, *completion[:-1]]
        logits: Tensor = self._model(
            input_ids=torch.tensor([token_ids], device=self._model.device),
            use_cache=False,
            **self._selection([item]),
        ).logits
        return logits[0, len(item.prompt) - 1 :].float().log_softmax(-1).cpu()

    def compute_in(self, dtype: str) -> None:
        """See `StaticModel.compute_in`."""
        # Parameters alone: `Module.to` would round the rotary embedding's frequencies on the way back.
        for parameter in self._model.parameters():
            parameter.data = parameter.data.to(getattr(torch, dtype))

    def _selection(self, batch: Sequence[WorkItem]) -> dict[str, Any]:
        return {}


class PeftBaseline(GenerateBaseline):
    """PEFT's mixed batch: each row with an adapter of its own, by `adapter_names`."""

    name = "peft"

    def __init__(
        self,
        model: PreTrainedModel,
        adapters: Mapping[str, Path],
        choices: Iterable[Choice],
        cache: CacheKind = "dynamic",
    ) -> None:
        super().__init__(model, cache)
        self._names = {Choice(): "__base__"}
        for choice in choices:
            if choice.adapter is None or choice.depth == 0:
                self._names[choice] = "__base__"
            elif choice not in self._names:
                self._names[choice] = f"adapter{len(self._names)}"
                self._load(choice, adapters[choice.adapter])
        self._model.eval()

    def _load(self, choice: Choice, path: Path) -> None:
        name = self._names[choice]
        # Otherwise PEFT computes in float32 what belongs to a bfloat16 model, and more slowly.
        kept: dict[str, Any] = {"adapter_name": name, "autocast_adapter_dtype": False}
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # remarks on missing hub files and deprecated properties
            if isinstance(self._model, PeftModel):
                device = str(self._model.device)
                self._model.load_adapter(str(path), torch_device=device, **kept)
            else:
                self._model = PeftModel.from_pretrained(self._model, str(path), **kept)
            if choice.depth is not None:
                cut(self._model, name, choice.depth)

    def _selection(self, batch: Sequence[WorkItem]) -> dict[str, Any]:
        if not isinstance(self._model, PeftModel):
            return {}  # nothing but base rows
        return {"adapter_names": [self._names[item.choice] for item in batch]}


def load_baselines(
    names: Sequence[str], settings: Settings, choices: Sequence[Choice], cache: CacheKind
) -> list[StaticModel]:
    """One copy of the weights for all of them. `settings` name a model, a dtype and a device."""
    assert settings.model is not None
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    base: Any = AutoModelForCausalLM.from_pretrained(
        settings.model,
        revision=settings.revision,
        dtype=getattr(torch, settings.dtype),
        attn_implementation="sdpa",
        use_safetensors=True,
        trust_remote_code=False,
    )
    base.to(pick_device(settings.device)).eval()
    if settings.quantization == "int8":
        quantize(base, Targets(base))
    made: list[StaticModel] = []
    for name in names:
        # PEFT wraps modules in place, so each baseline has modules of its own over shared tensors.
        shared = {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]}
        model = copy.deepcopy(base, shared)
        if name == "generate":
            made.append(GenerateBaseline(model, cache))
        else:
            made.append(PeftBaseline(model, settings.adapter_paths(), choices, cache))
    # Frozen weights, which PEFT leaves behind, cost time even in inference mode: `torch.matmul` copies
    # the output matrix once a row when it meets a slice of the prefill's hidden states, unless the
    # matrix requires a gradient. It took 1.4 s instead of 0.015 s for a vocabulary of 128256 in bfloat16.
    base.requires_grad_(True)
    return made


def cut(model: PeftModel, adapter: str, depth: int) -> None:
    """Delete an adapter's LoRA in decoder layers at or above `depth`, and on the output matrix."""
    num_layers = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or depth >= num_layers:
            continue
        layer_idx = re.search(r"\.(\d+)\.", name)
        is_output = layer_idx is None and "embed" not in name.rsplit(".", 1)[-1]
        if is_output or (layer_idx is not None and int(layer_idx[1]) >= depth):
            module.delete_adapter(adapter)


def run_batches(
    model: StaticModel, items: Sequence[WorkItem], batch_size: int, *, is_open: bool
) -> LoadResult:
    """All items in static batches; in an open loop a batch is whatever has arrived by then."""
    started_s = time.perf_counter()
    timings: list[Timing] = []
    for batch in _in_order(items, batch_size, started_s) if is_open else _sorted(items, batch_size):
        start_s = time.perf_counter() - started_s
        completions = model.complete(batch)
        end_s = time.perf_counter() - started_s
        for item, tokens in zip(batch, completions, strict=True):
            start = item.arrival_s if is_open else start_s
            timings.append(Timing(start, [], end_s, len(item.prompt), len(tokens)))
    return LoadResult(time.perf_counter() - started_s, tuple(timings))


def _sorted(items: Sequence[WorkItem], batch_size: int) -> Iterator[Sequence[WorkItem]]:
    ordered = sorted(items, key=lambda item: (item.output_len, len(item.prompt)))
    for first in range(0, len(ordered), batch_size):
        yield ordered[first : first + batch_size]


def _in_order(
    items: Sequence[WorkItem], batch_size: int, started_s: float
) -> Iterator[Sequence[WorkItem]]:
    waiting = list(items)
    while waiting:
        time.sleep(max(0.0, started_s + waiting[0].arrival_s - time.perf_counter()))
        elapsed_s = time.perf_counter() - started_s
        num_arrived = sum(item.arrival_s <= elapsed_s for item in waiting[:batch_size])
        yield waiting[: max(1, num_arrived)]
        del waiting[: max(1, num_arrived)]
