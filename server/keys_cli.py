"""`fathom keys`: its commands, and where the keys are kept that they mean."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from server.config import ConfigError, Settings, variable
from server.environment import load_settings

keys = App(name="keys", help="Make, list and revoke the keys of a keys file or a database.")

KeysFile = Annotated[
    Path | None, Parameter(help=f"File that keeps them, hashed. [{variable('keys_file')}]")
]
KeysDatabase = Annotated[
    str | None, Parameter(help=f"Database that keeps them, hashed. [{variable('database')}]")
]


def _kept_in(keys_file: Path | None, database: str | None) -> Settings:
    """What is named on the command line; if nothing is, what the environment names."""
    given = {"keys_file": keys_file, "database": database}
    flags = {name: value for name, value in given.items() if value is not None}
    return load_settings(flags, environ={}) if flags else load_settings()


@keys.command(name="add")
def add_key(
    name: Annotated[str, Parameter(help="Who will have it, in one line.")],
    /,
    *,
    keys_file: KeysFile = None,
    database: KeysDatabase = None,
    admin: Annotated[
        bool, Parameter(negative=(), help="A key for /admin and for loading adapters.")
    ] = False,
    adapters: Annotated[
        list[str] | None,
        Parameter(help="A model that it may use, by name or shell pattern; repeatable."),
    ] = None,
    max_depth: Annotated[int | None, Parameter(help="The deepest lora_depth it may use.")] = None,
    requests_per_minute: Annotated[int | None, Parameter(help="Requests a minute.")] = None,
    tokens_per_minute: Annotated[
        int | None, Parameter(help="Tokens a minute, of prompts and answers.")
    ] = None,
    json: Annotated[bool, Parameter(negative=(), help="Print JSON instead of the key.")] = False,
) -> int:
    """Make a key for NAME and print it, which happens once: only its hash is kept."""
    from server.keys import add

    return add(
        _kept_in(keys_file, database),
        name,
        is_admin=admin,
        adapters=adapters or (),
        limits={
            "max_depth": max_depth,
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
        },
        as_json=json,
    )


@keys.command(name="list")
def list_keys(
    *,
    keys_file: KeysFile = None,
    database: KeysDatabase = None,
    json: Annotated[bool, Parameter(negative=(), help="Print JSON instead of a table.")] = False,
) -> int:
    """Show the keys, also those that were revoked."""
    from server.keys import show

    return show(_kept_in(keys_file, database), as_json=json)


@keys.command(name="revoke")
def revoke_keys(
    *ids: Annotated[str, Parameter(help="Of the keys, as `list` shows them.")],
    keys_file: KeysFile = None,
    database: KeysDatabase = None,
) -> int:
    """Let keys open nothing any more; a server that runs knows within two seconds."""
    from server.keys import revoke

    if not ids:
        raise ConfigError("name the keys to revoke by their ids")
    return revoke(_kept_in(keys_file, database), ids)
