"""Kill a server again and again in the midst of everything it writes, and look at what it left.

    python -m tests.faults.kill --kills 20 --database sqlite --seed 1
    python -m tests.faults.kill --kills 20 --database postgresql --json build/kill.json

Ends with status 1 if a rule is broken, and says which and how. The moments are drawn from the seed.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from tests.faults.campaign import Kill, Options, Outcome, run

MAX_LOST_S = 2.0
"""Usage of the last second may be lost, and a write takes some of the next; beside that, for as long as
the server got no time from its machine."""


def loses_no_more_than_a_second(kills: Sequence[Kill]) -> Iterator[str]:
    """A time, so for whoever asks by hand and for no test."""
    for number, kill in enumerate(kills):
        if kill.lost_s - kill.stalled_s > MAX_LOST_S:
            yield f"kill {number + 1}: usage of {kill.lost_s} s is lost"


def as_table(options: Options, outcome: Outcome) -> str:
    kills = outcome.kills
    states = Counter(job.state for job in outcome.left.jobs) if outcome.left else Counter()
    lines = [
        f"{len(kills)} kills with {options.database}, seed {options.seed}",
        f"  answers before the kills     {sum(kill.num_answered for kill in kills)}",
        f"  requests in flight           {sum(kill.num_in_flight for kill in kills)}",
        f"  requests with usage written  {sum(kill.num_written for kill in kills)}",
        f"  oldest usage lost            {max((kill.lost_s for kill in kills), default=0)} s",
        f"  longest wait for metrics     {max((kill.stalled_s for kill in kills), default=0)} s",
        f"  unfinished jobs left         {sum(len(kill.unfinished) for kill in kills)}",
        f"  jobs at the end              {', '.join(f'{k} {n}' for k, n in sorted(states.items()))}",
        f"  decisions at the end         {len(outcome.left.decisions) if outcome.left else 0}",
    ]
    lines += [f"  BROKEN {finding}" for finding in outcome.findings] or ["  every rule held"]
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kill", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the report goes as JSON")
    given = parser.parse_args()
    options = Options(given.kills, given.database, given.seed)
    with tempfile.TemporaryDirectory(prefix="fathom-kill-") as folder:
        outcome = run(options, Path(folder))
    outcome.findings += loses_no_more_than_a_second(outcome.kills)
    sys.stdout.write(as_table(options, outcome))
    if given.json is not None:
        kills = [asdict(kill) for kill in outcome.kills]
        report = {"options": asdict(options), "kills": kills, "findings": outcome.findings}
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if outcome.is_well else 1


if __name__ == "__main__":
    sys.exit(main())
