"""All settings, with their defaults and limits. The only reader of the environment.

Precedence: command line, `FATHOM_*` environment variables, the TOML file, defaults. Values found
later (the number of KV blocks, the model's own context length) are passed on, never written back.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """One frozen object, checked on construction; unknown names are an error."""

    model_config = SettingsConfigDict(env_prefix="FATHOM_", frozen=True, extra="forbid")

    model: str | None = Field(
        None, description="Model directory or hub id; none serves the embedded demo."
    )
    revision: str | None = Field(None, description="Hub revision of the model.")
    served_model_name: str | None = Field(
        None, description="The base model's id on the wire; the default is the last part of MODEL."
    )
    adapter: dict[str, Path] = Field(
        default_factory=dict, description="NAME=PATH of a PEFT checkpoint; repeatable."
    )
    adapter_root: Path | None = Field(
        None,
        description="Directory whose subdirectories are adapters, loaded when first asked for.",
    )

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        8000, description="Port; 0 picks a free one."
    )
    api_key: SecretStr | None = Field(None, description="Bearer key that /v1 requires.")
    admin_key: SecretStr | None = Field(
        None, description="Bearer key for loading and unloading adapters; without one they are off."
    )
    max_body_bytes: Annotated[int, Field(ge=1024)] = Field(
        4 << 20, description="Largest request body."
    )

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the model runs.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Weights and activations; auto is float32 on CPU, the checkpoint's on a GPU.",
    )
    max_model_len: Annotated[int, Field(ge=8)] | None = Field(
        None, description="Longest prompt plus completion, in tokens; default is the model's own."
    )
    max_num_seqs: Annotated[int, Field(ge=1)] = Field(
        64, description="Sequences in one step at most."
    )
    max_num_batched_tokens: Annotated[int, Field(ge=16)] = Field(
        512, description="Tokens in one step at most; longer prompts are prefilled in chunks."
    )
    max_num_waiting: Annotated[int, Field(ge=1)] = Field(
        1024, description="Requests waiting at most; one more is answered 503."
    )
    max_n: Annotated[int, Field(ge=1)] = Field(16, description="Largest `n` of a request.")
    max_logprobs: Annotated[int, Field(ge=0)] = Field(20, description="Largest `top_logprobs`.")
    block_size: Annotated[int, Field(ge=1)] = Field(16, description="Tokens in one KV block.")
    kv_cache_bytes: Annotated[int, Field(ge=1 << 16)] | None = Field(
        None, description="Memory for KV blocks; default is a share of what is free."
    )
    prefix_caching: bool = Field(True, description="Reuse KV blocks of equal prefixes.")
    max_loras: Annotated[int, Field(ge=1)] = Field(8, description="Adapters on the device at most.")
    max_cpu_loras: Annotated[int, Field(ge=1)] = Field(
        256, description="Adapters in host memory at most; the least recently used is dropped."
    )
    max_lora_rank: Annotated[int, Field(ge=1)] = Field(256, description="Largest rank accepted.")
    default_depth: Literal["auto", "full"] = Field(
        "auto",
        description="Depth of a request that names none: the calibrated one, or the whole adapter.",
    )
    request_timeout_s: Annotated[float, Field(gt=0)] = Field(
        600.0, description="Longest life of a request, waiting included."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Log level."
    )
