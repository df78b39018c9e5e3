"""One of a request's `n` continuations, and the request that they belong to."""

from dataclasses import dataclass, field
from enum import Enum

from server.engine.block_manager import next_key
from server.engine.detokenizer import Detokenizer
from server.engine.grammar import Matcher
from server.engine.logprobs import prompt_logprobs
from server.engine.request import (
    FinishReason,
    Request,
    RequestOutput,
    SequenceDelta,
    TokenLogprobs,
)
from server.engine.row_state import RowState
from server.engine.sampler import Sampled
from server.errors import FathomError, GenerationError
from server.model.adapters import BASE_SLOT
from server.model.runner import Logits


class Status(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Tokens, how many of them are in the KV cache, and where. Survives preemption."""

    def __init__(
        self,
        group: "SequenceGroup",
        index: int,
        root_key: bytes,
        block_size: int,
        row: RowState,
        detokenizer: Detokenizer,
        matcher: Matcher | None,
    ) -> None:
        self.group = group
        self.index = index
        self.row = row
        self.detokenizer = detokenizer
        self.matcher = matcher
        self.status = Status.WAITING
        self.token_ids = list(group.request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed = 0
        """Tokens whose keys and values are in the cache."""
        self.block_table: list[int] = []
        self.num_published = 0
        """Blocks of the table that were offered to the prefix cache."""
        self.slot = BASE_SLOT
        self.was_admitted = False
        self.num_claimed_tokens = 0
        """Tokens for which blocks are set aside while it runs, held or not."""
        self.num_lost_tokens = 0
        """Computed tokens whose blocks it gave back when it was preempted last."""
        self.finish_reason: FinishReason | None = None
        self._block_size = block_size
        self._root_key = root_key
        self._block_keys: list[bytes] = []

    @property
    def request(self) -> Request:
        """The request this continues."""
        return self.group.request

    @property
    def order(self) -> tuple[int, int, int]:
        """Who came first: by priority, then arrival, then index. The last gives its blocks back first."""
        return (self.request.priority, self.group.arrival, self.index)

    @property
    def num_to_compute(self) -> int:
        """Tokens not in the cache yet: 1 while decoding."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_decoding(self) -> bool:
        """True when one token is left to compute and it was generated, not given."""
        return self.num_to_compute == 1 and self.num_output_tokens > 0

    @property
    def wants_prompt_logprobs(self) -> bool:
        """True for the one sequence of a request that reports them, until it has."""
        wanted = self.request.sampling.prompt_logprobs is not None and self.index == 0
        return wanted and self.num_output_tokens == 0

    def block_keys(self, num_blocks: int) -> list[bytes]:
        """Content keys of the first `num_blocks` blocks, all of which are full of tokens."""
        size = self._block_size
        while len(self._block_keys) < num_blocks:
            start = len(self._block_keys) * size
            parent = self._block_keys[-1] if self._block_keys else self._root_key
            self._block_keys.append(next_key(parent, self.token_ids[start : start + size]))
        return self._block_keys[:num_blocks]

    def take(self, sample: Sampled, eos_token_ids: frozenset[int]) -> SequenceDelta:
        """Gain the next token; the delta has a `finish_reason` if that was the last.

        Raises GenerationError for a sample in error, and what grammar and detokenizer raise.
        """
        if sample.error:
            raise GenerationError("the model's logits are not finite, or nothing may follow here")
        token_id, sampling = sample.token_id, self.request.sampling
        self.token_ids.append(token_id)
        self.row.append(token_id)
        if self.matcher is not None:
            self.matcher.advance(token_id)
        text = ""
        finish_reason: FinishReason | None = None
        stop_reason: str | int | None = None
        if token_id in eos_token_ids and not sampling.ignore_eos:
            finish_reason = "stop"
        elif token_id in sampling.stop_token_ids:
            finish_reason, stop_reason = "stop", token_id
        else:
            text, stop_reason = self.detokenizer.append([token_id])
            is_complete = self.matcher is not None and self.matcher.is_finished
            if stop_reason is not None or is_complete:
                finish_reason = "stop"
            elif self.num_output_tokens >= sampling.max_tokens:
                finish_reason = "length"
        if finish_reason is not None:
            text += self.detokenizer.finish()
        return SequenceDelta(
            index=self.index,
            text=text,
            token_ids=(token_id,),
            logprobs=(sample.logprobs,) if sample.logprobs is not None else (),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )

    def score_prompt(self, logits: Logits) -> None:
        """Note the log-probabilities of the prompt tokens that follow the step's positions."""
        scores = self.group.prompt_logprobs
        if self.num_computed == 0:
            scores[:] = [None]  # anew, if a preempted sequence starts over
        first = self.num_computed + 1
        following = self.token_ids[first : first + logits.shape[0]]
        num_top = self.request.sampling.prompt_logprobs or 0
        scores.extend(prompt_logprobs(logits[: len(following)], following, num_top))

    def held_text(self) -> str:
        """What the detokenizer held back, for a sequence that ends before its time."""
        try:
            return self.detokenizer.finish()
        except Exception:  # noqa: BLE001 -- a tokenizer that fails may be why it ends
            return ""


@dataclass(slots=True)
class SequenceGroup:
    """A live request and its sequences."""

    request: Request
    arrival: int
    """Counts requests as the engine took them."""
    sequences: list[Sequence] = field(default_factory=list)
    num_cached_tokens: int = 0
    """Prompt tokens the first sequence found in the prefix cache when it was first admitted."""
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    scheduled_s: float = 0.0
    first_step: int = 0
    """0 until it is scheduled: steps count from 1."""

    @property
    def is_finished(self) -> bool:
        """True when no sequence will gain another token."""
        return all(sequence.status is Status.FINISHED for sequence in self.sequences)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, over all sequences."""
        return sum(sequence.num_output_tokens for sequence in self.sequences)

    def output(
        self, deltas: tuple[SequenceDelta, ...], error: FathomError | None = None, step: int = 0
    ) -> RequestOutput:
        """The message that tells the request's owner of these deltas, which came of a step."""
        is_scored = len(self.prompt_logprobs) == len(self.request.prompt_token_ids)
        scores = tuple(self.prompt_logprobs) if is_scored else None
        if scores is not None:
            self.prompt_logprobs.clear()  # sent once
        return RequestOutput(
            request_id=self.request.id,
            deltas=deltas,
            prompt_logprobs=scores,
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
            scheduled_s=self.scheduled_s,
            first_step=self.first_step,
            step=step,
            finished=self.is_finished,
            error=error,
        )
