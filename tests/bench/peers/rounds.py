"""The order in which samples are taken, and how one is taken.

Round-robin: in each round every case, in each case every peer, and each round begins with another
peer, so that none has always the same neighbour. A peer that spins while it is idle is paused except
around its own samples. A sample is: resume, one short request that is not timed, a reference run, the
load, a reference run, pause.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from server.bench.load import LoadResult
from server.bench.workload import Workload
from tests.bench.peers.cases import Case, run_number
from tests.bench.peers.progress import say
from tests.bench.peers.ratios import Sample
from tests.bench.peers.reference import Reference, is_disturbed
from tests.bench.peers.side import Side

_WARMUP_TOKENS = 4
_WARMUP_ATTEMPT = 99


@dataclass(frozen=True, slots=True)
class Runner:
    """A peer's side for one case; `is_paused` where it waits stopped."""

    side: Side
    is_paused: bool


@dataclass(frozen=True, slots=True)
class Method:
    """How much is measured."""

    rounds: int
    waves: int
    tries: int
    seed: int
    vocab_size: int


Sides = Mapping[tuple[str, str], Runner]
"""(case, peer) -> what answers it."""


def order(
    cases: Sequence[Case], peers: Mapping[str, Sequence[str]], number: int
) -> Iterator[tuple[Case, str]]:
    """(case, peer) of every sample of round `number`; `peers` are those of each case."""
    for case in cases:
        names = list(peers[case.key])
        first = number % len(names) if names else 0
        for name in names[first:] + names[:first]:
            yield case, name


def take_round(
    cases: Sequence[Case], sides: Sides, method: Method, reference: Reference, number: int
) -> list[Sample]:
    """Every sample of round `number` and every attempt that was discarded."""
    peers = {case.key: [peer for key, peer in sides if key == case.key] for case in cases}
    samples: list[Sample] = []
    if not reference.history:
        reference.first()
    for case, peer in order(cases, peers, number):
        for attempt in range(method.tries):
            runner = sides[case.key, peer]
            sample = take(case, peer, runner, method, reference, number, attempt)
            samples.append(sample)
            say(_line(sample))
            if not sample.is_discarded:
                break
    return samples


def take(
    case: Case,
    peer: str,
    runner: Runner,
    method: Method,
    reference: Reference,
    round_number: int,
    attempt: int,
) -> Sample:
    """One attempt. A request or a side that fails makes it an error, which is not tried again."""
    workload = case.workload(case.num_requests(method.waves), method.vocab_size, method.seed)
    if runner.is_paused:
        runner.side.tree.resume()
    error, result = None, LoadResult(0.0, ())
    try:
        _warm_up(runner.side, case, workload, round_number, attempt)
        before_s = reference.run()
        items = workload.run(run_number(case, round_number, attempt))
        result, _ = runner.side.run(items, case.num_streams)
        error = first_error(result)
    # A child that ended, a body that is no JSON, a connection that broke.
    except (RuntimeError, ValueError, OSError) as failure:
        before_s, error = reference.run(), f"{type(failure).__name__}: {failure}"
    finally:
        after_s = reference.run()
        if runner.is_paused:
            runner.side.tree.pause()
    return Sample(
        case=case.key,
        peer=peer,
        round=round_number,
        attempt=attempt,
        duration_s=result.duration_s,
        num_output_tokens=sum(timing.num_output_tokens for timing in result.timings),
        reference_s=(before_s, after_s),
        is_discarded=error is None and is_disturbed(before_s, after_s, reference.history),
        error=error,
    )


def first_error(result: LoadResult) -> str | None:
    """What the first request that failed said."""
    return next((timing.error for timing in result.timings if timing.error is not None), None)


def _warm_up(side: Side, case: Case, workload: Workload, round_number: int, attempt: int) -> None:
    number = run_number(case, round_number, _WARMUP_ATTEMPT - attempt)
    item = replace(workload.run(number)[0], output_len=_WARMUP_TOKENS)
    side.run([item], 1)


def _line(sample: Sample) -> str:
    before_s, after_s = sample.reference_s
    verdict = sample.error or ("discarded" if sample.is_discarded else "")
    return (
        f"round {sample.round + 1} {sample.case:<10} {sample.peer:<13}"
        f" {sample.tokens_per_s:7.1f} tokens/s  reference {before_s:.3f} {after_s:.3f} s {verdict}"
    )
