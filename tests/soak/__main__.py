"""`python -m tests.soak`: hundreds of clients of all manners on one real server, then the accounts.

    python -m tests.soak --duration-s 600 --clients 200 --json build/soak.json

Ends with status 1 if a rule is broken, and says which and how.
"""

import argparse
import json
import sys
from pathlib import Path

from tests.soak.report import as_json, as_table
from tests.soak.soak import Options, soak


def parse(words: list[str]) -> tuple[Options, Path | None]:
    default = Options()
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--duration-s", type=float, default=default.duration_s)
    parser.add_argument("--clients", type=int, default=default.num_clients)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--adapters", type=int, default=default.num_adapters, help="on the disk")
    parser.add_argument("--slots", type=int, default=default.num_slots, help="on the device")
    parser.add_argument(
        "--in-memory", type=int, default=default.num_in_memory, help="in host memory"
    )
    parser.add_argument(
        "--directory", type=Path, help="made, and kept with model, adapters, database and log"
    )
    parser.add_argument("--json", type=Path, help="where the report goes as JSON")
    given = parser.parse_args(words)
    options = Options(
        duration_s=given.duration_s,
        num_clients=given.clients,
        seed=given.seed,
        num_adapters=given.adapters,
        num_moving=max(1, given.adapters // 6),
        num_slots=given.slots,
        num_in_memory=given.in_memory,
        model=given.directory,
    )
    return options, given.json


def main() -> int:
    options, path = parse(sys.argv[1:])
    outcome = soak(options)
    sys.stdout.write(as_table(outcome))
    if path is not None:
        path.write_text(json.dumps(as_json(outcome), indent=1) + "\n", encoding="utf-8")
    return 0 if outcome.is_well else 1


if __name__ == "__main__":
    sys.exit(main())
