"""The interpreter in which a page's Python blocks run, one after the other: names stay.

Its arguments are those of driver.sh; the shell's environment and directory are taken over for each block.
"""

import os
import sys
from pathlib import Path


def main() -> None:
    environment, orders_fd, replies_fd = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    names = {"__name__": "__main__"}
    with open(orders_fd) as orders, open(replies_fd, "w") as replies:
        for path in map(str.strip, orders):
            if environment.exists():
                pairs = environment.read_bytes().rstrip(b"\0").split(b"\0")
                os.environ.clear()
                os.environb.update(dict(pair.split(b"=", 1) for pair in pairs))
                os.chdir(os.environ["PWD"])
            exec(compile(Path(path).read_text(encoding="utf-8"), path, "exec"), names)
            print("done", file=replies, flush=True)


if __name__ == "__main__":
    main()
