"""A process that has imported the server once, and forks a `fathom` wherever it is told to.

Run as `python nursery.py [FAULT]`. A line in is JSON: `{"arguments": [...], "stdout": PATH, "stderr":
PATH}` is answered with the new process's id, `{"wait": PID}` with the status that it ended with. At the
end of the lines whoever is left is killed. What a child runs is what `fathom` runs; only its imports are
done. With a fault it is broken on purpose, for whoever wants to see that it is found.
"""

import json
import os
import signal
import sys
from typing import Any

import transformers.models.llama.modeling_llama  # noqa: F401
from sqlalchemy import delete

import server.serve  # noqa: F401
from boundary.store import history
from boundary.store.store import Activation, AdapterKey, Store
from boundary.store.tables import AuditRow
from server import cli
from server.access.usage_store import UsageStore


def become(order: dict[str, Any]) -> None:
    """Be the `fathom` of these arguments; never returns."""
    status = 1
    try:
        for number, path in ((1, order["stdout"]), (2, order["stderr"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
        cli.main(order["arguments"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


async def forget(self: UsageStore, usage: object, batch: object = None) -> None:
    """Say that usage is written, and write none."""


async def activate_apart(self: Store, key: AdapterKey, version: int, **more: Any) -> Activation:
    """Decide in one transaction, and leave the audit log to another that never comes."""
    async with self.database.writing() as write:
        activation = await history.activate(write, key, version, **more)
        await write.session.execute(delete(AuditRow).where(AuditRow.action.like("boundary.%")))
    return activation


FAULTS: dict[str, tuple[type, str, Any]] = {
    "forget-usage": (UsageStore, "add", forget),
    "half-a-decision": (Store, "activate", activate_apart),
}


def main() -> None:
    for fault in sys.argv[1:]:
        owner, name, broken = FAULTS[fault]
        setattr(owner, name, broken)
    children: set[int] = set()
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            pid, status = os.waitpid(order["wait"], 0)
            children.remove(pid)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                become(order)
            children.add(answer)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()
    for pid in children:  # whoever started them has failed, or is gone
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
