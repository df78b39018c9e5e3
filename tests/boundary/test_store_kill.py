"""A process killed with SIGKILL at the end of a job leaves all of it or nothing."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from boundary.store.store import JobLost, Store
from tests.boundary.test_store import KEY, actions, pin

pytestmark = pytest.mark.anyio

KILLED = Path(__file__).with_name("killed.py")


def run_and_kill(url: str, when: str) -> None:
    done = subprocess.run(
        [sys.executable, str(KILLED), url, when], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")


async def test_killed_before_the_commit_it_leaves_the_old_state(
    store: Store, store_url: str
) -> None:
    old, activation = await store.pin(pin(1), actor="ada")
    run_and_kill(store_url, "before")
    (job,) = await store.jobs()
    assert (job.state, job.boundary_id, job.result) == ("running", None, None)
    assert await store.active(KEY) == old
    assert await store.active_since(0) == [activation]
    assert await store.history(KEY) == [old]
    assert (await actions(store))[2:] == ["job.create", "job.start"]
    (reaped,) = await store.reap()
    assert (reaped.id, reaped.state) == (job.id, "interrupted")
    with pytest.raises(JobLost):
        await store.finish_job(job.id, "killed", "succeeded", record=pin(), activate=True)
    again = await store.create_job("pirate", KEY, {}, owner="host-1", actor="ada")
    assert again.state == "queued"


async def test_killed_after_the_commit_it_leaves_the_new_state(
    store: Store, store_url: str
) -> None:
    await store.pin(pin(1), actor="ada")
    run_and_kill(store_url, "after")
    (job,) = await store.jobs()
    assert job.state == "succeeded"
    active = await store.active(KEY)
    assert active is not None
    assert (active.id, active.version, active.record.depth) == (job.boundary_id, 2, 3)
    assert await store.reap() == []
