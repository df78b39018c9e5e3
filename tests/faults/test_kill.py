"""A server killed in the midst of everything leaves a store that is whole, and its rules find what is not."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.access.counts import Counts
from tests.faults import campaign, stored
from tests.faults.clients import Seen
from tests.faults.decisions import Told, what_was_told_is_kept
from tests.faults.kill import as_table
from tests.faults.stored import Boundary, Decision, Job, Stored

SHORT = campaign.Options(num_kills=2, latest_s=1.0, seed=5)


def test_two_kills_leave_nothing_half_written(tmp_path: Path) -> None:
    outcome = campaign.run(SHORT, tmp_path)
    assert outcome.is_well, as_table(SHORT, outcome)
    assert len(outcome.kills) == 2
    assert all(each.num_answered for each in outcome.kills)
    assert outcome.left is not None
    assert outcome.left.decisions
    assert any(job.state == "interrupted" for job in outcome.left.jobs)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_twenty_kills_leave_nothing_half_written(database: str, tmp_path: Path) -> None:
    options = campaign.Options(database=database)
    outcome = campaign.run(options, tmp_path)
    assert outcome.is_well, as_table(options, outcome)
    assert len(outcome.kills) == 20
    assert sum(each.num_written for each in outcome.kills) > 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "finding"),
    [
        ("forget-usage", "were said to be there"),
        ("half-a-decision", "in the audit log"),
    ],
)
def test_servers_that_are_broken_are_found(fault: str, finding: str, tmp_path: Path) -> None:
    options = campaign.Options(num_kills=2, earliest_s=2.0, latest_s=3.0, faults=(fault,))
    outcome = campaign.run(options, tmp_path)
    assert any(finding in each for each in outcome.findings), outcome.findings


PINNED = Boundary("b1", "plain", 1, 2, "manual")
FOUND = Boundary("b2", "new", 1, 3, "log_likelihood")
DONE = Job("j1", "new", "new-1", "succeeded", "b2", True, None)
CUT = Job("j2", "new", "new-2", "interrupted", None, False, "its process gave no sign of life")
WELL = Stored(
    [PINNED, FOUND],
    [
        Decision(1, "plain", 1, "pin"),
        Decision(2, "new", 1, "activate"),
        Decision(3, "plain", 1, "activate"),
    ],
    [DONE, CUT],
    {("plain", 2): Counts(2, 18, 0, 6, 0, 0, 0)},
    Counter(
        {
            "boundary.add": 2,
            "boundary.pin": 1,
            "boundary.activate": 2,
            "key.create": 1,
            "job.succeeded": 1,
            "job.interrupted": 1,
        }
    ),
    frozenset({"k"}),
)
EMPTY = Stored([], [], [], {}, Counter(), frozenset())
TOLD = Told(decisions=[("pin", 1), ("activate", 1)], jobs={"j1": "succeeded"})
SEEN = Seen(started=Counter({("plain", 2): 3}))


def findings(now: Stored, told: Told = TOLD, acknowledged: int = 2) -> list[str]:
    rules: list[Iterator[str]] = [
        stored.history_is_whole(now),
        stored.jobs_are_whole(now, is_settled=True),
        stored.usage_is_whole(now),
        stored.nothing_is_gone(WELL, now),
        what_was_told_is_kept(told, EMPTY, now, "plain"),
        campaign.usage_is_right(SEEN, EMPTY, now, acknowledged),
    ]
    return [finding for rule in rules for finding in rule]


def test_a_store_that_is_whole_has_no_findings() -> None:
    assert findings(WELL) == []


def changed(field: str, change: Callable[[Any], Any]) -> Stored:
    return replace(WELL, **{field: change(getattr(WELL, field))})


@pytest.mark.parametrize(
    ("field", "change", "finding"),
    [
        ("damage", lambda _: ["row 3 missing from index"], "missing from index"),
        ("boundaries", lambda all: [all[0], replace(all[1], version=2)], "has versions [2]"),
        ("boundaries", lambda all: all[1:], "names a version that is not there"),
        ("boundaries", lambda all: [*all, replace(FOUND, id="b3", adapter="x")], "is of no job"),
        ("decisions", lambda all: [all[0], all[2]], "numbered [1, 3]"),
        ("decisions", lambda all: all[:2], "the history has"),
        ("decisions", lambda all: [*all, replace(all[0], sequence=4)], "and 2 were answered"),
        ("audit", lambda all: all - Counter({"boundary.pin": 1}), "boundary.pin in the audit log"),
        ("audit", lambda all: all - Counter({"job.interrupted": 1}), "such audit entries"),
        ("jobs", lambda all: [replace(DONE, has_result=False), CUT], "result is not there"),
        ("jobs", lambda all: [replace(DONE, boundary_id="b9"), CUT], "is not there"),
        ("jobs", lambda all: [DONE, replace(CUT, boundary_id="b1")], "is interrupted and has"),
        ("jobs", lambda all: [DONE, replace(CUT, error=None)], "does not say why"),
        ("jobs", lambda all: [DONE, replace(CUT, state="running")], "nobody runs it"),
        ("jobs", lambda all: [CUT], "job j1 is not there"),
        ("jobs", lambda all: [replace(DONE, state="failed"), CUT], "was succeeded and is failed"),
        ("keys", lambda _: frozenset(), "key k is not there any more"),
        ("usage", lambda _: {("plain", 2): Counts(4, 36, 0, 12)}, "and 3 were sent"),
        ("usage", lambda _: {("plain", 2): Counts(1, 9, 0, 3)}, "2 were said to be there"),
        ("usage", lambda _: {("plain", 2): Counts(2, 18, 0, 3)}, "2 whole requests with (18, 3)"),
    ],
)
def test_a_store_that_is_not_is_found(
    field: str, change: Callable[[Any], Any], finding: str
) -> None:
    """The control of all rules: each sees what is wrong."""
    found = findings(changed(field, change))
    assert any(finding in each for each in found), found
