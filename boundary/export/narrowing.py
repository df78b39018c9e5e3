"""A PEFT adapter's config, narrowed to some of the modules that it targets.

PEFT has two ways to say so. `layers_to_transform` keeps a list of endings (`q_proj`) and names the
layers; it reaches only modules whose name has a layer's number, and no list of whole names, which
PEFT lets pass by the layers. Where it cannot tell what is left from what is not, `target_modules`
becomes the whole name of every module that is left. Which of the two it is, is not guessed: PEFT's
own matching is asked, for each module of the adapter. Used by `export`; knows no tensors.
"""

import re
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import regex
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from boundary import strict_json

MATCH_TIMEOUT_S = 0.25
"""One of the adapter's patterns on one name: `re` could backtrack on it for years."""
TOTAL_TIMEOUT_S = 10.0
"""All patterns of one field."""

_PLAIN = re.compile(r"[\w.]+")


@dataclass(frozen=True, slots=True)
class Narrowed:
    """A config with what was changed in it, as sentences for whoever exports."""

    config: dict[str, Any]
    notes: tuple[str, ...]


def narrow(
    config: Mapping[str, Any],
    layers: Mapping[str, int | None],
    kept: Collection[str],
    list_name: str | None,
) -> Narrowed:
    """The config of the same adapter with LoRA in the modules `kept` only.

    layers: every module of the adapter by its full name, with its layer; None outside the layers.
    kept: some of them, at least one.
    list_name: what the list of layers is called in its parent, such as `layers` or `h`; None where
    no module is in a layer.

    Fields that need no change, known or not, stay as they are. Whatever PEFT would have targeted in
    the base beside `layers` does not grow. Raises ValueError, naming the field, for a config that
    cannot be narrowed.
    """
    notes: list[str] = []
    narrowed = _by_layers(config, layers, kept, list_name)
    if narrowed is None:
        narrowed = dict(config) | {"target_modules": sorted(kept)}
        for field in ("layers_to_transform", "layers_pattern"):
            if field in narrowed:
                narrowed[field] = None
        notes.append("target_modules holds full module names: layers_to_transform cannot say it")
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field)
        if not patterns:
            continue
        used = _used_patterns(patterns, kept, field)
        if len(used) < len(patterns):
            narrowed[field] = used
            num_unused = len(patterns) - len(used)
            notes.append(f"{field}: {num_unused} left out, matching no module that is kept")
    if config.get("ensure_weight_tying"):
        # It would give a tied output head the LoRA of the embedding again, at every depth.
        narrowed["ensure_weight_tying"] = False
        notes.append("ensure_weight_tying is off: the output head has no LoRA below full depth")
    return Narrowed(narrowed, tuple(notes))


def _by_layers(
    config: Mapping[str, Any],
    layers: Mapping[str, int | None],
    kept: Collection[str],
    list_name: str | None,
) -> dict[str, Any] | None:
    """The config narrowed by `layers_to_transform`, or None if that means something else."""
    wanted = config["target_modules"]
    kept_layers = {layers[name] for name in kept}
    if isinstance(wanted, str) or list_name is None or None in kept_layers:
        return None
    written = config.get("layers_pattern")
    given: list[str] = [written] if isinstance(written, str) else written or []
    if not all(_PLAIN.fullmatch(pattern) for pattern in given):
        return None  # PEFT would run it with `re`, which cannot be stopped
    change: dict[str, Any] = {
        # A name in full would pass by the layers.
        "target_modules": [name for name in wanted if name not in layers],
        "layers_to_transform": sorted(layer for layer in kept_layers if layer is not None),
    }
    for pattern in [given] if given else [[], [list_name]]:
        trial = LoraConfig(**change, layers_pattern=pattern)
        targeted = {name for name in layers if check_target_module_exists(trial, name)}
        if targeted == set(kept):
            if pattern != given:
                change["layers_pattern"] = pattern
            return dict(config) | change
    return None


def _used_patterns(patterns: Mapping[str, Any], names: Iterable[str], field: str) -> dict[str, Any]:
    """Those that match the end of a name, in PEFT's way; the others only make it warn."""
    deadline = time.monotonic() + TOTAL_TIMEOUT_S
    return {
        pattern: value
        for pattern, value in patterns.items()
        if _is_used(pattern, names, field, deadline)
    }


def _is_used(pattern: str, names: Iterable[str], field: str, deadline: float) -> bool:
    if any(f".{name}".endswith(f".{pattern}") for name in names):
        return True
    try:
        # As PEFT's `get_pattern_key` writes it.
        compiled = regex.compile(rf"(.*\.)?({pattern})$", cache_pattern=False)
        for name in names:
            if compiled.match(name, timeout=MATCH_TIMEOUT_S):
                return True
            if time.monotonic() > deadline:
                raise ValueError(f"{field}: its patterns take over {TOTAL_TIMEOUT_S} s in all")
    except TimeoutError as error:
        raise ValueError(
            f"{field}: {strict_json.shown(pattern)} takes over {MATCH_TIMEOUT_S} s on one name"
        ) from error
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{field}: {strict_json.shown(pattern)} is no usable pattern: {str(error)[:200]}"
        ) from error
    return False
