"""What a run found, with all that is needed to judge and to repeat it: JSON, markdown and a plot."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from server.bench.report import machine
from server.bench.report import versions as own_versions
from tests.bench.peers import plot, table
from tests.bench.peers.cases import NUM_ADAPTERS, OUTPUT_LEN, PROMPT_LEN, Case
from tests.bench.peers.lineup import Lineup
from tests.bench.peers.models import RANK, SHAPE_TEXT
from tests.bench.peers.peer import Peer
from tests.bench.peers.ratios import Result, Sample, results
from tests.bench.peers.reference import MAX_DIFFERENCE, MAX_OFF_MEDIAN
from tests.bench.peers.rounds import Method

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Report:
    """One run of the bench."""

    peers: Sequence[Peer]
    cases: Sequence[Case]
    method: Method
    lineup: Lineup
    samples: Sequence[Sample]
    reference_s: Sequence[float]
    cross_check: dict[str, Any] | None

    @property
    def results(self) -> list[Result]:
        """Every case with the peers that took part in it."""
        peers = {
            case.key: [peer.name for peer in self.peers if self._took_part(case, peer)]
            for case in self.cases
        }
        return results(self.samples, peers)

    def _took_part(self, case: Case, peer: Peer) -> bool:
        return (case.key, peer.name) in self.lineup.runners

    @property
    def reasons(self) -> dict[tuple[str, str], str]:
        """(case, peer) -> why there is no number; an error of a sample is one too."""
        failed = {(s.case, s.peer): f"failed: {s.error}" for s in self.samples if s.error}
        return failed | self.lineup.excluded

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "schema": SCHEMA,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": {"bench": own_versions(), **self.lineup.versions},
            "model": {
                "shape": SHAPE_TEXT,
                "num_adapters": NUM_ADAPTERS,
                "rank": RANK,
                "prompt_len": PROMPT_LEN,
                "output_len": OUTPUT_LEN,
            },
            "method": asdict(self.method)
            | {"max_difference": MAX_DIFFERENCE, "max_off_median": MAX_OFF_MEDIAN},
            "equality": {name: str(found) for name, found in self.lineup.equality.items()},
            "idle_share": self.lineup.idle_share,
            "reasons": {"/".join(pair): reason for pair, reason in self.reasons.items()},
            "results": [asdict(found) | {"is_met": found.is_met} for found in self.results],
            "samples": [
                asdict(sample) | {"tokens_per_s": sample.tokens_per_s} for sample in self.samples
            ],
            "reference_s": list(self.reference_s),
            "cross_check": self.cross_check,
        }


def as_markdown(report: Report) -> str:
    """Tables with what stands beside them."""
    titles = {peer.name: peer.title for peer in report.peers}
    notes = {
        (case.key, peer.name): peer.notes[case.key]
        for peer in report.peers
        for case in report.cases
        if case.key in peer.notes
    }
    num_discarded = sum(sample.is_discarded for sample in report.samples)
    here = machine()
    parts = [
        f"{here['cpu']}, {here['num_cores']} cores, {datetime.now(UTC):%Y-%m-%d}, seed"
        f" {report.method.seed}; {report.method.rounds} rounds, {num_discarded} of"
        f" {len(report.samples)} samples discarded by the reference runs around them.",
        table.rates(report.cases, titles, report.results, report.reasons, notes),
        table.ratios(report.cases, titles, report.results),
        "\n".join(f"- {name}: {found}" for name, found in report.lineup.equality.items()),
        "\n".join(
            f"- {name}: {', '.join(f'{k} {v}' for k, v in found.items())}"
            for name, found in report.lineup.versions.items()
        ),
    ]
    if report.cross_check is not None:
        lines = [f"- {key}: {value}" for key, value in report.cross_check.items()]
        parts.append("\n".join(["`vllm bench serve` against Fathom:", "", *lines]))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def write(report: Report, directory: Path) -> None:
    """`peers.json`, `peers.md` and `peers.svg`."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report.as_dict(), indent=2) + "\n"
    (directory / "peers.json").write_text(text, encoding="utf-8")
    (directory / "peers.md").write_text(as_markdown(report), encoding="utf-8")
    titles = {peer.name: peer.title for peer in report.peers}
    plot.draw(report.cases, titles, report.results, directory / "peers.svg")
