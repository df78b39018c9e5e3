"""How many connections fit below a limit on open files, and how a process gets there."""

import subprocess
import sys

import pytest

from server.config import ConfigError
from server.connections import MAX_CONNECTIONS, RESERVED_FILES, Connections


@pytest.mark.parametrize(
    ("limit", "named", "most"),
    [
        (1_048_576, None, MAX_CONNECTIONS),
        (MAX_CONNECTIONS + RESERVED_FILES, None, MAX_CONNECTIONS),
        (4096, None, 4096 - RESERVED_FILES),
        (256, None, 128),
        (1_048_576, 100_000, 100_000),
        (4096, 4096 - RESERVED_FILES, 4096 - RESERVED_FILES),
        (4096, 7, 7),
    ],
)
def test_as_many_as_are_named_or_fit(limit: int, named: int | None, most: int) -> None:
    wanted = []

    def raise_limit(number: int) -> int:
        wanted.append(number)
        return min(limit, number)

    assert Connections.within(raise_limit, named).most == most
    assert wanted == [(named or MAX_CONNECTIONS) + RESERVED_FILES]


@pytest.mark.parametrize(("limit", "named", "room"), [(4096, 3585, 3584), (256, 200, 128)])
def test_more_than_fit_are_refused_with_both_numbers(limit: int, named: int, room: int) -> None:
    with pytest.raises(ConfigError, match=rf"--max-connections: {named} do not fit.*\b{room}\b"):
        Connections.within(lambda _: limit, named)


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "then"),
    [(64, 256, 1000, 256), (64, 256, 100, 100), (200, 256, 100, 200)],
)
def test_the_soft_limit_is_raised_towards_the_hard_one_and_never_lowered(
    soft: int, hard: int, wanted: int, then: int
) -> None:
    code = (
        "import resource; from server.open_files import raise_limit\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        f"print(raise_limit({wanted}), *resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == [str(min(wanted, hard)), str(then), str(hard)]
