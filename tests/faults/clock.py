"""A clock that a test sets, for one process: libfaketime between it and the machine's.

Only the time of day is set, as by an administrator or NTP: what runs by the monotonic clock is not
touched. The library is the `dev` extra's, which compiles it when it is installed.
"""

import importlib.util
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
import pytest

HOUR_S = 3600
LOOK_S = 0.1
MAX_LOOKS = 600


class Clock:
    """Set by `step`; processes with its `variables` live by it."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "offset"
        self._offset_h = 0
        self._set(0)

    @property
    def variables(self) -> Mapping[str, str]:
        """Of the environment of whoever is to live by it."""
        return {
            "LD_PRELOAD": str(_library()),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            # Else waits by the monotonic clock, of which Python's own lock is one, end at once.
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",
            "FAKETIME_CACHE_DURATION": "1",  # seconds until it looks at the file again
        }

    @property
    def now(self) -> datetime:
        return datetime.fromtimestamp(time.time() + self._offset_h * HOUR_S, UTC)

    def step(self, hours: int, http: httpx.Client) -> None:
        """Set it so many hours from where it is; returns when the server was seen to live by it.

        Every response has the server's time of day in it, which it looks at once a second.
        """
        self._set(self._offset_h + hours)
        for _ in range(MAX_LOOKS):
            told = parsedate_to_datetime(http.get("/version").headers["date"])
            if abs((told - self.now).total_seconds()) < HOUR_S / 2:
                return
            time.sleep(LOOK_S)
        pytest.fail(f"the server lives at {told}, not at {self.now}")

    def _set(self, hours: int) -> None:
        beside = self._file.with_suffix(".new")
        beside.write_text(f"{hours:+d}h\n")
        beside.replace(self._file)
        self._offset_h = hours


def _library() -> Path:
    spec = importlib.util.find_spec("libfaketime")
    if spec is None or spec.origin is None:
        pytest.fail("no clock can be set here: `pip install libfaketime` (in the `dev` extra)")
    (found,) = Path(spec.origin).parent.glob("vendor/*/src/libfaketime.so.1")
    return found
