"""The plugin's settings: `FATHOM_VLLM_*` variables, since vLLM has no flags for its plugins."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, DirectoryPath, Field, ValidationError

from server.config import VLLM_PREFIX, ConfigError
from server.environment import default_cache, vllm_variables
from server.setting_values import Bytes


class ResolverSettings(BaseModel):
    """Frozen; unknown names are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    adapter_root: DirectoryPath = Field(
        description="Directory whose subdirectories are the adapters; nothing outside is read."
    )
    default_depth: Literal["auto", "full"] = Field(
        "auto", description="What a name without @DEPTH means."
    )
    cache_dir: Path = Field(
        default_factory=lambda: default_cache("cuts"),
        description="Directory of cut adapters; default is in the user's cache directory.",
    )
    max_cache_bytes: Annotated[Bytes, Field(ge=1 << 20)] = Field(
        16 << 30, description="Most that they may take, such as 16GiB."
    )


def load(variables: Mapping[str, str] | None = None) -> ResolverSettings | None:
    """The settings; None where no adapter root is named. Raises ConfigError, one line a problem."""
    given = vllm_variables() if variables is None else vllm_variables(variables)
    if not given:
        return None
    try:
        settings = ResolverSettings.model_validate(given)
    except ValidationError as error:
        raise ConfigError("\n".join(map(_problem, error.errors(include_url=False)))) from None
    _make(settings.cache_dir)
    return settings


def _problem(detail: Mapping[str, object]) -> str:
    location = detail["loc"]
    assert isinstance(location, tuple)
    variable = f"{VLLM_PREFIX}{str(location[0]).upper()}"
    if detail["type"] == "missing":
        return f"{variable}: is needed where another {VLLM_PREFIX} variable is set"
    if detail["type"] == "extra_forbidden":
        return f"{variable}: is no setting"
    return f"{variable}: {str(detail['msg']).removeprefix('Value error, ')} (given {detail['input']!r})"


def _make(cache_dir: Path) -> None:
    """The cache's directory, for this user alone: what lies there is loaded as adapters."""
    variable = f"{VLLM_PREFIX}CACHE_DIR"
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{variable}: cannot be made: {error.strerror}") from error
    if not os.access(cache_dir, os.W_OK | os.X_OK):
        raise ConfigError(f"{variable}: cannot be written (given {str(cache_dir)!r})")
