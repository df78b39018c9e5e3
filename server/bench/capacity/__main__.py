"""`python -m server.bench.capacity measure | compare | plan | page`: see `deploy/CAPACITY.md`.

The status is 1 where a request of a real run failed; how fast anything was is never a failure.
"""

import json as json_format
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from server import command_line
from server.bench.capacity import report
from server.bench.capacity.comparison import compare as compare_runs
from server.bench.capacity.hardware import core_of
from server.bench.capacity.hardware import h200 as hardware_h200
from server.bench.capacity.measurement import MAX_LORAS, Measured, measure_costs, require_one_thread
from server.bench.capacity.page import rewritten, tables
from server.bench.capacity.planning import Demand, cases
from server.bench.capacity.planning import plan as plan_case
from server.bench.capacity.served import compared, demo_settings, on_paper, random_settings
from server.bench.findings import show
from server.bench.scaling.options import Count
from server.bench.scaling.run import tell
from server.bench.shape import parse_shape
from server.config import ConfigError
from server.loading import progress_on_stderr
from server.logs import configure_logs

_MODEL = "12x768:intermediate=2048:heads=12:vocab=8000"

app = App(name="capacity", help="How many replicas serve a load, on paper and checked.")


@app.command
def measure(
    *,
    random_model: str = _MODEL,
    demo: Annotated[bool, Parameter(negative=())] = False,
    rounds: Count = 3,
    seed: int = 0,
    json: Path | None = None,
) -> int:
    """Step costs of this machine's processor, of one thread; and what bringing an adapter in costs.

    Parameters
    ----------
    random_model
        As of `fathom bench`.
    demo
        The embedded demo instead.
    rounds
        Of the whole grid, in an order of its own each.
    """
    configure_logs("warning")
    require_one_thread()
    with progress_on_stderr() as progress:
        if demo:
            found = measure_costs(demo_settings(), rounds, seed, progress)
        else:
            with random_settings(random_model, MAX_LORAS + 1, seed, progress) as settings:
                found = measure_costs(settings, rounds, seed, progress)
    show(report.cost_tables([found]), {"rounds": rounds, "seed": seed}, found, json)
    return 0


@app.command
def compare(
    costs: Path,
    *,
    random_model: str = _MODEL,
    num_adapters: tuple[Count, ...] = (4, 64),
    loads: tuple[float, ...] = (0.3, 0.6, 0.9),
    duration_s: float = 30.0,
    rounds: Count = 3,
    max_cpu_loras: Count = 32,
    seed: int = 0,
    json: Path | None = None,
) -> int:
    """A server under the same arrivals as the simulator's one replica, side by side.

    Parameters
    ----------
    costs
        What `measure --json` wrote for the same model on this machine.
    num_adapters
        Asked for by Zipf's law, on 8 slots.
    loads
        Of what one replica can do with them, as the simulator has it.
    """
    configure_logs("warning")
    require_one_thread()
    measured = read_costs(costs)
    with (
        progress_on_stderr() as progress,
        random_settings(random_model, max(num_adapters), seed, progress) as settings,
    ):
        replica = on_paper(served := compared(settings, max_cpu_loras), measured.num_layers)
        runs = compare_runs(
            served,
            replica,
            measured.costs,
            parse_shape(random_model).vocab_size,
            num_adapters,
            loads,
            duration_s=duration_s,
            rounds=rounds,
            seed=seed,
            progress=progress,
        )
    facts = {"model": random_model, "duration_s": duration_s, "rounds": rounds, "seed": seed}
    show(report.comparison_tables(runs), facts, runs, json)
    failed = sum(run.measured.num_failed for run in runs)
    return tell([f"{failed} requests failed"] if failed else [])


@app.command
def plan(
    *,
    costs: Path | None = None,
    h200: Annotated[bool, Parameter(negative=())] = False,
    requests: Count = 1_000_000,
    num_adapters: Count = 10_000,
    seed: int = 0,
    json: Path | None = None,
) -> int:
    """The fewest replicas that serve a day within the target, by routing and by what else matters.

    Parameters
    ----------
    costs
        What `measure --json` wrote: replicas of one such core each.
    h200
        Replicas of one H200 each, from published figures and assumptions.
    requests
        Of a day.
    """
    configure_logs("warning")
    if (costs is None) != h200:
        raise ConfigError("either --costs or --h200 says what replicas are")
    hardware = hardware_h200()[0] if costs is None else core_of(read_costs(costs))
    plans = []
    with progress_on_stderr() as progress:
        wanted = cases(Demand(requests, num_adapters))
        for done, case in enumerate(wanted):
            progress("cases", done, len(wanted))
            plans.append(plan_case(hardware, case, seed))
        progress("cases", len(wanted), len(wanted))
    show([report.plan_table(plans)], {"target": hardware.target, "seed": seed}, plans, json)
    return 0


@app.command
def page(
    path: Path, findings: Path, *, check: Annotated[bool, Parameter(negative=())] = False
) -> int:
    """Write a page's tables anew from the findings in a directory.

    Parameters
    ----------
    check
        Write nothing; the status is 1 where a table is not what its findings say.
    """
    before = path.read_text(encoding="utf-8")
    after = rewritten(before, tables(findings))
    if check:
        return tell([] if after == before else [f"{path}: a table is not what its findings say"])
    path.write_text(after, encoding="utf-8")
    return 0


def read_costs(path: Path) -> Measured:
    """What `measure` wrote. Raises ConfigError."""
    try:
        content: dict[str, Any] = json_format.loads(path.read_text(encoding="utf-8"))["findings"]
        return report.measured_from(content)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path}: is nothing that `measure` wrote: {error!r}") from None


def main(arguments: list[str] | None = None) -> None:
    """Run one command. See `command_line.run`."""
    command_line.run(app, arguments)


if __name__ == "__main__":
    main()
