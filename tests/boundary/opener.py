"""A process that opens databases: `opener.py URL...`, once a line comes in.

Run by `test_database`, two at once, on databases that nobody has opened before.
"""

import asyncio
import sys

from boundary.store.store import Store


async def run(urls: list[str]) -> None:
    for url in urls:
        store = await Store.open(url)
        await store.add_audit(actor="opener", action="open", subject="database")
        await store.close()


if __name__ == "__main__":
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    asyncio.run(run(sys.argv[1:]))
