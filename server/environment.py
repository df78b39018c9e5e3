"""What surrounds the process: its command line's flags, environment variables and TOML file, as settings.

The only reader of the environment. Precedence: command line, `FATHOM_*` environment variables, the TOML file,
defaults. A layer replaces a setting whole: `--adapter` on the command line does not add to the TOML
file's adapters. A bad or unknown value stops it with the name of the flag, variable or key it came from.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from server.config import (
    CONFIG_VARIABLE,
    ENV_PREFIX,
    VLLM_PREFIX,
    ConfigError,
    Settings,
    flag,
    variable,
)


def default_database(environ: Mapping[str, str] = os.environ) -> Path:
    """SQLite's file where no database is named: in the user's state directory."""
    return _users_own(environ, "XDG_STATE_HOME", ".local/state") / "fathom.db"


def default_cache(name: str, environ: Mapping[str, str] = os.environ) -> Path:
    """A directory of ours in the user's cache directory."""
    return _users_own(environ, "XDG_CACHE_HOME", ".cache") / name


def _users_own(environ: Mapping[str, str], variable: str, below_home: str) -> Path:
    """Our part of a directory that XDG defines; one that is not absolute does not count."""
    directory = Path(environ.get(variable, ""))
    return (directory if directory.is_absolute() else Path.home() / below_home) / "fathom"


def vllm_variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Setting of the plugin for vLLM -> its variable's value."""
    return {
        key.removeprefix(VLLM_PREFIX).lower(): value
        for key, value in environ.items()
        if key.startswith(VLLM_PREFIX)
    }


def traces_endpoint(environ: Mapping[str, str] = os.environ) -> str | None:
    """Where OpenTelemetry's own variables send traces to; None: there are none.

    Raises ConfigError for an exporter or protocol that is not served. All else that they say
    (sampling, service name, headers, timeouts, batches) is read by OpenTelemetry itself.
    """
    named = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "")
    base = environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    is_off = environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if is_off or exporter == "none" or not (named or base or exporter):
        return None
    if exporter not in ("", "otlp"):
        raise ConfigError(f"OTEL_TRACES_EXPORTER: should be otlp or none (given {exporter!r})")
    for key in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if environ.get(key):
            if environ[key] != "http/protobuf":
                raise ConfigError(f"{key}: should be http/protobuf (given {environ[key]!r})")
            break
    return named or f"{(base or 'http://localhost:4318').removesuffix('/')}/v1/traces"


def load_settings(
    flags: Mapping[str, object] | None = None,
    *,
    config_file: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Settings:
    """Settings from the command line's `flags`, the environment and a TOML file.

    Raises ConfigError, one line a problem.
    """
    if config_file is None and CONFIG_VARIABLE in environ:
        if not environ[CONFIG_VARIABLE]:
            raise ConfigError(f"{CONFIG_VARIABLE}: is empty; unset it or name a TOML file")
        config_file = Path(environ[CONFIG_VARIABLE])
    problems: list[str] = []
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    layers = (
        _from_toml(config_file, problems) if config_file is not None else {},
        _from_environment(environ, problems),
        {name: (flag(name), value) for name, value in (flags or {}).items()},
    )
    for layer in layers:
        for name, (origin, value) in layer.items():
            values[name], origins[name] = value, origin
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            name, *inner = (str(part) for part in detail["loc"])
            origin = ".".join([origins.get(name, name), *inner])
            message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
            given = _shown(values.get(name))
            is_secret = name.endswith("_key") or name == "database"
            is_secret = is_secret or re.search(r"://[^/]*:[^/]*@", given) is not None
            shown = "" if is_secret else f" (given {given})"
            problems.append(f"{origin}: {message[0].lower()}{message[1:]}{shown}")
    if problems:
        raise ConfigError("\n".join(problems))
    return settings


def _from_toml(path: Path, problems: list[str]) -> dict[str, tuple[str, object]]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}") from None
    for key in sorted(table.keys() - Settings.model_fields.keys()):
        problems.append(f"{path}: {key}: is no setting{_hint(key, Settings.model_fields)}")
    return {
        key: (f"{path}: {key}", value)
        for key, value in table.items()
        if key in Settings.model_fields
    }


def _from_environment(
    environ: Mapping[str, str], problems: list[str]
) -> dict[str, tuple[str, object]]:
    known = {variable(name): name for name in Settings.model_fields}
    found: dict[str, tuple[str, object]] = {}
    for key in sorted(key for key in environ if key.startswith(ENV_PREFIX)):
        if key.startswith(VLLM_PREFIX):
            continue
        if key in known:
            found[known[key]] = (key, environ[key])
        elif re.search(r"_SERVICE_(HOST|PORT)|_PORT_\d+_", key):
            problems.append(
                f"{key}: is no setting; it looks like a Kubernetes service link:"
                " set enableServiceLinks: false in the pod"
            )
        elif key != CONFIG_VARIABLE:
            problems.append(f"{key}: is no setting{_hint(key, known)}")
    return found


def _hint(name: str, known: Mapping[str, Any]) -> str:
    close = get_close_matches(name.replace("-", "_"), known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
