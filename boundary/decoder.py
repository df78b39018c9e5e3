"""A transformers model taken apart at its decoder layers: a forward pass that forks, and its head.

Forward hooks alone: a pre-hook on each decoder layer grows the batch as a plan says, hidden states
and everything else that has a row a sample. The layers between them are unmodified, and so is what
makes logits of the last layer's hidden states. Knows no scores and no samples.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from boundary.depth import decoder_layers
from boundary.forks import ForkPlan
from boundary.rows import LoraRows, stand_in

Observe = Callable[[int, Tensor], None]
"""Called with a `layer_idx` and the hidden states it put out, `[num_rows, num_tokens, hidden_size]`."""


class Decoder:
    """One causal language model, plain or wrapped by PEFT, in eval mode, inside `with rows`.

    Raises ValueError if the model is in training mode or if its decoder layers cannot be told.
    """

    def __init__(self, model: nn.Module, rows: LoraRows) -> None:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        if not isinstance(base, PreTrainedModel):
            raise TypeError(f"expected a transformers model, got {type(base).__name__}")
        if any(module.training for module in base.modules()):
            raise ValueError("the model is in training mode, where dropout would blur every score")
        self._causal = base
        self._rows = rows
        name, layers = decoder_layers(base)
        self._layers: list[nn.Module] = list(layers)
        # Runs embedding, layers and final norm, and nothing of the output head.
        self._stack = base.get_submodule(name.rpartition(".")[0])
        self._layers_return_tuples = False

    @property
    def num_layers(self) -> int:
        """How many decoder layers there are."""
        return len(self._layers)

    @property
    def vocab_size(self) -> int:
        """The width of the logits."""
        return int(self._causal.config.get_text_config(decoder=True).vocab_size)

    @property
    def device(self) -> torch.device:
        """Where token ids have to be."""
        return self._causal.device

    def run(
        self, token_ids: Tensor, attention_mask: Tensor | None, plan: ForkPlan, observe: Observe
    ) -> None:
        """One forward pass of all groups of `plan`; `observe` sees each layer's output.

        token_ids, attention_mask int64 `[num_samples, num_tokens]`, padded on the right. Row
        `group * num_samples + sample` of layer `layer_idx` belongs to that group of the plan's layer.
        """
        num_samples = len(token_ids)
        first = plan.layers[0]
        # The fork before layer 0 is made in the input, because an embedding may carry LoRA too.
        inputs = {"input_ids": token_ids.repeat(first.num_groups, 1)}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask.repeat(first.num_groups, 1)
        with ExitStack() as stack:
            for layer_idx, layer in enumerate(self._layers):
                fork = _Fork(layer_idx, plan, num_samples, self._rows)
                handle = layer.register_forward_pre_hook(fork, with_kwargs=True)
                stack.callback(handle.remove)
                handle = layer.register_forward_hook(self._observer(layer_idx, plan, observe))
                stack.callback(handle.remove)
            self._reach(0, first.num_lora_groups * num_samples, first.num_groups * num_samples)
            self._stack(**inputs, use_cache=False)

    def logits(self, hidden_states: Tensor, num_lora_rows: int) -> Tensor:
        """`[num_rows, vocab_size]`: what the model makes of these as the last layer's output.

        Final norm, output head, scales and soft caps are the model's own: it runs with layers that
        do nothing but put out the hidden states given. Only after `run`. hidden_states
        `[num_rows, hidden_size]`: the first `num_lora_rows` apply LoRA of the head.
        """
        num_rows = len(hidden_states)
        output = hidden_states.unsqueeze(1)

        def forward(*_: Any, **__: Any) -> Any:
            return (output,) if self._layers_return_tuples else output

        with ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(stand_in(layer, forward))
            self._reach(0, 0, num_rows)
            self._reach(self.num_layers - 1, num_lora_rows, num_rows)
            # One token a row, whose embedding goes nowhere: no position is beyond the model's own.
            placeholder = torch.zeros(num_rows, 1, dtype=torch.int64, device=self.device)
            logits: Tensor = self._causal(input_ids=placeholder, use_cache=False).logits
        return logits[:, 0]

    def _reach(self, layer_idx: int, num_lora_rows: int, num_rows: int) -> None:
        self._rows.reach(layer_idx, num_lora_rows, num_rows)

    def _observer(self, layer_idx: int, plan: ForkPlan, observe: Observe) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            self._layers_return_tuples = isinstance(output, tuple)
            hidden_states = output[0] if self._layers_return_tuples else output
            observe(layer_idx, hidden_states)
            if layer_idx < self.num_layers - 1:
                return None
            # What follows the layers may view the result in the shape of its input.
            num_samples = len(hidden_states) // plan.layers[-1].num_groups
            kept = hidden_states[: plan.layers[0].num_groups * num_samples]
            return (kept, *output[1:]) if self._layers_return_tuples else kept

        return hook


class _Fork:
    """`forward_pre_hook(module, args, kwargs)` of one layer: its rows from those of the layer before."""

    def __init__(self, layer_idx: int, plan: ForkPlan, num_samples: int, rows: LoraRows) -> None:
        self._layer_idx = layer_idx
        self._layer = plan.layers[layer_idx]
        self._before = plan.layers[max(layer_idx - 1, 0)].num_groups
        self._first = plan.layers[0].num_groups
        self._num_samples = num_samples
        self._rows = rows

    def __call__(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        num_samples, num_groups = self._num_samples, self._layer.num_groups
        self._rows.reach(
            self._layer_idx, self._layer.num_lora_groups * num_samples, num_groups * num_samples
        )
        if args:
            hidden_states, *others = args
            return (self._fork(hidden_states), *map(self._grow, others)), self._grow_all(kwargs)
        named = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        hidden_states = self._fork(kwargs["hidden_states"])
        return (), {"hidden_states": hidden_states, **self._grow_all(named)}

    def _fork(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.shape[0] != self._before * self._num_samples:
            raise ValueError(
                f"layer {self._layer_idx} got hidden states {tuple(hidden_states.shape)}, whose "
                f"first dimension is not the {self._before * self._num_samples} rows of the batch"
            )
        if self._layer_idx == 0:
            return hidden_states  # forked in the input
        groups = hidden_states.view(self._before, self._num_samples, *hidden_states.shape[1:])
        sources = torch.tensor(self._layer.sources, device=hidden_states.device)
        return groups.index_select(0, sources).flatten(0, 1)

    def _grow_all(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {name: self._grow(value) for name, value in kwargs.items()}

    def _grow(self, value: Any) -> Any:
        """The same for what every layer is given anew, with the rows of the input."""
        if isinstance(value, Tensor):
            return self._grow_rows(value)
        if isinstance(value, tuple | list):
            return type(value)(self._grow(part) for part in value)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Mapping) and not value:
            return value
        raise ValueError(
            f"layer {self._layer_idx} is given a {type(value).__name__}, of which it is not known "
            "how it grows with the batch"
        )

    def _grow_rows(self, value: Tensor) -> Tensor:
        if value.dim() == 0 or value.shape[0] == 1:
            return value  # the same for every row
        if value.shape[0] != self._first * self._num_samples:
            raise ValueError(
                f"layer {self._layer_idx} is given a tensor {tuple(value.shape)}, whose first "
                f"dimension is neither 1 nor the {self._first * self._num_samples} rows of the input"
            )
        rows = value[: self._num_samples]
        return rows.repeat(self._layer.num_groups, *[1] * (value.dim() - 1))
