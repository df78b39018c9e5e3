"""What one calibration through the engine comes to: a record, its evidence, and a report.

The same for a job and for `fathom calibrate`; made by `pipeline`.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from boundary.outcome import Calibration
from boundary.record import BoundaryRecord
from boundary.report.report import CalibrationReport, to_json, verdict_sentence


@dataclass(frozen=True, slots=True)
class GenerationCost:
    """What the generated texts took.

    num_texts: texts generated, each once for all depths that are the same model.
    num_cut: of those, how many ended because `max_tokens` was reached.
    num_tokens: over all texts.
    max_tokens: of each text at most.
    """

    num_texts: int
    num_cut: int
    num_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """A finished calibration.

    record: None where there were too few samples to conclude anything.
    """

    calibration: Calibration
    record: BoundaryRecord | None
    report: CalibrationReport
    generation: GenerationCost

    @property
    def changes_depth(self) -> bool:
        """Whether the verdict allows to serve the record's depth: `improves` or `equal_cheaper`.

        `keep_full` says that nothing was shown, not that full is better than a depth which earlier
        samples confirmed; so it is kept in the history and never activated by itself.
        """
        return self.record is not None and self.record.verdict != "keep_full"

    @property
    def summary(self) -> str:
        """One sentence or two for somebody who never saw a verdict before."""
        return verdict_sentence(self.report)

    def evidence(self) -> dict[str, Any]:
        """Strict JSON: everything that was found beside the record."""
        found: dict[str, Any] = json.loads(to_json(self.report))
        for name in ("record", "command"):
            del found[name]
        found["num_layer_evaluations"] = dict(self.calibration.num_layer_evaluations)
        found["generation"] = asdict(self.generation)
        return found
