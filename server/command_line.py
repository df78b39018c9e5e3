"""Running a cyclopts app as a program: what each kind of failure says, and the status it ends with."""

import logging
import sys

from cyclopts import App, CycloptsError

from server.config import ConfigError
from server.errors import FathomError

_WARN_ON_IMPORT = ("torchao", "torch.utils._pytree")
"""transformers imports torchao where it is installed, which then warns of kernels for GPUs, which nobody here
calls, and makes torch warn of what torch will do one day."""


def run(app: App, arguments: list[str] | None = None, prefix: str = "") -> None:
    """Run the command that `arguments` name (default: the program's own) and end with its status.

    A user's mistake is its reason on standard error and 2, a refusal the same and 1, an interrupt 130.
    prefix: before each line of a reason.
    """
    for name in _WARN_ON_IMPORT:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        status = app(
            sys.argv[1:] if arguments is None else arguments,
            result_action="return_value",
            exit_on_error=False,
            print_error=False,
        )
    except (CycloptsError, ConfigError) as error:
        status = _complain(prefix, str(error), 2)
    except FathomError as error:
        status = _complain(prefix, error.message, 1)
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


def _complain(prefix: str, message: str, status: int) -> int:
    for line in message.splitlines():
        sys.stderr.write(f"{prefix}{line}\n")
    return status
