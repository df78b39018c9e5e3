"""The loads that every peer is given, and the least ratio that Fathom is held to in each.

Pure data. A case is a number of streams, the adapters they choose among and a width of numbers; the
targets are those of the project's plan, written before anything was measured.
"""

from dataclasses import dataclass
from random import Random

from server.bench.mix import Choice, deal
from server.bench.trace import TraceRow
from server.bench.workload import Workload

NUM_ADAPTERS = 4
ADAPTERS = tuple(f"a{index}" for index in range(NUM_ADAPTERS))
PROMPT_LEN = 64
OUTPUT_LEN = 64
_NUMBERS_PER_CASE = 10_000
"""Runs of a workload are told apart by number; equal numbers of two cases would be equal prompts,
which the prefix cache of a server that sees both would answer."""


@dataclass(frozen=True, slots=True)
class Case:
    """One load. `is_checked` says whether outputs must equal PEFT's before anything is timed."""

    key: str
    title: str
    num_streams: int
    adapters: tuple[str, ...] = ()
    is_16_bit: bool = False

    @property
    def choices(self) -> tuple[Choice, ...]:
        """What its requests ask for, in equal shares."""
        return tuple(Choice(name) for name in self.adapters) or (Choice(),)

    def num_requests(self, waves: int) -> int:
        """Requests in one sample: one stream is short of work, so it gets two a wave."""
        return waves * max(2, self.num_streams)

    def workload(self, num_requests: int, vocab_size: int, seed: int) -> Workload:
        """Requests of `PROMPT_LEN` random tokens in, `OUTPUT_LEN` out."""
        rows = tuple(TraceRow(0.0, PROMPT_LEN, OUTPUT_LEN) for _ in range(num_requests))
        mix = tuple((choice, 1.0) for choice in self.choices)
        choices = deal(mix, num_requests, Random(f"{seed}/mix"))
        return Workload(rows, tuple(choices), vocab_size, seed)


CASES = (
    Case("1-base", "1 stream, base", 1),
    Case("1-adapter", "1 stream, 1 adapter", 1, ADAPTERS[:1]),
    Case("16-base", "16 streams, base", 16),
    Case("16-one", "16 streams, 1 adapter", 16, ADAPTERS[:1]),
    Case("16-four", "16 streams, 4 adapters", 16, ADAPTERS),
    Case("16-bit", "16 bits, 16 streams, 4 adapters", 16, ADAPTERS, is_16_bit=True),
)
BY_KEY = {case.key: case for case in CASES}

TARGETS = {
    ("1-base", "openvino"): 0.9,
    ("1-base", "llama"): 1.0,
    ("1-adapter", "openvino"): 0.9,
    ("1-adapter", "llama"): 1.0,
    ("16-base", "openvino"): 0.9,
    ("16-base", "vllm"): 1.2,
    ("16-base", "llama"): 1.9,
    ("16-four", "vllm"): 1.8,
    ("16-four", "openvino"): 1.4,
    ("16-four", "ort"): 1.4,
    ("16-four", "llama"): 4.5,
    ("16-four", "peft"): 2.0,
    ("16-bit", "vllm"): 1.8,
    ("16-bit", "llama"): 3.0,
}
"""(case, peer) -> the least median of Fathom's tokens per second over the peer's, round by round."""


def run_number(case: Case, round_number: int, attempt: int) -> int:
    """The number of a workload's run: another one for every case, round and attempt."""
    return (CASES.index(case) + 1) * _NUMBERS_PER_CASE + round_number * 100 + attempt
