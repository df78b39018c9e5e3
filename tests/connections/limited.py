"""`fathom` in a process that may open few files: `python limited.py SOFT HARD ARGUMENT ...`.

With `unbounded` in front of SOFT it accepts connections whatever the limit says, as a server
without a bound of its own would. HARD may be `-`: it stays as it is.
"""

import resource
import sys

from server import cli, serve


def main() -> None:
    words = sys.argv[1:]
    if words[0] == "unbounded":
        words.pop(0)
        serve.raise_limit = lambda wanted: wanted
    soft, hard, *arguments = words
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(soft), most if hard == "-" else int(hard)))
    cli.main(arguments)


if __name__ == "__main__":
    main()
