"""Shapes of random Llamas: `12x768:vocab=8000`, `llama-3.1-8b:layers=4`.

Only numbers; `random_model` makes weights of them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from server.config import ConfigError

_KEYS = {
    "layers": "num_layers",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "vocab": "vocab_size",
    "positions": "max_position",
}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Dimensions of a Llama."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    is_tied: bool = False
    rope: Mapping[str, float | int | str] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )


_LLAMA_3_ROPE: dict[str, float | int | str] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
NAMED = {
    "llama-3.1-8b": ModelShape(
        32, 4096, 14336, 32, 8, 128, 128256, 131072, rope={**_LLAMA_3_ROPE, "factor": 8.0}
    ),
    "llama-3.2-1b": ModelShape(
        16, 2048, 8192, 32, 8, 64, 128256, 131072, True, {**_LLAMA_3_ROPE, "factor": 32.0}
    ),
}


def parse_shape(text: str) -> ModelShape:
    """Heads of 64 (one head below that width), 8/3 of the width between them, 8000 tokens unless told else.

    Raises ConfigError.
    """
    name, *pairs = text.split(":")
    given: dict[str, Any] = dict(_parse_pair(pair) for pair in pairs)
    if name in NAMED:
        shape = NAMED[name]
    else:
        match = re.fullmatch(r"(\d+)x(\d+)", name)
        if match is None:
            raise ConfigError(
                f"--random-model: should be LAYERSxHIDDEN or one of {', '.join(NAMED)}"
                f" (given {name!r})"
            )
        hidden = given.get("hidden_size", int(match[2]))
        heads = given.get("num_heads", max(1, hidden // 64))
        shape = ModelShape(
            num_layers=int(match[1]),
            hidden_size=hidden,
            intermediate_size=-(-hidden * 8 // 3 // 32) * 32,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=hidden // max(1, heads),
            vocab_size=8000,
            max_position=2048,
        )
    shape = replace(shape, **given)
    for key, attribute in _KEYS.items():
        if getattr(shape, attribute) < 1:
            raise ConfigError(f"--random-model: {key} should be at least 1")
    if shape.num_heads % shape.num_kv_heads:
        raise ConfigError(
            f"--random-model: heads ({shape.num_heads}) should be a multiple of kv_heads"
            f" ({shape.num_kv_heads})"
        )
    if shape.head_dim % 2:
        raise ConfigError(f"--random-model: head_dim should be even (given {shape.head_dim})")
    return shape


def _parse_pair(pair: str) -> tuple[str, int]:
    key, _, value = pair.partition("=")
    if key not in _KEYS or not value.isascii() or not value.isdigit():
        raise ConfigError(
            f"--random-model: should be key=number with a key of {', '.join(_KEYS)} (given {pair!r})"
        )
    return _KEYS[key], int(value)
