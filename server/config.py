"""All settings, with their defaults and limits.

Frozen, and checked on construction. Values found later (the number of KV blocks, the model's own context
length) are passed on, never written back. `Settings(...)` reads nothing but its arguments; where they
come from is `environment`'s.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    DirectoryPath,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
)

from server.setting_values import Adapters, Bytes, Origins, Prefixes, Schemes, Word
from server.sources.location import BUILT_IN_SCHEMES, RemoteAdapter

ENV_PREFIX = "FATHOM_"
CONFIG_VARIABLE = "FATHOM_CONFIG"
VLLM_PREFIX = "FATHOM_VLLM_"
"""Of the plugin for vLLM, which may share an environment with a server; see `server.vllm.settings`."""


class ConfigError(ValueError):
    """Settings that cannot be used; one line a problem, each naming where the value came from."""


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, str_strip_whitespace=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _a_boolean_is_not_a_number(cls, value: object, info: ValidationInfo) -> object:
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("should not be a boolean")
        return value


class ModelSettings(_Section):
    """The base model."""

    model: Word | None = Field(
        None, description="Model directory or hub id; none serves the embedded demo."
    )
    revision: Word | None = Field(None, description="Hub revision of the model.")
    served_model_name: Word | None = Field(
        None, description="The base model's id on the wire; the default is the last part of MODEL."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the model runs.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Weights and activations; auto is float32 on CPU, the checkpoint's on a GPU.",
    )
    quantization: Literal["none", "int8"] = Field(
        "none",
        description="Weights of the decoder's Linear layers in 8 bits, a scale an output channel; needs"
        " the extra int8 (torchao).",
    )
    max_model_len: Annotated[int, Field(ge=8)] | None = Field(
        None, description="Longest prompt plus completion, in tokens; default is the model's own."
    )

    @field_validator("model")
    @classmethod
    def _a_path_exists(cls, value: str | None) -> str | None:
        # Anything else may be a hub id, which only the load can tell.
        if value is not None and value.startswith(("/", "./", "../")) and not Path(value).is_dir():
            raise ValueError("is no directory")
        return value


class AdapterSettings(_Section):
    """LoRA adapters and how deep they reach."""

    adapter_scheme: Schemes = Field(
        (),
        description="Scheme beside hf and s3 that adapters may be fetched by, such as gs, if fsspec"
        " knows it; repeatable.",
    )
    adapter: Adapters = Field(
        default_factory=dict,
        description="NAME=PATH of a PEFT checkpoint, which may be hf://ORG/NAME@REVISION or"
        " s3://BUCKET/PREFIX; repeatable.",
    )
    adapter_source: Prefixes = Field(
        (),
        description="Prefix of remote adapters that whoever holds the admin key may load, such as"
        " hf://my-org or s3://bucket/adapters; repeatable. Default: none but those named by --adapter.",
    )
    adapter_cache: Path | None = Field(
        None,
        description="Directory that keeps adapters from object stores; default is one in the user's"
        " cache directory. Those of the hub are kept in the hub's own.",
    )
    adapter_cache_bytes: Annotated[Bytes, Field(ge=0)] = Field(
        10 << 30, description="Size of that cache; the least recently used are removed."
    )
    max_fetch_bytes: Annotated[Bytes, Field(ge=1)] = Field(
        4 << 30, description="Largest file of weights that is fetched."
    )
    fetch_timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        600.0, description="Longest time that fetching an adapter may take."
    )
    adapter_root: DirectoryPath | None = Field(
        None,
        description="Directory whose subdirectories are adapters, loaded when first asked for; and the"
        " one below which whoever holds the admin key may name paths.",
    )
    max_loras: Annotated[int, Field(ge=1)] = Field(8, description="Adapters on the device at most.")
    max_lora_bytes: Annotated[Bytes, Field(ge=1)] | None = Field(
        None,
        description="Memory of the adapters on the device, such as 2GiB; default: as many as"
        " --max-loras.",
    )
    resident_depth: Literal["auto", "full"] = Field(
        "full",
        description="How deep an adapter is kept on the device: whole, or below its calibrated depth"
        " and deeper while a request is.",
    )
    max_cpu_loras: Annotated[int, Field(ge=1)] = Field(
        256, description="Adapters in host memory at most; the least recently used is dropped."
    )
    max_lora_rank: Annotated[int, Field(ge=1)] = Field(256, description="Largest rank accepted.")
    default_depth: Literal["auto", "full"] = Field(
        "auto",
        description="Depth of a request that names none: the calibrated one, or the whole adapter.",
    )

    @field_validator("adapter")
    @classmethod
    def _names_can_be_asked_for(
        cls, value: dict[str, Path | RemoteAdapter], info: ValidationInfo
    ) -> dict[str, Path | RemoteAdapter]:
        schemes = (*BUILT_IN_SCHEMES, *info.data.get("adapter_scheme", ()))
        for name, place in value.items():
            if not name or "@" in name or any(not c.isprintable() or c.isspace() for c in name):
                raise ValueError(f"adapter name {name!r} should be one word without '@'")
            if isinstance(place, RemoteAdapter) and place.scheme not in schemes:
                raise ValueError(
                    f"adapter {name!r} is fetched by {place.scheme}://, which adapter_scheme does not"
                    " allow"
                )
        return value

    def adapter_paths(self) -> dict[str, Path]:
        """Every adapter's directory. Raises ConfigError where one does not lie on this machine."""
        paths: dict[str, Path] = {}
        for name, place in self.adapter.items():
            if not isinstance(place, Path):
                raise ConfigError(f"--adapter: {name!r} must be a directory here for this command")
            paths[name] = place
        return paths


MAX_BEYOND_SHARE = 8
"""Of the tokens of a step, the part by which it may be longer where that ends a prompt."""


class EngineSettings(_Section):
    """The step: batching and KV cache."""

    max_num_seqs: Annotated[int, Field(ge=1)] = Field(
        64, description="Sequences in one step at most."
    )
    max_num_batched_tokens: Annotated[int, Field(ge=16)] = Field(
        512,
        description="Tokens in one step at most, or an eighth more where that ends a prompt; "
        "longer prompts are prefilled in chunks.",
    )
    block_size: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Tokens in one KV block; default 16, and 256 with flash attention."
    )
    kv_cache_bytes: Annotated[Bytes, Field(ge=1 << 16)] | None = Field(
        None, description="Memory for KV blocks, such as 2GiB; default is a share of what is free."
    )
    prefix_caching: bool = Field(True, description="Reuse KV blocks of equal prefixes.")
    cuda_graphs: bool = Field(
        True,
        description="Record decode steps as CUDA graphs, where the model runs on such a device.",
    )
    calibration_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="Most of the engine's time a calibration gets while requests run."
    )
    step_timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        300.0,
        description="A step that takes longer is stuck: the server says so and ends, status 1.",
    )

    @property
    def max_step_tokens(self) -> int:
        """Tokens in one step at most, with what may end a prompt."""
        return self.max_num_batched_tokens + self.max_num_batched_tokens // MAX_BEYOND_SHARE


class StoreSettings(_Section):
    """Calibrations: where they are kept, and where their samples may lie."""

    database: Annotated[SecretStr, Field(min_length=1)] | None = Field(
        None,
        description="sqlite:///PATH or postgresql://USER@HOST/NAME that keeps calibrations, keys and "
        "usage; with an admin key or a keys file, default is SQLite in the user's state directory.",
    )
    data_root: DirectoryPath | None = Field(
        None, description="Directory of the files of samples that a recalibration may name."
    )


class HttpSettings(_Section):
    """The HTTP server and the limits at its door."""

    host: Word = Field("127.0.0.1", description="Address to listen on.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        8000, description="Port; 0 picks a free one."
    )
    api_key: Annotated[SecretStr, Field(min_length=1)] | None = Field(
        None, description="Bearer key that /v1 requires."
    )
    admin_key: Annotated[SecretStr, Field(min_length=1)] | None = Field(
        None,
        description="Bearer key for /admin and for loading adapters; without one both are off.",
    )
    cors_origin: Origins = Field(
        (),
        description="Origin whose pages may call the API from a browser, such as https://app.example;"
        " repeatable, * for any.",
    )
    console: bool = Field(True, description="Serve the console, a web page, at /.")
    keys_file: Path | None = Field(
        None,
        description="File of hashed keys, made by `fathom keys add`; read again whenever it changes.",
    )
    insecure: bool = Field(
        False, description="Serve other machines though no API key is set, so that anybody may ask."
    )
    max_body_bytes: Annotated[Bytes, Field(ge=1024)] = Field(
        4 << 20, description="Largest request body."
    )
    max_connections: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Connections at once; one more is answered 503. Default: 16,384, or as many as"
        " the hard limit on open files allows.",
    )
    max_num_waiting: Annotated[int, Field(ge=1)] = Field(
        1024, description="Requests waiting at most; one more is answered 503."
    )
    max_waiting_tokens: Annotated[int, Field(ge=1)] = Field(
        4_194_304,
        description="Tokens that waiting requests may come to, prompts and max_tokens; more is"
        " answered 503.",
    )
    queue_timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None,
        description="Longest wait of a request to be admitted, then 503; default: none of its own.",
    )
    max_n: Annotated[int, Field(ge=1)] = Field(16, description="Largest `n` of a request.")
    max_logprobs: Annotated[int, Field(ge=0)] = Field(20, description="Largest `top_logprobs`.")
    request_timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        600.0, description="Longest life of a request, waiting included."
    )
    drain_timeout_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        30.0, description="How long a stopping server lets open requests finish."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Log level."
    )
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="How log lines look; auto is console on a terminal, else JSON."
    )
    log_prompts: bool = Field(
        False,
        description="Write prompts, completions and the words of exceptions to the log, which never"
        " holds them otherwise.",
    )
    max_metric_adapters: Annotated[int, Field(ge=0)] = Field(
        256, description="Adapters with metrics of their own; the others' are summed."
    )


class Settings(HttpSettings, StoreSettings, EngineSettings, AdapterSettings, ModelSettings):
    """One frozen object, checked on construction; unknown names are an error."""


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return ENV_PREFIX + name.upper()


def flag(name: str) -> str:
    """How the command line spells a setting."""
    return "MODEL" if name == "model" else "--" + name.replace("_", "-")
