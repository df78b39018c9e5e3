"""`python -m tests.bench.peers`: Fathom beside the servers that people use today, in one run.

1. Make the models and each peer's environment where missing (`models`, `environment`, `who/`).
2. In every round, start what the chosen cases need anew; 20 greedy completions must equal PEFT's
   (`lineup`, `equality`).
3. Take interleaved samples, each between two reference runs (`rounds`, `reference`); all rounds of
   float32 first, then those of 16 bits.
4. Write JSON, tables and a plot after each round (`ratios`, `table`, `plot`).

Ends with 1 if Fathom itself is excluded anywhere; a target that is not met is a result, not an error.
"""

import signal
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, TypeVar

import cyclopts
from cyclopts import Parameter
from cyclopts.validators import Number

from tests.bench.peers import report
from tests.bench.peers.cases import BY_KEY
from tests.bench.peers.equality import PeftReference
from tests.bench.peers.lineup import Lineup, line_up
from tests.bench.peers.load_client import cross_check
from tests.bench.peers.models import make_models
from tests.bench.peers.peer import Place
from tests.bench.peers.ratios import ENGINE, Sample
from tests.bench.peers.reference import Reference
from tests.bench.peers.rounds import Method, take_round
from tests.bench.peers.who import PEERS

CHECKOUT = Path(__file__).parents[3]
T = TypeVar("T")
_AT_LEAST_1 = Parameter(validator=Number(gte=1))


def main(
    *,
    peers: str = ",".join(PEERS),
    cases: str = ",".join(BY_KEY),
    rounds: Annotated[int, _AT_LEAST_1] = 5,
    waves: Annotated[int, _AT_LEAST_1] = 2,
    tries: Annotated[int, _AT_LEAST_1] = 4,
    seed: int = 0,
    fathom_python: Path = CHECKOUT / ".venv" / "bin" / "python",
    out: Path = CHECKOUT / "build" / "peers",
    with_cross_check: Annotated[bool, Parameter(name="--cross-check", negative=())] = False,
) -> int:
    """Measure Fathom beside its peers.

    Parameters
    ----------
    peers
        Those to measure, by name; Fathom always takes part.
    cases
        Loads, by name.
    rounds
        Samples of each peer in each case, each of processes of its own.
    waves
        Requests in a sample, as a multiple of the streams (one stream counts as two).
    tries
        Attempts at a sample that reference runs discard.
    seed
        Of weights, prompts and the order of adapters.
    fathom_python
        The interpreter that runs this checkout's server.
    out
        Where environments, models, logs and results go.
    with_cross_check
        Also drive a Fathom server by vLLM's own load client.
    """
    chosen = named("--peers", peers, PEERS)
    if ENGINE not in {peer.name for peer in chosen}:
        chosen = [PEERS[ENGINE], *chosen]
    chosen_cases = named("--cases", cases, BY_KEY)
    out = out.absolute()
    place = Place(out, CHECKOUT, fathom_python.absolute(), make_models(out / "models", seed))
    method = Method(rounds, waves, tries, seed, place.models.shape.vocab_size)
    # First, so that a failure of it does not end a run of an hour.
    checked = cross_check(place) if with_cross_check else None
    reference, checker, lineup = Reference(), PeftReference(place.models), Lineup()
    samples: list[Sample] = []
    found = report.Report(
        peers=chosen,
        cases=chosen_cases,
        method=method,
        lineup=lineup,
        samples=samples,
        reference_s=reference.history,
        cross_check=checked,
    )
    # One width after the other: all of both would not lie in the memory of a small machine.
    for is_16_bit in (False, True):
        of_width = [case for case in chosen_cases if case.is_16_bit is is_16_bit]
        for number in range(rounds if of_width else 0):
            with ExitStack() as stack:
                line_up(lineup, chosen, of_width, place, checker, stack)
                samples += take_round(of_width, lineup.runners, method, reference, number)
            # After each round, because what ends a run early would lose an hour of samples.
            report.write(found, out)
    sys.stdout.write(report.as_markdown(found))
    return int(any(peer == ENGINE for _, peer in lineup.excluded))


def named(flag: str, text: str, known: Mapping[str, T]) -> list[T]:
    """Those of `known` that a list of names asks for, in its order. Ends the program on another name."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            sys.exit(f"{flag}: should be of {', '.join(known)} (given {name!r})")
    return [known[name] for name in dict.fromkeys(names)]


def end_on_sigterm() -> None:
    """Let SIGTERM unwind the stack: otherwise it would leave every server behind."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


if __name__ == "__main__":
    end_on_sigterm()
    app = cyclopts.App(name="python -m tests.bench.peers", default_command=main)
    sys.exit(app())
