"""A process that is killed at the end of a job: `killed.py URL before|after`, the commit, that is.

Run by `test_store_kill`. Prints nothing and, if all goes as meant, never returns.
"""

import asyncio
import os
import signal
import sys

from sqlalchemy import Connection, Engine, event

from boundary.record import BoundaryRecord
from boundary.store.store import AdapterKey, Store

KEY = AdapterKey(f"sha256:{'a' * 64}", f"sha256:{'b' * 64}")


def die(_: Connection | None = None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def run(url: str, when: str) -> None:
    store = await Store.open(url, lease_s=1e-6)
    job = await store.create_job("pirate", KEY, {}, owner="killed", actor="ada")
    await store.start_job(job.id, "killed")
    if when == "before":
        event.listen(Engine, "commit", die)  # all rows are written, the commit is not sent
    record = BoundaryRecord.pinned(3, 4, "found", base=KEY.base, adapter=KEY.adapter)
    await store.finish_job(job.id, "killed", "succeeded", record=record, activate=True)
    die()


if __name__ == "__main__":
    asyncio.run(run(*sys.argv[1:]))
