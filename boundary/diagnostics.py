"""Two views of an adapter, layer by layer, that explain a curve and never decide a depth alone.

`logit_lens` asks at which layer the ground truth becomes likely, with the adapter and without it;
`lora_output_norms` how much each layer's LoRA puts out (the measure of LoRA-drop, arXiv 2402.07721).
Both run one forward pass a sample.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn

from boundary.decoder import Decoder
from boundary.depth import num_decoder_layers
from boundary.forks import ForkPlan
from boundary.mask import lora_modules
from boundary.rows import LoraRows, PeftLoraRows
from boundary.score import LOG_LIKELIHOOD, Sample, completion_positions, token_ids


@dataclass(frozen=True, slots=True)
class LogitLens:
    """Mean probability of the completion's tokens if each layer were the last one."""

    base: NDArray[np.float64]
    """`[num_samples, num_layers]`, without LoRA anywhere."""
    full: NDArray[np.float64]
    """The same with the whole adapter, whose LoRA of the output head applies after every layer."""


@torch.inference_mode()
def logit_lens(
    model: PeftModel, samples: Sequence[Sample], *, rows: LoraRows | None = None
) -> LogitLens:
    """Apply final norm and output head to each layer's hidden states.

    Raises ValueError for an empty prompt or completion and for models that cannot be swept.
    """
    rows = rows or PeftLoraRows(model)
    decoder = Decoder(model, rows)
    num_layers = decoder.num_layers
    plan = ForkPlan.of([(False,) * num_layers, (True,) * num_layers])
    probabilities = np.empty((2, len(samples), num_layers))
    for index, sample in enumerate(samples):
        positions = _positions(index, sample)
        hidden_states: list[Tensor] = []

        def keep(
            _: int, output: Tensor, kept: list[Tensor] = hidden_states, where: list[int] = positions
        ) -> None:
            kept.append(output[:, where])

        following = torch.tensor(list(sample.completion_token_ids), device=decoder.device)
        with rows:
            decoder.run(torch.tensor([token_ids(sample)], device=decoder.device), None, plan, keep)
            for layer_idx, output in enumerate(hidden_states):
                logits = decoder.logits(output.flatten(0, 1), len(positions))
                logits = logits.view(2, len(positions), -1)
                log_probabilities = LOG_LIKELIHOOD.values(logits, following, logits)
                means = log_probabilities.double().exp().mean(dim=1)[list(plan.leaves)]
                probabilities[:, index, layer_idx] = means.cpu()
    return LogitLens(base=probabilities[0], full=probabilities[1])


@torch.inference_mode()
def lora_output_norms(model: PeftModel, samples: Sequence[Sample]) -> NDArray[np.float64]:
    """`[num_samples, num_layers]`: the norm of what a layer's LoRA modules add, of a typical token.

    The root of the mean over tokens of the squared norms, summed over the layer's modules, with the
    whole adapter on. LoRA of the embedding counts as the first layer's, of the head as the last's.
    """
    squares = np.zeros((len(samples), num_decoder_layers(model)))
    for index, sample in enumerate(samples):
        num_tokens = len(token_ids(sample))
        with ExitStack() as stack:
            for _, module, layer_idx in lora_modules(model):
                assert isinstance(module, nn.Module)  # LoraLayer is a mixin
                hook = _squared_norm_hook(squares[index], layer_idx, num_tokens)
                stack.callback(module.register_forward_hook(hook).remove)
            model(input_ids=torch.tensor([token_ids(sample)], device=model.device), use_cache=False)
    return np.sqrt(squares)


def _squared_norm_hook(
    squares: NDArray[np.float64], layer_idx: int, num_tokens: int
) -> Callable[[Any, tuple[Any, ...], Tensor], None]:
    def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        added = output - module.get_base_layer()(*args)
        squares[layer_idx] += added.double().square().sum().item() / num_tokens

    return hook


def _positions(index: int, sample: Sample) -> list[int]:
    if not sample.prompt_token_ids or not sample.completion_token_ids:
        raise ValueError(f"sample {index} has an empty prompt or completion")
    return list(completion_positions(sample))
