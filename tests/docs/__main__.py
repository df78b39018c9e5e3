"""`python -m tests.docs`: what of the documents is not run, and why; one line a block."""

import sys

from tests.docs.page import blocks, pages


def main() -> None:
    """List the marked blocks of every page."""
    for block in (block for page in pages() for block in blocks(page)):
        if block.not_run is not None:
            stands_in = f" (in its place: {block.instead})" if block.instead else ""
            sys.stdout.write(f"{block}  {block.not_run}{stands_in}\n")


if __name__ == "__main__":
    main()
