"""Two views of an adapter, layer by layer, that explain a curve and never decide a depth alone.

`logit_lens` asks at which layer the ground truth becomes likely, with the adapter and without it;
`lora_output_norms` how much each layer's LoRA puts out (the measure of LoRA-drop, arXiv 2402.07721).
Both run one forward pass a sample, which is a slice: between slices the model is free.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from boundary.decoder import Decoder
from boundary.forks import ForkPlan
from boundary.progress import Progress, drain
from boundary.rows import LoraRows, rows_of
from boundary.sample import Sample, completion_positions, token_ids
from boundary.score import LOG_LIKELIHOOD
from boundary.sweep import MAX_LOGITS


@dataclass(frozen=True, slots=True)
class LogitLens:
    """Mean probability of the completion's tokens if each layer were the last one."""

    base: NDArray[np.float64]
    """`[num_samples, num_layers]`, without LoRA anywhere."""
    full: NDArray[np.float64]
    """The same with the whole adapter, whose LoRA of the output head applies after every layer."""


def logit_lens(
    model: nn.Module, samples: Sequence[Sample], *, rows: LoraRows | None = None
) -> LogitLens:
    """All slices of `logit_lens_slices` at one go."""
    return drain(logit_lens_slices(model, samples, rows=rows))


def logit_lens_slices(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    rows: LoraRows | None = None,
    max_logits: int = MAX_LOGITS,
) -> Generator[Progress, None, LogitLens]:
    """Apply final norm and output head to each layer's hidden states; one sample a slice.

    Yields as `sweep_slices` does, counting samples, and takes the same `model`, `rows` and
    `max_logits`. Raises ValueError, when it is advanced, for an empty prompt or completion and for
    models that cannot be swept.
    """
    rows = rows_of(model, rows)
    decoder = Decoder(model, rows)
    for index, sample in enumerate(samples):
        if not sample.prompt_token_ids or not sample.completion_token_ids:
            raise ValueError(f"sample {index} has an empty prompt or completion")
    probabilities = np.empty((2, len(samples), decoder.num_layers))
    yield Progress("lens", 0, len(samples))
    for index, sample in enumerate(samples):
        with rows:
            probabilities[:, index] = _lens(decoder, sample, max_logits)
        done = index + 1
        yield Progress("lens", done, len(samples), done * 2 * decoder.num_layers)
    return LogitLens(base=probabilities[0], full=probabilities[1])


@torch.inference_mode()
def _lens(decoder: Decoder, sample: Sample, max_logits: int) -> NDArray[np.float64]:
    """`[2, num_layers]`: mean probability of the completion's tokens, base and full."""
    num_layers = decoder.num_layers
    plan = ForkPlan.of([(False,) * num_layers, (True,) * num_layers])
    positions = list(completion_positions(sample))
    hidden_states: list[Tensor] = []
    decoder.run(
        torch.tensor([token_ids(sample)], device=decoder.device),
        None,
        plan,
        lambda _, output: hidden_states.append(output[:, positions]),
    )
    following = torch.tensor(list(sample.completion_token_ids), device=decoder.device)
    num_at_once = max(1, max_logits // (2 * decoder.vocab_size))
    found = np.empty((2, num_layers))
    for layer_idx, output in enumerate(hidden_states):
        values = []
        for part, next_ids in zip(
            torch.split(output, num_at_once, dim=1),
            torch.split(following, num_at_once),
            strict=True,
        ):
            logits = decoder.logits(part.flatten(0, 1), part.shape[1]).view(2, part.shape[1], -1)
            values.append(LOG_LIKELIHOOD.values(logits, next_ids, logits))
        means = torch.cat(values, dim=1).double().exp().mean(dim=1)[list(plan.leaves)]
        found[:, layer_idx] = means.cpu()
    return found


def depth_of_sharpest_rise(probabilities: NDArray[np.float64], full_depth: int) -> int:
    """The depth that ends with the layer at which a lens curve rises most, at most `full_depth`.

    `1 + argmax over 0 < layer_idx < full_depth of p[layer_idx] - p[layer_idx - 1]`, the lowest of
    equal ones. Reading a probability curve is named in the abstract of arXiv 2503.23360; its exact
    rule is not public to us, and this is our reading of it. The first layer has no layer before it
    to rise from, so depths 0 and 1 are never read off, but depth 1 where it is full.

    probabilities: float64 `[num_layers]`, such as a mean of `LogitLens.full` over samples.
    """
    rises = np.diff(probabilities[:full_depth])
    return 2 + int(rises.argmax()) if len(rises) else full_depth


def lora_output_norms(
    model: nn.Module, samples: Sequence[Sample], *, rows: LoraRows | None = None
) -> NDArray[np.float64]:
    """All slices of `lora_output_norms_slices` at one go."""
    return drain(lora_output_norms_slices(model, samples, rows=rows))


def lora_output_norms_slices(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    rows: LoraRows | None = None,
    max_logits: int = MAX_LOGITS,
) -> Generator[Progress, None, NDArray[np.float64]]:
    """`[num_samples, num_layers]`: the norm of what a layer's LoRA modules add, of a typical token.

    The root of the mean over tokens of the squared norms, summed over the layer's modules, with the
    whole adapter on. LoRA of the embedding counts as the first layer's, of the head as the last's.

    One sample a slice. Yields as `sweep_slices` does, counting samples, and takes the same `model`,
    `rows` and `max_logits`. Raises ValueError, when it is advanced, for an empty prompt and for
    models that cannot be swept.
    """
    rows = rows_of(model, rows)
    decoder = Decoder(model, rows)
    for index, sample in enumerate(samples):
        if not sample.prompt_token_ids:
            raise ValueError(f"sample {index} has an empty prompt")
    norms = np.empty((len(samples), decoder.num_layers))
    yield Progress("norms", 0, len(samples))
    for index, sample in enumerate(samples):
        with rows:
            norms[index] = _norms(decoder, rows, sample, max_logits)
        done = index + 1
        yield Progress("norms", done, len(samples), done * decoder.num_layers)
    return norms


@torch.inference_mode()
def _norms(
    decoder: Decoder, rows: LoraRows, sample: Sample, max_logits: int
) -> NDArray[np.float64]:
    """`[num_layers]`, inside `with rows`."""
    squares = torch.zeros(decoder.num_layers, dtype=torch.float64, device=decoder.device)

    def add(layer_idx: int, added: Tensor) -> None:
        squares[layer_idx] += added.double().square().sum()

    outputs: list[Tensor] = []

    def keep(layer_idx: int, output: Tensor) -> None:
        if layer_idx == decoder.num_layers - 1:
            outputs.append(output[0])

    token_row = torch.tensor([token_ids(sample)], device=decoder.device)
    rows.observe(add)
    try:
        decoder.run(token_row, None, ForkPlan.of([(True,) * decoder.num_layers]), keep)
        for part in torch.split(outputs[0], max(1, max_logits // decoder.vocab_size)):
            decoder.logits(part, len(part))  # for LoRA of the head
    finally:
        rows.observe(None)
    return np.sqrt(squares.cpu().numpy() / token_row.numel())
