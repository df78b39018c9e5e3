"""A soak's findings as a table and as JSON."""

import platform
from collections import Counter
from dataclasses import asdict
from typing import Any

import torch

from server import __version__
from tests.soak.soak import Outcome

MAX_SHOWN = 5
"""Findings of a rule in the table; the JSON has a hundred."""
MAX_KEPT = 100


def figures(outcome: Outcome) -> dict[str, Any]:
    """The counts, in words that the table shows."""
    records = outcome.records
    statuses = Counter(str(record.status) for record in records if record.status is not None)
    growth = outcome.growth
    return {
        "requests": len(records),
        "requests a second": round(len(records) / outcome.elapsed_s, 1),
        "streamed": sum(record.wish.is_stream for record in records),
        "answered whole": sum(record.is_whole for record in records),
        "hung up on": sum(record.has_left for record in records),
        "read slowly": sum(record.wish.reads_slowly for record in records),
        "statuses": dict(sorted(statuses.items())),
        "codes": dict(Counter(record.code for record in records if record.code)),
        "references": outcome.num_references,
        "sequences compared": outcome.num_compared,
        "lines of the access log": outcome.num_logged,
        "operator": dict(sorted(outcome.done.items())),
        "preemptions": _sum(outcome, "vllm:num_preemptions_total"),
        "adapters brought in": _by(outcome, "fathom_adapter_loads_total", "place"),
        "resident MiB, after warm-up": growth and round(growth.first_bytes / 2**20, 1),
        "resident MiB, at the end": growth and round(growth.last_bytes / 2**20, 1),
        "growth": growth and f"{growth.share:+.2%}",
    }


def as_table(outcome: Outcome) -> str:
    options = outcome.options
    lines = [
        f"soak: {options.duration_s:g} s, {options.num_clients} clients, {options.num_adapters} "
        f"adapters on {options.num_slots} slots, {options.num_in_memory} in memory, "
        f"seed {options.seed}",
        "",
    ]
    for name, value in figures(outcome).items():
        shown = value
        if isinstance(value, dict):
            shown = ", ".join(f"{key} {count}" for key, count in value.items()) or "none"
        lines.append(f"  {name:<28} {shown}")
    lines.append("")
    for rule, found in outcome.findings.items():
        lines.append(f"  {rule:<28} {'held' if not found else f'BROKEN {len(found)} times'}")
        lines += [f"    {finding}" for finding in found[:MAX_SHOWN]]
    return "\n".join([*lines, ""])


def as_json(outcome: Outcome) -> dict[str, Any]:
    options = asdict(outcome.options)
    options["model"] = None if options["model"] is None else str(options["model"])
    options["until_done"] = sorted(options["until_done"])
    return {
        "options": options,
        "is_well": outcome.is_well,
        "figures": figures(outcome),
        "findings": {rule: found[:MAX_KEPT] for rule, found in outcome.findings.items()},
        "memory": [[round(at_s, 2), num_bytes] for at_s, num_bytes in outcome.memory],
        "fathom": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.platform(),
    }


def _sum(outcome: Outcome, name: str) -> int:
    return int(sum(value for _, value in outcome.metrics[name]))


def _by(outcome: Outcome, name: str, label: str) -> dict[str, int]:
    return {labels[label]: int(value) for labels, value in outcome.metrics[name]}
