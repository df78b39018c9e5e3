"""`python -m server` is `fathom`."""

from server.cli import main

main()
