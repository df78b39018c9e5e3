"""Starts what a run needs of each peer, checks it against PEFT, and keeps it out of the others' way.

Everything is started anew for each round. How fast a process reads its weights depends on which memory
the machine gives it, by a tenth and more for as long as it lives: processes that live for the whole run
would make one draw of it decide all their rounds.

A peer that cannot be made, does not start or gives other tokens is excluded with its reason from then
on, and what it had before does not count; the rest go on. Everything that was started ends with the
stack that it was entered on.
"""

import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from server.bench.workload import WorkItem
from tests.bench.peers.cases import Case
from tests.bench.peers.equality import Equality, PeftReference
from tests.bench.peers.peer import Peer, Place
from tests.bench.peers.process import StartFailed
from tests.bench.peers.progress import say
from tests.bench.peers.rounds import Runner, first_error
from tests.bench.peers.side import Completions, Side

MAX_IDLE_SHARE = 0.01
"""Of one processor; a peer that takes more while nobody asks is paused between its samples."""
_IDLE_S = 2.0
_CHECK_STREAMS = 16


class Unequal(Exception):
    """A peer whose tokens are not PEFT's, or whose requests failed; the message says which."""


@dataclass(slots=True)
class Lineup:
    """Who takes part in which case, and why not."""

    runners: dict[tuple[str, str], Runner] = field(default_factory=dict)
    excluded: dict[tuple[str, str], str] = field(default_factory=dict)
    equality: dict[str, Equality] = field(default_factory=dict)
    """By `peer variant`, over all rounds."""
    idle_share: dict[str, float] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)


def line_up(
    lineup: Lineup,
    peers: Sequence[Peer],
    cases: Sequence[Case],
    place: Place,
    reference: PeftReference,
    stack: ExitStack,
) -> None:
    """Prepare, start and check every peer for every case that it can do, and note it in `lineup`.

    Who was excluded before is not tried again, and who was prepared is only started.
    """
    for peer in peers:
        for case in cases:
            if case.key in peer.cannot:
                lineup.excluded[case.key, peer.name] = peer.cannot[case.key]
        wanted = [case for case in cases if (case.key, peer.name) not in lineup.excluded]
        if not wanted:
            continue
        try:
            if peer.name not in lineup.versions:
                python = peer.prepare(place)
                lineup.versions[peer.name] = versions(str(python), peer.packages)
        except (subprocess.CalledProcessError, OSError, StartFailed) as error:
            _exclude(lineup, peer, wanted, f"cannot be made: {error}")
            continue
        for variant in dict.fromkeys(peer.variant(case) for case in wanted):
            of_variant = [case for case in wanted if peer.variant(case) == variant]
            try:
                runner = _start(peer, variant, of_variant, place, reference, stack, lineup)
            except (StartFailed, Unequal, OSError, RuntimeError) as error:
                _exclude(lineup, peer, of_variant, str(error))
                continue
            for case in of_variant:
                lineup.runners[case.key, peer.name] = runner


def _start(
    peer: Peer,
    variant: str,
    cases: Sequence[Case],
    place: Place,
    reference: PeftReference,
    stack: ExitStack,
    lineup: Lineup,
) -> Runner:
    name = f"{peer.name} {variant}"
    say(f"starting {name}")
    with ExitStack() as own:
        side = own.enter_context(peer.serve(variant, place))
        _ask(side, cases, reference, name, lineup)
        share = lineup.idle_share[name] = side.tree.idle_share(_IDLE_S)
        say(f"{name}: takes {share:.1%} of a processor while idle")
        stack.push(own.pop_all())
    is_paused = share > MAX_IDLE_SHARE and side.is_pausable
    if is_paused:
        side.tree.pause()
    return Runner(side, is_paused)


def _ask(
    side: Side, cases: Sequence[Case], reference: PeftReference, name: str, lineup: Lineup
) -> None:
    """The check, which is also the warm-up; in 16 bits only the warm-up. Raises Unequal."""
    items: list[WorkItem] = []
    if any(not case.adapters for case in cases):
        items += reference.items(has_adapters=False)
    if any(case.adapters for case in cases):
        items += reference.items(has_adapters=True)
    completions = _complete(side, items)
    if any(case.is_16_bit for case in cases):
        return
    equality = reference.compare(items, completions)
    before = lineup.equality.get(name)
    lineup.equality[name] = equality if before is None else before.plus(equality)
    say(f"{name}: {equality}")
    if not equality.is_passed:
        raise Unequal(str(equality))


def _complete(side: Side, items: Sequence[WorkItem]) -> Completions:
    result, completions = side.run(items, _CHECK_STREAMS)
    error = first_error(result)
    if error is not None:
        raise Unequal(f"a request failed: {error}")
    return completions


def _exclude(lineup: Lineup, peer: Peer, cases: Sequence[Case], reason: str) -> None:
    say(f"{peer.name} is excluded: {reason}")
    for case in cases:
        lineup.excluded[case.key, peer.name] = f"excluded: {reason}"
        lineup.runners.pop((case.key, peer.name), None)


def versions(python: str, packages: Sequence[str]) -> Mapping[str, str]:
    """Versions of distributions as another interpreter sees them."""
    code = (
        "import sys, importlib.metadata as m\n"
        "for name in sys.argv[1:]: print(name, m.version(name))"
    )
    done = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True)
    if done.returncode:
        raise StartFailed(done.stderr.strip().splitlines()[-1])
    pairs = (line.partition(" ") for line in done.stdout.splitlines())
    return {name: version for name, _, version in pairs}
