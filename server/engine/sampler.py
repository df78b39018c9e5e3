"""Logits to token ids and log-probabilities, with each row's own parameters and generator.

Knows no sequences, no scheduler and no model: the engine's step hands over one `RowState` a row of
logits, and keeps it for as long as the sequence lives, through preemption. Only the rows that asked
for a stage pay for it, and no row's result depends on the rows beside it: ties go to the lowest
token id, sums run along one row, and a row draws from its own generator alone.

Stages, in vLLM's order: raw log-probabilities; `min_tokens`; grammar; logit bias; repetition,
presence and frequency penalties; temperature; min-p; top-k; top-p; one draw by inverse CDF.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.engine.logprobs import make_report, ranked, read_report
from server.engine.request import SamplingParams, TokenLogprobs
from server.engine.row_state import Ids, RowState

MAX_CANDIDATES = 1024
"""How many of a row's best tokens are ranked on CPU before its whole vocabulary is: these take
1.5 ms to find among 128k and all of them 10 ms to sort (one core), and few nuclei reach further."""

_SHARES = 64
"""Parts of a vocabulary that a GPU searches side by side."""


def highest_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's largest logit and the first place where it is; NaN where there is one.

    logits: `[num_rows, vocab_size]`. A GPU gives a row to one block of threads, which few rows leave alone
    with all of a vocabulary (31 us of a step on an H200), so there a row is many rows first. On a CPU torch
    compares one number at a time, NumPy a vector (16 rows of 128,000: 490 and 90 us on two cores).
    """
    num_rows, vocab_size = logits.shape
    if logits.device.type == "cpu" and logits.dtype is torch.float32:
        host = logits.numpy()
        host_places = host.argmax(axis=-1)
        return torch.from_numpy(host[np.arange(num_rows), host_places]), torch.from_numpy(
            host_places
        )
    if logits.device.type != "cuda" or vocab_size % _SHARES:
        highest, places = logits.max(dim=-1)
        return highest, places
    return _highest_of_shares(logits.reshape(num_rows, _SHARES, -1))


def _highest_of_shares(shares: Tensor) -> tuple[Tensor, Tensor]:
    """The same of rows in parts, `[num_rows, num_shares, share]`."""
    own_highest, own_places = shares.max(dim=-1)
    highest, share = own_highest.max(dim=-1)
    place = own_places.gather(1, share.unsqueeze(1)).squeeze(1)
    return highest, share * shares.shape[2] + place


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row's outcome. `error`: its logits were not finite, or nothing was left to choose."""

    token_id: int
    logprobs: TokenLogprobs | None
    error: bool


@dataclass(frozen=True, slots=True)
class Launched:
    """Drawn on the device, perhaps not yet on the host: what `Sampler.read` waits for."""

    token_ids: Tensor
    """int64 `[num_rows]`, on the device. Of a row in error any id of the vocabulary."""
    table: NDArray[Any]
    """`[num_rows, 2 + ...]` in the host's memory, where it is once `has_arrived`."""
    num_tops: list[int | None]
    """How many alternatives each row reports; None reports nothing."""
    has_arrived: torch.cuda.Event | None


class Sampler:
    """Draws one token a row. Holds no state of any sequence."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        # MPS has no float64.
        self._wide = torch.float32 if device.type == "mps" else torch.float64
        self._wide_numpy = np.float32 if device.type == "mps" else np.float64
        self._num_candidates = (
            min(MAX_CANDIDATES, vocab_size) if device.type == "cpu" else vocab_size
        )
        self._bits = torch.arange(32, dtype=torch.int32, device=device)

    def sample(
        self,
        logits: Tensor,
        rows: Sequence[RowState],
        masks: Sequence[NDArray[np.int32] | None],
    ) -> list[Sampled]:
        """Choose each row's next token: `launch` and `read` at once."""
        return self.read(self.launch(logits, rows, masks)) if rows else []

    def launch(
        self,
        logits: Tensor,
        rows: Sequence[RowState],
        masks: Sequence[NDArray[np.int32] | None],
    ) -> Launched:
        """Choose each row's next token, without waiting for a CUDA device; the logits are left as they are.

        logits: [num_rows, vocab_size], float32, bfloat16 or float16, on `device`; at least one row.
        masks: for each row None, or int32 [ceil(vocab_size / 32)] with a 1 bit for each token
            allowed, the lowest bit first.
        """
        assert logits.shape == (len(rows), self.vocab_size)
        # The largest logit is NaN, +inf or -inf exactly when the row is unusable.
        best, token_ids = highest_logits(logits)
        changed = [
            i for i, row in enumerate(rows) if not row.is_greedy or _is_edited(row, masks[i])
        ]
        if changed:
            index = self._index(changed)
            chosen, highest = self._choose(
                logits.index_select(0, index).float(),
                [rows[i] for i in changed],
                [masks[i] for i in changed],
            )
            token_ids = token_ids.index_copy(0, index, chosen)
            # A row that was unusable stays so, whatever the stages made of it.
            highest = torch.where(best[index].isfinite(), highest, torch.nan)
            best = best.float().index_copy(0, index, highest)
        num_tops = [row.sampling.logprobs for row in rows]
        reported = [i for i, num_top in enumerate(num_tops) if num_top is not None]
        if self.device.type == "cpu" and not reported:
            # By NumPy, as a torch operator on so few numbers is its code's way into a cold cache.
            host = np.empty((len(rows), 2), self._wide_numpy)
            host[:, 0], host[:, 1] = token_ids.numpy(), best.float().numpy()
            return Launched(token_ids, host, num_tops, None)
        columns = [torch.stack((token_ids.to(self._wide), best.to(self._wide)), dim=1)]
        if reported:
            index = self._index(reported)
            most = max(num_top or 0 for num_top in num_tops)
            report = make_report(logits[index].float(), token_ids[index], most, self._wide)
            padded = report.new_zeros((len(rows), report.shape[1]))
            columns.append(padded.index_copy(0, index, report))

        # The only transfer from the device in a step.
        is_cuda = self.device.type == "cuda"
        table = torch.cat(columns, dim=1).to("cpu", non_blocking=is_cuda)
        has_arrived = None
        if is_cuda:
            has_arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            has_arrived.record()
        return Launched(token_ids, table.numpy(), num_tops, has_arrived)

    def read(self, launched: Launched) -> list[Sampled]:
        """What was drawn, once the host has it."""
        if launched.has_arrived is not None:
            launched.has_arrived.synchronize()
        table = launched.table
        token_ids, highest = table[:, 0].tolist(), table[:, 1].tolist()
        samples = []
        for i, num_top in enumerate(launched.num_tops):
            is_fine = math.isfinite(highest[i])
            token_id = int(token_ids[i]) if is_fine else -1
            logprobs = None
            if num_top is not None and is_fine:
                logprobs = read_report(token_id, table[i, 2:], num_top)
            samples.append(Sampled(token_id, logprobs, error=not is_fine))
        return samples

    def _choose(
        self,
        logits: Tensor,
        rows: list[RowState],
        masks: list[NDArray[np.int32] | None],
    ) -> tuple[Tensor, Tensor]:
        """All stages for the rows that have any: token ids, and each row's largest edited logit.

        logits: [num_rows, vocab_size] float32, overwritten.
        """
        self._edit(logits, rows, masks)
        highest, token_ids = highest_logits(logits)
        drawn = [i for i, row in enumerate(rows) if not row.is_greedy]
        if not drawn:
            return token_ids, highest
        if len(drawn) < len(rows):
            index = self._index(drawn)
            draws = self._draw(logits[index], highest[index], [rows[i] for i in drawn])
            return token_ids.index_copy(0, index, draws), highest
        return self._draw(logits, highest, rows), highest

    def _edit(
        self,
        logits: Tensor,
        rows: list[RowState],
        masks: list[NDArray[np.int32] | None],
    ) -> None:
        """Everything before temperature, in place."""
        ends = [(i, row.end_ids) for i, row in enumerate(rows) if row.must_go_on]
        if ends:
            logits[self._points(ends)] = -torch.inf

        masked = [(i, mask) for i, mask in enumerate(masks) if mask is not None]
        if masked:
            index = self._index([i for i, _ in masked])
            words = self._put(np.stack([mask for _, mask in masked]))
            is_allowed = (words.unsqueeze(-1) >> self._bits).bitwise_and_(1).flatten(1).bool()
            is_allowed = is_allowed[:, : self.vocab_size]
            logits[index] = logits[index].masked_fill_(is_allowed.logical_not_(), -torch.inf)

        biased = [(i, row) for i, row in enumerate(rows) if len(row.bias_ids)]
        if biased:
            points = self._points([(i, row.bias_ids) for i, row in biased])
            logits[points] += self._values([row.bias for _, row in biased])

        repeated = [
            (i, row.seen_ids(), row.sampling.repetition_penalty)
            for i, row in enumerate(rows)
            if row.sampling.repetition_penalty != 1.0
        ]
        if repeated:
            points = self._points([(i, ids) for i, ids, _ in repeated])
            penalty = self._values(
                [np.full(len(ids), value, np.float32) for _, ids, value in repeated]
            )
            values = logits[points]
            logits[points] = torch.where(values > 0, values / penalty, values * penalty)

        penalized = [(i, *row.penalties()) for i, row in enumerate(rows) if row.has_penalty]
        if penalized:
            points = self._points([(i, ids) for i, ids, _ in penalized])
            logits[points] -= self._values([amounts for _, _, amounts in penalized])

    def _draw(self, logits: Tensor, highest: Tensor, rows: list[RowState]) -> Tensor:
        """`token = min {t : cdf[t] > uniform * cdf[-1]}`, so its probability is above 0.

        logits: [num_rows, vocab_size] float32, overwritten. highest: [num_rows], their maxima.
        """
        temperature = np.array([row.sampling.temperature for row in rows], np.float32)
        temperature = np.maximum(temperature, np.finfo(np.float32).tiny)
        # Probabilities do not change when all logits move by the same amount; with the best at
        # 0, no temperature, however small, makes an infinity of it.
        logits -= highest.unsqueeze(-1)
        logits /= self._put(temperature).unsqueeze(-1)

        floored = [i for i, row in enumerate(rows) if row.sampling.min_p > 0]
        if floored:
            index = self._index(floored)
            floor = np.log(np.array([rows[i].sampling.min_p for i in floored]))
            below = logits[index] < self._values([floor.astype(np.float32)]).unsqueeze(-1)
            logits[index] = logits[index].masked_fill_(below, -torch.inf)

        cut = [
            i
            for i, row in enumerate(rows)
            if row.sampling.top_p < 1.0 or 0 < row.sampling.top_k < self.vocab_size
        ]
        if cut:
            index = self._index(cut)
            params = [rows[i].sampling for i in cut]
            kept, is_short = self._nucleus(logits[index], params, self._num_candidates)
            if self._num_candidates < self.vocab_size and bool(is_short.any()):
                wide = [i for i, is_cut_off in enumerate(is_short.tolist()) if is_cut_off]
                kept[wide] = self._nucleus(
                    logits[index[wide]], [params[i] for i in wide], self.vocab_size
                )[0]
            logits[index] = kept

        cdf = logits.softmax(dim=-1).cumsum(dim=-1, dtype=self._wide)
        uniforms = self._put(np.array([[row.uniform()] for row in rows]).astype(self._wide_numpy))
        total = cdf[:, -1:].contiguous()
        drawn = torch.searchsorted(cdf, uniforms * total, right=True)
        # The product may round up to the total: then the last token that adds to it is meant.
        last = torch.searchsorted(cdf, total)
        return torch.minimum(drawn, last).clamp_(max=self.vocab_size - 1).squeeze(-1)

    def _nucleus(
        self, logits: Tensor, params: list[SamplingParams], num_candidates: int
    ) -> tuple[Tensor, Tensor]:
        """Keep the `top_k` best tokens, and of those the fewest whose probabilities reach `top_p`.

        Tokens rank by logit, then by lowest id; only the first `num_candidates` are looked at.
        Returns the logits with -inf elsewhere, and bool [num_rows]: whether that was too few.
        """
        values, ids = ranked(logits, num_candidates)
        top_k = self._put(np.array([[p.top_k or self.vocab_size] for p in params]))
        top_p = self._put(np.array([[p.top_p] for p in params]).astype(self._wide_numpy))
        has_top_k = top_k < self.vocab_size
        is_kept = torch.arange(num_candidates, device=self.device) < top_k
        probs = logits.softmax(dim=-1).gather(1, ids).to(self._wide) * is_kept
        cdf = probs.cumsum(dim=-1)
        mass = top_p * torch.where(has_top_k, cdf[:, -1:], 1.0)
        # A token stays while those before it fall short; without a top_p nothing is enough.
        mass = torch.where(top_p < 1.0, mass, torch.inf)
        is_kept[:, 1:] &= cdf[:, :-1] < mass
        kept = torch.full_like(logits, -torch.inf).scatter(
            1, ids, values.masked_fill(~is_kept, -torch.inf)
        )
        may_reach_on = is_kept[:, -1:] & (values[:, -1:] > -torch.inf)
        return kept, (may_reach_on | has_top_k & (top_k > num_candidates)).squeeze(-1)

    def _index(self, rows: list[int]) -> Tensor:
        return self._put(np.array(rows, np.int64))

    def _points(self, entries: list[tuple[int, Ids]]) -> tuple[Tensor, Tensor]:
        """Row and token of every logit that a stage touches, for indexing."""
        rows = np.repeat([row for row, _ in entries], [len(ids) for _, ids in entries])
        ids = np.concatenate([ids for _, ids in entries])
        pair = self._put(np.stack((rows, ids)))
        return pair[0], pair[1]

    def _values(self, parts: list[NDArray[np.float32]]) -> Tensor:
        return self._put(np.concatenate(parts))

    def _put(self, values: NDArray[Any]) -> Tensor:
        """On the device, without waiting for it: only from pinned memory is a copy queued like work."""
        tensor = torch.from_numpy(values)
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)


def _is_edited(row: RowState, mask: NDArray[np.int32] | None) -> bool:
    return (
        mask is not None
        or row.must_go_on
        or row.has_penalty
        or len(row.bias_ids) > 0
        or row.sampling.repetition_penalty != 1.0
    )
