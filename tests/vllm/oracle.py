"""PEFT's greedy tokens with an adapter's LoRA set to zero from a layer on: what every answer must equal.

Nothing of `boundary` takes part: the whole adapter is loaded and its tensors are zeroed by their names.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from tests.parity.adapters import expected_peft_warnings

TIE = 1e-4
"""Nats between two tokens that float noise may swap."""


class Oracle:
    """Of one base model, in float32."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._models: dict[tuple[str, int], nn.Module] = {}

    def completion(
        self, adapter: Path | None, depth: int, prompt: Sequence[int], length: int
    ) -> list[int]:
        """`length` greedy tokens; without an adapter, the base's."""
        tokens = list(prompt)
        for _ in range(length):
            tokens.append(int(self._scores(adapter, depth, tokens).argmax()))
        return tokens[len(prompt) :]

    def agrees(
        self, adapter: Path | None, depth: int, prompt: Sequence[int], got: Sequence[int]
    ) -> bool:
        """Whether each token is the greedy one after those before it, or ties with it."""
        tokens = [*prompt, *got]
        for place in range(len(prompt), len(tokens)):
            scores = self._scores(adapter, depth, tokens[:place]).log_softmax(-1)
            if float(scores.max() - scores[tokens[place]]) > TIE:
                return False
        return True

    @torch.inference_mode()
    def _scores(self, adapter: Path | None, depth: int, tokens: Sequence[int]) -> torch.Tensor:
        logits: torch.Tensor = self._model(adapter, depth)(torch.tensor([list(tokens)])).logits
        return logits[0, -1]

    def _model(self, adapter: Path | None, depth: int) -> nn.Module:
        # By content: tests replace adapters where they lie.
        content = (
            "" if adapter is None else str((adapter / "adapter_model.safetensors").read_bytes())
        )
        key = str(hash(content)), depth
        if key not in self._models:
            model: nn.Module = AutoModelForCausalLM.from_pretrained(self._base, dtype="float32")
            if adapter is not None:
                with expected_peft_warnings():
                    model = PeftModel.from_pretrained(model, str(adapter))
                for name, parameter in model.named_parameters():
                    layer = re.search(r"\.layers\.(\d+)\.", name)
                    if "lora_B" in name and layer and int(layer[1]) >= depth:
                        parameter.data.zero_()
            self._models[key] = model.eval()
        return self._models[key]
