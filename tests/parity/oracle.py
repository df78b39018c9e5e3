"""What the right answer is, according to transformers and PEFT alone.

The base model with eager attention, the adapter as `PeftModel` loads it, LoRA modules at or above
the depth switched off one by one, and a greedy loop that recomputes everything for every token:
no KV cache, no batch, no chunks. Imports nothing of Fathom.

Depth, as the design defines it: modules of decoder layer `layer_idx` are on if `layer_idx < depth`,
embeddings from depth 1, the output matrix only at full depth.

The base may be torchao's int8 one: every Linear of the decoder layers, as `quantize_` makes it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from tests.parity.adapters import expected_peft_warnings

LAYER_IDX = re.compile(r"\.(?:layers|h)\.(\d+)\.")


Int8 = Literal["before PEFT", "after PEFT"]
"""When the base is quantized. PEFT's own class for torchao's weights takes no `lora_bias`: then after."""


def quantize(model: torch.nn.Module) -> None:
    """torchao's int8 weights in the decoder layers."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(
        model,
        Int8WeightOnlyConfig(set_inductor_config=False),
        filter_fn=lambda module, name: (
            isinstance(module, torch.nn.Linear)
            and LAYER_IDX.search(f".{name}.") is not None
            and ".lora_" not in name
        ),
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """Greedy continuation of one prompt."""

    token_ids: tuple[int, ...]
    logits: torch.Tensor
    """`[num_tokens, vocab_size]` float32: row `i` is what token `i` was chosen from."""


class Oracle:
    """One base model and at most one adapter."""

    def __init__(
        self,
        model: Path,
        adapter: Path | None = None,
        *,
        int8: Int8 | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            model, attn_implementation="eager", dtype=dtype
        ).eval()
        self.num_layers: int = self._model.config.num_hidden_layers
        self._lora_layers: dict[str, LoraLayer] = {}
        if int8 == "before PEFT":
            quantize(self._model)
        if adapter is not None:
            with expected_peft_warnings():
                self._model = PeftModel.from_pretrained(
                    self._model, adapter, autocast_adapter_dtype=False
                ).eval()
            self._lora_layers = {
                name: module
                for name, module in self._model.named_modules()
                if isinstance(module, LoraLayer)
            }
        if int8 == "after PEFT":
            quantize(self._model)

    def _first_depth(self, name: str) -> int:
        """The smallest depth at which this LoRA module takes part."""
        if found := LAYER_IDX.search(name):
            return int(found[1]) + 1
        if name.endswith(("embed_tokens", "wte")):
            return 1
        if name.endswith(("lm_head", "embed_out")):
            return self.num_layers
        raise ValueError(f"the oracle does not know where {name} lies")

    def _set_depth(self, depth: int) -> None:
        # Switching a module off, unlike a scaling of 0, also takes DoRA's magnitudes and the
        # bias of lora_B away and so leaves exactly the base layer's output.
        for name, module in self._lora_layers.items():
            module.enable_adapters(enabled=self._first_depth(name) <= depth)

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], depth: int) -> torch.Tensor:
        """`[num_tokens, vocab_size]` float32 of one forward pass over these tokens."""
        self._set_depth(depth)
        return self._model(torch.tensor([token_ids]), use_cache=False).logits[0].float()

    def greedy(self, prompt: Sequence[int], max_tokens: int, depth: int) -> Answer:
        """Continue `prompt` by exactly `max_tokens` tokens."""
        token_ids = list(prompt)
        rows = []
        for _ in range(max_tokens):
            rows.append(self.logits(token_ids, depth)[-1])
            token_ids.append(int(rows[-1].argmax()))
        return Answer(tuple(token_ids[len(prompt) :]), torch.stack(rows))
