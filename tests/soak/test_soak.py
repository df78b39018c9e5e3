"""A short soak, in which every rule is looked at."""

import json

from tests.soak.report import as_json, as_table
from tests.soak.soak import Options, soak

WORK = frozenset({"load", "unload", "reload", "recalibrate", "key", "revoke"})
SHORT = Options(
    duration_s=3.0,
    until_done=WORK,
    num_clients=24,
    num_adapters=12,
    num_moving=4,
    num_slots=4,
    num_in_memory=8,
    num_prompts=4,
    change_pause_s=0.2,
)
"""Too short for a figure of memory, whose warm-up is minutes: that rule is `make soak`'s."""


def test_a_short_soak_breaks_no_rule() -> None:
    outcome = soak(SHORT)
    outcome.findings.pop("memory")
    assert outcome.is_well, as_table(outcome)
    assert outcome.num_compared > 20
    assert sum(record.has_left for record in outcome.records) > 3
    assert outcome.done.keys() >= WORK
    assert json.loads(json.dumps(as_json(outcome)))["is_well"]
