"""What sampling remembers of one sequence between its tokens, through preemption too."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from server.engine.request import SamplingParams
from server.errors import BadRequest

Ids = NDArray[np.int64]


class RowState:
    """Its generator, and the tokens that penalties count."""

    def __init__(
        self,
        sampling: SamplingParams,
        index: int,
        prompt_token_ids: Sequence[int],
        eos_token_ids: frozenset[int],
        vocab_size: int,
    ) -> None:
        """`index` is the sequence's place among the request's `n`: each has a stream of its own."""
        bias = dict(sampling.logit_bias)
        for token_id in bias:
            if not 0 <= token_id < vocab_size:
                raise BadRequest(
                    f"logit_bias names token {token_id}; ids go from 0 to {vocab_size - 1}",
                    param="logit_bias",
                )
        self.sampling = sampling
        self.num_output_tokens = 0
        self.bias_ids: Ids = np.fromiter(bias, np.int64, len(bias))
        self.bias = np.fromiter(bias.values(), np.float32, len(bias))
        ends = {i for i in eos_token_ids.union(sampling.stop_token_ids) if 0 <= i < vocab_size}
        self.end_ids: Ids = np.array(sorted(ends), np.int64)
        self._bits = np.random.PCG64(
            None if sampling.seed is None else [sampling.seed % 2**64, index]
        )
        self._generator = np.random.Generator(self._bits)
        self._num_drawn = 0
        self._output_counts: dict[int, int] = {}
        self._is_repeat_penalized = sampling.repetition_penalty != 1.0
        self._seen = set(prompt_token_ids) if self._is_repeat_penalized else set[int]()
        self._prompt_ids: Ids = np.array(sorted(self._seen), np.int64)
        self._new_ids: list[int] = []

    def append(self, token_id: int) -> None:
        """Count a token that the sequence has taken."""
        self.num_output_tokens += 1
        self._output_counts[token_id] = self._output_counts.get(token_id, 0) + 1
        if self._is_repeat_penalized and token_id not in self._seen:
            self._seen.add(token_id)
            self._new_ids.append(token_id)

    def uniform(self) -> float:
        """The next number in [0, 1): one for each token that is drawn, none for a greedy one."""
        self._num_drawn += 1
        return float(self._generator.random())

    def rewind(self, num_in_flight: int = 0) -> None:
        """Draw again what was drawn for tokens that came to nothing: all but those taken or in flight."""
        num_in_vain = self._num_drawn - self.num_output_tokens - num_in_flight
        if num_in_vain > 0:
            self._bits.advance(-num_in_vain)
            self._num_drawn -= num_in_vain

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken rather than drawn."""
        return self.sampling.temperature == 0.0

    @property
    def must_go_on(self) -> bool:
        """Whether `min_tokens` still forbids every token that would end the sequence."""
        return self.num_output_tokens < self.sampling.min_tokens

    @property
    def has_penalty(self) -> bool:
        """Whether presence or frequency of output tokens lowers their logits now."""
        sampling = self.sampling
        return bool(self._output_counts) and bool(
            sampling.presence_penalty or sampling.frequency_penalty
        )

    def seen_ids(self) -> Ids:
        """Every token of prompt and output, once."""
        return np.concatenate((self._prompt_ids, np.array(self._new_ids, np.int64)))

    def penalties(self) -> tuple[Ids, NDArray[np.float32]]:
        """Output tokens, and what presence and frequency take off the logit of each."""
        num_ids = len(self._output_counts)
        counts = np.fromiter(self._output_counts.values(), np.float64, num_ids)
        amounts = self.sampling.presence_penalty + self.sampling.frequency_penalty * counts
        return np.fromiter(self._output_counts, np.int64, num_ids), amounts.astype(np.float32)
