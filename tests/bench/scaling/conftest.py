"""The commands of `python -m server.bench.scaling`, on a model that costs milliseconds."""

from collections.abc import Callable

import pytest

from server.bench.scaling import __main__ as commands

TINY = [
    "--random-model", "2x32:vocab=100:positions=64", "--rank", "2", "--num-adapters", "2",
    "--concurrency", "2", "--rounds", "1", "--prompt-len", "6", "--output-len", "4", "--repeat", "2",
]  # fmt: skip

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; returns status, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            commands.main(list(arguments))
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run
