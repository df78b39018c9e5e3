"""What a store holds, read from its tables while no server runs, and what of it cannot be true.

A rule gives findings: none is well.
"""

import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from sqlalchemy import select

from boundary.record import BoundaryRecord
from boundary.store.database import Database
from boundary.store.tables import ActivationRow, AuditRow, BoundaryRow, JobRow
from server.access.counts import Counts
from server.access.tables import KeyRow, UsageRow
from tests.faults.clients import LENGTH, NUM_PROMPT_TOKENS, Model

FINAL = ("succeeded", "failed", "cancelled", "interrupted")


@dataclass(frozen=True, slots=True)
class Boundary:
    id: str
    adapter: str
    version: int
    depth: int
    method: str


@dataclass(frozen=True, slots=True)
class Decision:
    """An activation."""

    sequence: int
    adapter: str
    version: int | None
    action: str


@dataclass(frozen=True, slots=True)
class Job:
    id: str
    adapter: str
    name: str
    state: str
    boundary_id: str | None
    has_result: bool
    error: str | None


@dataclass(frozen=True, slots=True)
class Stored:
    boundaries: Sequence[Boundary]
    decisions: Sequence[Decision]
    jobs: Sequence[Job]
    usage: Mapping[Model, Counts]
    audit: Counter[str]
    """Entries of what was done, by action."""
    keys: frozenset[str]
    damage: Sequence[str] = ()
    """What the database itself finds wrong with its file."""


async def read(url: str, key: str) -> Stored:
    """Everything at once; usage is one key's. A record that cannot be read raises ValidationError."""
    damage = list(_damage(url.removeprefix("sqlite:///"))) if url.startswith("sqlite") else []
    database = await Database.open(url)
    try:
        async with database.reading() as session:
            usage: dict[Model, Counts] = defaultdict(Counts)
            for row in await session.scalars(select(UsageRow).where(UsageRow.key == key)):
                usage[row.adapter or None, row.depth] += Counts(
                    row.requests,
                    row.prompt_tokens,
                    row.cached_tokens,
                    row.completion_tokens,
                    row.aborted_requests,
                    row.aborted_prompt_tokens,
                    row.aborted_completion_tokens,
                )
            return Stored(
                [_boundary(row) for row in await session.scalars(select(BoundaryRow))],
                [
                    Decision(row.sequence, row.adapter, row.version, row.action)
                    for row in await session.scalars(
                        select(ActivationRow).order_by(ActivationRow.sequence)
                    )
                ],
                [
                    Job(
                        row.id,
                        row.adapter,
                        row.adapter_name,
                        row.state,
                        row.boundary_id,
                        row.result is not None,
                        row.error,
                    )
                    for row in await session.scalars(select(JobRow))
                ],
                usage,
                Counter(
                    await session.scalars(select(AuditRow.action).where(AuditRow.outcome == "ok"))
                ),
                frozenset(await session.scalars(select(KeyRow.id))),
                damage,
            )
    finally:
        await database.close()


def _boundary(row: BoundaryRow) -> Boundary:
    record = BoundaryRecord.model_validate_json(json.dumps(row.record))
    assert (record.depth, record.adapter_fingerprint) == (row.depth, row.adapter)
    return Boundary(row.id, row.adapter, row.version, row.depth, record.method)


def _damage(path: str) -> Iterator[str]:
    with closing(sqlite3.connect(path)) as connection:
        yield from (
            text for (text,) in connection.execute("PRAGMA integrity_check") if text != "ok"
        )
        for row in connection.execute("PRAGMA foreign_key_check"):
            yield f"a key points nowhere: {row}"


def history_is_whole(stored: Stored) -> Iterator[str]:
    """Versions and decisions are numbered without a gap, and what is active is in the history."""
    yield from stored.damage
    versions: dict[str, list[int]] = defaultdict(list)
    for boundary in stored.boundaries:
        versions[boundary.adapter].append(boundary.version)
    for adapter, found in versions.items():
        if sorted(found) != list(range(1, len(found) + 1)):
            yield f"{adapter} has versions {sorted(found)}"
    numbers = [decision.sequence for decision in stored.decisions]
    if numbers != list(range(1, len(numbers) + 1)):
        yield f"decisions are numbered {numbers}"
    for decision in stored.decisions:
        if decision.version is not None and decision.version not in versions[decision.adapter]:
            yield f"{decision} names a version that is not there"
    by_method = Counter(boundary.method == "manual" for boundary in stored.boundaries)
    by_action = Counter(decision.action for decision in stored.decisions)
    for what, num, action in (
        ("records", len(stored.boundaries), "boundary.add"),
        ("pinned records", by_method[True], "boundary.pin"),
        ("activations", by_action["activate"], "boundary.activate"),
        ("roll-backs", by_action["roll_back"], "boundary.roll_back"),
        ("keys", len(stored.keys), "key.create"),
    ):
        if num != stored.audit[action]:
            yield f"{num} {what}, and {stored.audit[action]} entries of {action} in the audit log"


def jobs_are_whole(stored: Stored, *, is_settled: bool = False) -> Iterator[str]:
    """A record belongs to one job that succeeded, and to no other.

    is_settled: no process lives and no lease runs, so that none may be unfinished.
    """
    calibrated = {each.id for each in stored.boundaries if each.method != "manual"}
    for job in stored.jobs:
        if job.state == "succeeded":
            if job.boundary_id not in calibrated or not job.has_result:
                yield f"job {job.id} succeeded, and its record or result is not there"
            calibrated.discard(job.boundary_id or "")
        elif job.boundary_id is not None:
            yield f"job {job.id} is {job.state} and has a record"
        if job.state == "interrupted" and not job.error:
            yield f"job {job.id} does not say why it was interrupted"
        if is_settled and job.state not in FINAL:
            yield f"job {job.id} is {job.state}, and nobody runs it"
    for id in calibrated:
        yield f"record {id} is of no job"
    for state in FINAL:
        num = sum(job.state == state for job in stored.jobs)
        if num != stored.audit[f"job.{state}"]:
            yield f"{num} jobs {state}, and {stored.audit[f'job.{state}']} such audit entries"


def nothing_is_gone(before: Stored, after: Stored) -> Iterator[str]:
    """History is only added to."""
    for boundary in set(before.boundaries) - set(after.boundaries):
        yield f"{boundary} is not there any more"
    if list(after.decisions[: len(before.decisions)]) != list(before.decisions):
        yield "decisions are not what they were"
    now = {job.id: job for job in after.jobs}
    for job in before.jobs:
        if job.state in FINAL and now.get(job.id) != job:
            yield f"{job} has become {now.get(job.id)}"
    for id in before.keys - after.keys:
        yield f"key {id} is not there any more"


def usage_is_whole(stored: Stored) -> Iterator[str]:
    """Requests and their tokens were written together: all of the clients' are alike."""
    for model, counts in stored.usage.items():
        whole = counts.requests - counts.aborted_requests
        tokens = (
            counts.prompt_tokens - counts.aborted_prompt_tokens,
            counts.completion_tokens - counts.aborted_completion_tokens,
        )
        if tokens != (whole * NUM_PROMPT_TOKENS, whole * LENGTH):
            yield f"{model}: {whole} whole requests with {tokens} tokens"
