"""`fathom keys`: made, listed and revoked in a file and in a database, and shown once."""

import json
import re
from pathlib import Path

import pytest

from server.access import key_file, secret
from server.access.key import Grant
from tests.conftest import Run
from tests.postgres import Postgres

KEY = re.compile(r"fathom-[0-9a-f]{16}-[\w-]{43}\n")


@pytest.fixture(params=["file", "sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    if request.param == "file":
        return "--keys-file", str(tmp_path / "keys.json")
    if request.param == "sqlite":
        return "--database", f"sqlite:///{tmp_path / 'fathom.db'}"
    postgres: Postgres = request.getfixturevalue("postgres")
    return "--database", postgres.fresh_url()


def test_a_key_is_made_listed_and_revoked(fathom: Run, place: tuple[str, str]) -> None:
    status, out, err = fathom("keys", "add", "ada", *place)
    assert (status, KEY.fullmatch(out) is not None) == (0, True), err
    id = secret.id_of(out.strip())
    assert id is not None
    assert "shown this once" in err
    assert "fathom-" not in err
    status, out, _ = fathom("keys", "list", *place, "--json")
    (listed,) = json.loads(out)
    assert (listed["id"], listed["name"], listed["revoked_at"]) == (id, "ada", None)
    assert listed.keys() == {"id", "name", "scope", "created_at", "revoked_at"}
    status, out, err = fathom("keys", "revoke", id, *place)
    assert (status, out) == (0, "")
    assert "is revoked" in err
    (listed,) = json.loads(fathom("keys", "list", *place, "--json")[1])
    assert listed["revoked_at"] is not None
    status, _, err = fathom("keys", "revoke", "0" * 16, *place)
    assert (status, "there is no key" in err) == (1, True)


def test_limits_are_kept_and_shown(fathom: Run, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    limits = ["--adapters", "sql*", "--adapters", "base", "--max-depth", "6"]
    limits += ["--requests-per-minute", "60", "--tokens-per-minute", "9000"]
    status, out, _ = fathom("keys", "add", "ada", *limits, "--keys-file", str(path), "--json")
    assert status == 0
    told = json.loads(out)
    assert KEY.fullmatch(told["key"] + "\n")
    (kept,) = key_file.read(path).values()
    assert secret.matches(told["key"], kept.hash)
    assert kept.key.grant == Grant(
        adapters=("sql*", "base"), max_depth=6, requests_per_minute=60, tokens_per_minute=9000
    )
    fathom("keys", "add", "root", "--admin", "--keys-file", str(path))
    status, out, _ = fathom("keys", "list", "--keys-file", str(path))
    ada, root = out.splitlines()[1:]
    assert "adapters sql* base, max_depth 6, requests_per_minute 60" in ada
    assert "admin" in root
    assert "scrypt" not in out


def test_the_environment_names_the_place_unless_the_command_line_does(
    fathom: Run, tmp_path: Path
) -> None:
    file, other = tmp_path / "keys.json", tmp_path / "other.json"
    assert fathom("keys", "add", "ada", FATHOM_KEYS_FILE=str(file))[0] == 0
    assert fathom("keys", "add", "bob", "--keys-file", str(other))[0] == 0
    assert [each.key.name for each in key_file.read(file).values()] == ["ada"]
    assert [each.key.name for each in key_file.read(other).values()] == ["bob"]
    both = {"FATHOM_DATABASE": f"sqlite:///{tmp_path / 'fathom.db'}"}
    status, _, err = fathom("keys", "list", **both)
    assert (status, "not both" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        (["add", "ada"], 2, "--keys-file or --database"),
        (["add", "", "--keys-file", "FILE"], 2, "NAME"),
        (["add", "ada", "--keys-file", "FILE", "--max-depth", "-1"], 2, "--max-depth"),
        (["add", "ada", "--keys-file", "FILE", "--requests-per-minute", "0"], 2, "greater than"),
        (["add", "ada", "--keys-file", "FILE", "--admin", "--max-depth", "1"], 2, "no limits"),
        (["add", "ada", "--database", "mysql://ada:s3cr3t@host/db"], 1, "mysql"),
        (["add", "ada", "--keys-file", "/no/such/folder/keys.json"], 1, "No such file"),
        (["list", "--keys-file", "FILE"], 1, "No such file"),
        (["revoke", "--keys-file", "FILE"], 2, "by their ids"),
        (["revoke", "x", "--keys-file", "FILE"], 1, "No such file"),
    ],
)
def test_a_mistake_is_told_in_a_line(
    fathom: Run, tmp_path: Path, words: list[str], status: int, reason: str
) -> None:
    words = [str(tmp_path / "keys.json") if word == "FILE" else word for word in words]
    found, out, err = fathom("keys", *words)
    assert (found, out) == (status, "")
    assert reason in err
    assert len(err.splitlines()) == 1
    assert "s3cr3t" not in err
    assert list(tmp_path.iterdir()) == []
