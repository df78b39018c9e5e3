"""Log-probabilities of tokens from raw logits: of the one that was drawn, and of a whole prompt.

Ties go to the lowest token id, here as in the sampler that shares `ranked`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.engine.request import TokenLogprobs
from server.errors import GenerationError

MAX_LOGPROB_ELEMENTS = 1 << 24
"""Prompt log-probabilities are made in chunks of at most this many float32 logits (64 MiB)."""


def prompt_logprobs(
    logits: Tensor, following: Sequence[int] | Tensor, num_top: int
) -> list[TokenLogprobs]:
    """How likely each prompt token was, after those before it.

    logits: [num_tokens, vocab_size], any float dtype. following: for each position the id of the
    token after it. Raises GenerationError where a position's logits are not finite.
    """
    num_tokens, vocab_size = logits.shape
    if num_tokens == 0:
        return []
    token_ids = torch.as_tensor(following, dtype=torch.int64, device=logits.device)
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    size = max(1, MAX_LOGPROB_ELEMENTS // vocab_size)
    reports = [
        make_report(logits[i : i + size].float(), token_ids[i : i + size], num_top, wide)
        for i in range(0, num_tokens, size)
    ]
    table = torch.cat((token_ids.unsqueeze(-1).to(wide), torch.cat(reports)), dim=1).cpu().numpy()
    if np.isnan(table).any():
        position = int(np.isnan(table).any(axis=1).argmax())
        raise GenerationError(f"the model's logits after prompt token {position} are not finite")
    return [read_report(int(row[0]), row[1:], num_top) for row in table]


def ranked(logits: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    """The largest logits in order, equal ones by lowest id, and their ids.

    Neither `topk` nor `sort` fixes the order of equal values, and float16 logits have many. So
    both are put into one int64: the float's bits, made to compare as integers, above the id.
    logits: [num_rows, vocab_size] float32. Returns two of [num_rows, num_candidates].
    """
    vocab_size = logits.shape[1]
    # Adding 0 makes -0.0 the +0.0 that it equals.
    bits = (logits + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    backwards = torch.arange(vocab_size - 1, -1, -1, device=logits.device)
    keys = (ordered << 32) | backwards
    if num_candidates < vocab_size:
        keys = keys.topk(num_candidates, dim=-1).values
    else:
        keys = keys.sort(dim=-1, descending=True).values
    ids = vocab_size - 1 - (keys & 0xFFFFFFFF)
    return logits.gather(1, ids), ids


def make_report(logits: Tensor, token_ids: Tensor, num_top: int, wide: torch.dtype) -> Tensor:
    """`[logprob, rank, top ids..., top logprobs...]` a row, [num_rows, 2 + 2 * num_top].

    logits: [num_rows, vocab_size] float32. token_ids: [num_rows] int64.
    """
    logprobs = logits.log_softmax(dim=-1)
    chosen = token_ids.unsqueeze(-1)
    rank = (logits > logits.gather(1, chosen)).sum(dim=-1, keepdim=True) + 1
    columns = [logprobs.gather(1, chosen).to(wide), rank.to(wide)]
    if num_top:
        _, ids = ranked(logits, min(num_top, logits.shape[1]))
        columns += [ids.to(wide), logprobs.gather(1, ids).to(wide)]
    return torch.cat(columns, dim=1)


def read_report(token_id: int, report: NDArray[np.floating], num_top: int) -> TokenLogprobs:
    """One row of `make_report`, which may hold more alternatives than this row asked for."""
    num_reported = (len(report) - 2) // 2
    ids = report[2 : 2 + num_reported].astype(np.int64).tolist()
    top = tuple(zip(ids, report[2 + num_reported :].tolist(), strict=True))
    return TokenLogprobs(token_id, float(report[0]), int(report[1]), top[:num_top])
