"""Every depth's score for every sample: in one forking forward pass, or plainly, one pass a depth.

With LoRA on in the layers below `d`, the hidden states that enter layer `d` are the full adapter's.
So one pass runs the full-LoRA trunk and forks a tail off it before each layer: `L(L+3)/2` layer
evaluations for the depths `0..L` instead of `L(L+1)`. Other masks fork where they first differ.
`sweep_slices` does so in slices between which the model is free, `sweep` at one go; `reference` is
what both must equal. Called by calibration; knows no tokenizer and no selection.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn

from boundary.decoder import Decoder
from boundary.depth import lora_mask, num_decoder_layers
from boundary.forks import ForkPlan
from boundary.mask import Mask, check_masks, depth_masks
from boundary.progress import Progress, drain
from boundary.rows import LoraRows, rows_of
from boundary.sample import Sample, token_ids
from boundary.score import LOG_LIKELIHOOD, Score

Scores = NDArray[np.float64]
"""`[num_samples, num_masks]`; for depths `[num_samples, num_layers + 1]`."""

MAX_TOKENS = 8192
MAX_LOGITS = 1 << 26
"""What a slice may hold at once by default: hidden states of so many tokens, so many logits."""


@torch.no_grad()
def reference(
    model: PeftModel,
    samples: Sequence[Sample],
    *,
    score: Score = LOG_LIKELIHOOD,
    masks: Sequence[Mask] | None = None,
) -> Scores:
    """What `sweep` computes, plainly: one forward pass a sample and mask, with PEFT's switches."""
    num_layers = num_decoder_layers(model)
    masks = _checked(samples, score, masks, num_layers)
    scores = np.empty((len(samples), len(masks)))
    for row, sample in enumerate(samples):
        input_ids = torch.tensor([token_ids(sample)], device=model.device)
        positions = list(score.positions(sample))
        full_logits = torch.empty(0)
        if score.needs_full:
            full_logits = model(input_ids=input_ids, use_cache=False).logits[0, positions]
        next_token_ids = torch.tensor(_next_token_ids(sample, score), device=model.device)
        for column, mask in enumerate(masks):
            with lora_mask(model, mask):
                logits = model(input_ids=input_ids, use_cache=False).logits[:, positions]
            values = score.values(logits, next_token_ids, full_logits)
            scores[row, column] = values.double().mean().item()
    return scores


def sweep(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    score: Score = LOG_LIKELIHOOD,
    masks: Sequence[Mask] | None = None,
    rows: LoraRows | None = None,
    max_tokens: int | Callable[[], int] = MAX_TOKENS,
    max_logits: int = MAX_LOGITS,
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Scores:
    """All slices of `sweep_slices` at one go.

    `on_progress(done, total)` counts scores, samples times masks, after each slice; `should_stop()`
    is asked before each. Raises what `sweep_slices` does, and Stopped if told to stop.
    """
    slices = sweep_slices(
        model, samples, score=score, masks=masks, rows=rows,
        max_tokens=max_tokens, max_logits=max_logits,
    )  # fmt: skip
    if on_progress is None:
        return drain(slices, should_stop=should_stop)
    tell = on_progress
    return drain(
        slices,
        on_progress=lambda progress: tell(progress.done, progress.total),
        should_stop=should_stop,
    )


def sweep_slices(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    score: Score = LOG_LIKELIHOOD,
    masks: Sequence[Mask] | None = None,
    rows: LoraRows | None = None,
    max_tokens: int | Callable[[], int] = MAX_TOKENS,
    max_logits: int = MAX_LOGITS,
    stage: str = "score",
) -> Generator[Progress, None, Scores]:
    """Score every depth, or every mask given, for each sample; one forward pass a slice.

    Yields before the first slice and after each one, counting scores, samples times masks. At every
    yield the model is as it was before the sweep, so that other forward passes may run in between,
    and nothing but scores is held; closing the generator leaves nothing.

    `model` is a PeftModel, or the plain model to which `rows` applies an adapter.

    Samples of similar length run in one slice, padded on the right. Of a slice's hidden states at
    most `max_tokens` tokens are alive in a layer, padding included: rows times the longest sample, of
    which there are `num_masks` rows a sample at the last layer, fewer below it. Where that is too
    much even for one sample, its masks are run in parts, each a range of them, which repeats the
    layers they share; one row of the longest sample (two with a score that compares with full) is
    the least that can be run. A function for `max_tokens` is asked before every slice. Logits are
    made of the positions that count alone, at most `max_logits` numbers at once, or one position of
    every row.

    So memory beyond the weights does not grow with the number of samples. With N the tokens alive, T
    those of the longest sample, both as above, it stays in Llama's layers with LoRA below

        N * itemsize * (12 * hidden_size + 4 * intermediate_size + 2 * T) + 16 * max_logits

    bytes, and 12 * N * num_heads * T more where attention forms its scores (eager). Measured were 30
    to 80 % of it.

    Raises, when it is advanced, ValueError for bad masks, a sample with no position to score, a score
    that is not finite, and models that cannot be swept.
    """
    rows = rows_of(model, rows)
    decoder = Decoder(model, rows)
    masks = _checked(samples, score, masks, decoder.num_layers)
    if max_logits < 1:
        raise ValueError(f"max_logits must be positive: {max_logits}")
    # In a layer without LoRA masks cannot differ: depths that reach no further share their rows.
    effective = [
        tuple(on or layer_idx not in rows.layers for layer_idx, on in enumerate(mask))
        for mask in masks
    ]
    scores = np.empty((len(samples), len(masks)))
    waiting = _Waiting(samples, len(masks), needs_full=score.needs_full)
    progress = Progress(stage, 0, scores.size)
    yield progress
    while progress.done < progress.total:
        num_tokens = max_tokens() if callable(max_tokens) else max_tokens
        if num_tokens < 1:
            raise ValueError(f"max_tokens must be positive: {num_tokens}")
        chunk = waiting.take(num_tokens)
        chunk_samples = [samples[index] for index in chunk.samples]
        chunk_masks = [effective[index] for index in chunk.masks]
        with rows:
            found, num_evaluations = _score_chunk(
                decoder, chunk_samples, chunk_masks, score, max_logits
            )
        _refuse_not_finite(found, chunk, masks)
        scores[np.ix_(chunk.samples, chunk.masks)] = found
        progress = Progress(
            stage,
            progress.done + found.size,
            progress.total,
            progress.num_layer_evaluations + num_evaluations,
        )
        yield progress
    return scores


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Indices of what runs in one forward pass."""

    samples: list[int]
    masks: range


class _Waiting:
    """Samples by length, and of the first one the masks that are left once it had to be split."""

    def __init__(self, samples: Sequence[Sample], num_masks: int, *, needs_full: bool) -> None:
        self._lengths = [len(token_ids(sample)) for sample in samples]
        self._samples = sorted(range(len(samples)), key=lambda index: self._lengths[index])
        self._num_masks = num_masks
        self._num_masks_done = 0
        self._needs_full = needs_full

    def take(self, max_tokens: int) -> _Chunk:
        """As many samples as may run with all masks, or one with as many of its masks as may."""
        num_rows = self._num_masks - self._num_masks_done + self._needs_full
        longest = self._lengths[self._samples[0]]
        if self._num_masks_done or num_rows * longest > max_tokens:
            num_at_once = max(1, max_tokens // longest - self._needs_full)
            start = self._num_masks_done
            end = min(start + num_at_once, self._num_masks)
            self._num_masks_done = end % self._num_masks
            return _Chunk(self._next(1 if end == self._num_masks else 0), range(start, end))
        # Sorted, so the last sample of a chunk is its longest.
        size = 1
        while size < len(self._samples):
            longest = self._lengths[self._samples[size]]
            if (size + 1) * num_rows * longest > max_tokens:
                break
            size += 1
        return _Chunk(self._next(size), range(self._num_masks))

    def _next(self, num_finished: int) -> list[int]:
        """The samples of a chunk: those it finishes, or else the one it does a part of."""
        chunk = self._samples[: num_finished or 1]
        self._samples = self._samples[num_finished:]
        return chunk


@torch.inference_mode()
def _score_chunk(
    decoder: Decoder, samples: list[Sample], masks: list[Mask], score: Score, max_logits: int
) -> tuple[Scores, int]:
    """`[num_samples, num_masks]` of one forward pass, and its layer evaluations."""
    full = (True,) * decoder.num_layers
    plan = ForkPlan.of([*masks, full] if score.needs_full else masks)
    leaf = plan.layers[-1]
    positions = [list(score.positions(sample)) for sample in samples]
    selected: list[Tensor] = []

    def select(layer_idx: int, hidden_states: Tensor) -> None:
        if layer_idx == decoder.num_layers - 1:
            groups = hidden_states.view(leaf.num_groups, len(samples), *hidden_states.shape[1:])
            selected.extend(groups[:, index, chosen] for index, chosen in enumerate(positions))

    decoder.run(*_padded(samples, decoder.device), plan, select)
    hidden_states = torch.cat(selected, dim=1)  # [num_groups, num_positions, hidden_size]
    selected.clear()
    next_token_ids = torch.tensor(
        [token_id for sample in samples for token_id in _next_token_ids(sample, score)],
        device=decoder.device,
    )
    num_at_once = max(1, max_logits // (leaf.num_groups * decoder.vocab_size))
    values = []
    for part, next_ids in zip(
        torch.split(hidden_states, num_at_once, dim=1),
        torch.split(next_token_ids, num_at_once),
        strict=True,
    ):
        num_positions = part.shape[1]
        logits = decoder.logits(part.flatten(0, 1), leaf.num_lora_groups * num_positions)
        logits = logits.view(leaf.num_groups, num_positions, -1)
        # Only where the score compares with full is the last leaf sure to be the full adapter's.
        values.append(score.values(logits, next_ids, logits[plan.leaves[-1]]).double())
    by_sample = torch.split(torch.cat(values, dim=1), [len(chosen) for chosen in positions], dim=1)
    means = torch.stack([sample_values.mean(dim=1) for sample_values in by_sample])
    # A copy, so that no tensor outlives the slice.
    found = np.asarray(means[:, plan.leaves[: len(masks)]].cpu(), dtype=np.float64).copy()
    return found, len(samples) * plan.num_layer_evaluations


def _padded(samples: list[Sample], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Token ids `[num_samples, num_tokens]`, padded on the right, and the mask if there is padding."""
    sequences = [token_ids(sample) for sample in samples]
    longest = max(map(len, sequences))
    padding = [longest - len(sequence) for sequence in sequences]
    padded = [[*ids, *[0] * missing] for ids, missing in zip(sequences, padding, strict=True)]
    token_rows = torch.tensor(padded, device=device)
    if not any(padding):
        return token_rows, None
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
    is_token = torch.arange(longest, device=device) < lengths.unsqueeze(1)
    return token_rows, is_token.long()


def _next_token_ids(sample: Sample, score: Score) -> list[int]:
    following = [*token_ids(sample)[1:], -1]
    return [following[position] for position in score.positions(sample)]


def _checked(
    samples: Sequence[Sample], score: Score, masks: Sequence[Mask] | None, num_layers: int
) -> list[Mask]:
    """The masks, those of all depths by default, if there is something to score."""
    chosen = depth_masks(num_layers) if masks is None else list(masks)
    check_masks(chosen, num_layers)
    if not samples:
        raise ValueError("no samples: there is nothing to score")
    for index, sample in enumerate(samples):
        if not sample.prompt_token_ids:
            raise ValueError(f"sample {index} has no prompt, which the first prediction follows")
        if not score.positions(sample):
            raise ValueError(f"sample {index} has no position to score: its completion is empty")
    return chosen


def _refuse_not_finite(found: Scores, chunk: _Chunk, masks: Sequence[Mask]) -> None:
    for sample, column in np.argwhere(~np.isfinite(found)):
        mask = "".join("01"[on] for on in masks[chunk.masks[column]])
        raise ValueError(
            f"the score of sample {chunk.samples[sample]} is {found[sample, column]} "
            f"with LoRA in layers {mask}"
        )
