"""What a PEFT `adapter_config.json` says: which modules, which rank, which scaling; or why not.

Deny by default. A field is one of three: reproduced (`_Reproduced`: its value reaches the
forward pass), harmless (`HARMLESS`: training, bookkeeping), or anything else, which must be off, so
that a variant this server has never heard of is refused rather than ignored.

Everything here restates PEFT (`LoraConfig` and its rules on which fields go together,
`check_target_module_exists`, `get_pattern_key`), and tests hold it against PEFT. Importing PEFT for
it would cost every server 10 MB; its reader trusts the file's bytes, and its matching runs patterns
that backtrack for ever, which `PatternMatcher` stops.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, FiniteFloat, PositiveInt, ValidationError

from boundary.checkpoint_files import CONFIG_NAME, MAX_CONFIG_BYTES
from server.errors import AdapterError
from server.model.patterns import PatternMatcher
from server.model.targets import Targets
from server.model.tensor_file import open_regular, parse_object, shown

MAX_SCALING = 1e30  # finite in bfloat16 and float32 with room for the product

HARMLESS = frozenset(
    {
        "auto_mapping",
        "corda_config",  # these three configure an init_lora_weights, which is judged itself
        "eva_config",
        "lora_ga_config",
        "fan_in_fan_out",  # PEFT corrects it by the base module's type, and so does Target.kind
        "inference_mode",
        "loftq_config",
        "lora_dropout",  # training only
        "megatron_core",
        "peft_version",
        "qalora_group_size",  # of use_qalora, which is refused
        "revision",
        "runtime_config",
    }
)

# Why a field that is on is refused; a field named nowhere is refused as unknown.
REFUSALS = {
    "alora_invocation_tokens": "aLoRA switches the adapter on in the middle of a sequence",
    "arrow_config": "Arrow routes between adapters",
    "kasa_config": "KaSA truncates the base weights and adds a diagonal between A and B",
    "layer_replication": "it repeats layers of the base model, so depth has no meaning",
    "megatron_config": "Megatron's parallel linear layers are not served",
    "modules_to_save": "whole modules of the base are replaced, which is no LoRA",
    "monteclora_config": "MonteCLoRA perturbs the weights by sampling",
    "target_parameters": "LoRA on bare parameters (routed experts) is not served",
    "trainable_token_indices": "it replaces rows of the embedding, which is no LoRA",
    "use_bdlora": "BD-LoRA stores block-diagonal factors",
    "use_qalora": "QA-LoRA pools the inputs of A",
    "velora_config": "VeLoRA stores a projection this server does not read",
}

# init_lora_weights that leave the base model as it was. The others move part of each base weight
# into the adapter (or, LoftQ, into a quantized base).
PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})


# What pydantic cannot say about a field it finds wrong.
REASONS = {
    "peft_type": "only LoRA is served",
    "task_type": "only adapters of causal language models are served",
    "bias": "it changes biases of the base model, which is no LoRA",
    "target_modules": "it must say which modules carry the LoRA",
}


class _Reproduced(BaseModel):
    """The fields that reach the forward pass, typed strictly; PEFT's defaults."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    bias: Literal["none"] = "none"
    base_model_name_or_path: str | None = None
    init_lora_weights: bool | str = True
    r: PositiveInt = 8
    lora_alpha: FiniteFloat = 8.0
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, FiniteFloat] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    target_modules: str | list[str]
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    ensure_weight_tying: bool = False


class AdapterConfig:
    """A validated `adapter_config.json`.

    Every method and the constructor raise `AdapterError`, whose message names the field.
    """

    base_model: str | None
    use_dora: bool
    use_rslora: bool
    lora_bias: bool

    def __init__(self, raw: dict[str, Any]) -> None:
        fields = _validated(raw)
        _refuse_contradictions(fields)
        _refuse_variants(raw)
        _refuse_changed_base(fields.init_lora_weights)
        self._fields = fields
        self._matcher = PatternMatcher()
        self.base_model = fields.base_model_name_or_path
        self.use_dora = fields.use_dora
        self.use_rslora = fields.use_rslora
        self.lora_bias = fields.lora_bias

    @classmethod
    def read(cls, directory: Path, root: Path | None = None) -> Self:
        """Read the file of at most `MAX_CONFIG_BYTES` in `directory`, which lies below `root`."""
        file, size = open_regular(directory / CONFIG_NAME, root)
        with file:
            if size > MAX_CONFIG_BYTES:
                raise _refusal(f"{size} bytes are over the limit of {MAX_CONFIG_BYTES}")
            try:
                data = file.read(MAX_CONFIG_BYTES)
            except OSError as error:
                raise _refusal(f"cannot be read: {error.strerror}") from error
        return cls(parse_object(data, CONFIG_NAME))

    def targeted(self, targets: Targets) -> set[str]:
        """Names of all modules of the base that the config gives a LoRA, by PEFT's rules."""
        fields, wanted = self._fields, self._fields.target_modules
        if isinstance(wanted, str):
            if wanted.lower() == "all-linear":
                names = set(targets.linear_names)
            else:
                names = {
                    name
                    for name in targets.names
                    if self._matcher.fullmatch(wanted, name, "target_modules")
                }
        else:
            listed = frozenset(wanted)
            names = {
                name
                for name in targets.names
                if name in listed or (_ends_in(name, listed) and self._is_transformed(name))
            }
        exclude = fields.exclude_modules
        if isinstance(exclude, str) and exclude:
            names = {n for n in names if not self._matcher.fullmatch(exclude, n, "exclude_modules")}
        elif exclude:
            excluded = frozenset(exclude)
            names = {n for n in names if not _ends_in(n, excluded)}
        if fields.ensure_weight_tying and targets.is_tied:
            tied = {n for n, target in targets.items() if target.kind in ("embedding", "lm_head")}
            if names & tied:
                names |= tied
        return names

    def rank(self, name: str) -> int:
        """Rank of module `name`."""
        ranks = self._fields.rank_pattern or {}
        return ranks.get(self._pattern_of(name, ranks, "rank_pattern"), self._fields.r)

    def scaling(self, name: str, rank: int) -> float:
        """Factor of B A in module `name`: alpha / rank, with rsLoRA alpha / sqrt(rank)."""
        alphas = self._fields.alpha_pattern or {}
        pattern = self._pattern_of(name, alphas, "alpha_pattern")
        alpha = alphas.get(pattern, self._fields.lora_alpha)
        scaling = alpha / (math.sqrt(rank) if self.use_rslora else rank)
        if abs(scaling) > MAX_SCALING:
            field = "alpha_pattern" if pattern in alphas else "lora_alpha"
            raise _refusal(
                f"{field} {alpha} gives {name!r} the scaling {scaling}, over {MAX_SCALING}"
            )
        return scaling

    def _pattern_of(self, name: str, patterns: Iterable[str], field: str) -> str:
        """First pattern that matches the end of `name`, or `name`: PEFT's `get_pattern_key`."""
        for pattern in patterns:
            if self._matcher.ends(pattern, name, field):
                return pattern
        return name

    def _is_transformed(self, name: str) -> bool:
        layers = self._fields.layers_to_transform
        if layers is None or layers == []:
            return True
        layer_idx = self._layer_idx(name)
        return layer_idx == layers if isinstance(layers, int) else layer_idx in layers

    def _layer_idx(self, name: str) -> int | None:
        patterns = self._fields.layers_pattern
        if not patterns:
            patterns = [r"[^.]*"]
            prefix = r".*?\."
        else:
            patterns = [patterns] if isinstance(patterns, str) else patterns
            prefix = r"(?:^|.*?\.)"
        for pattern in patterns:
            found = self._matcher.match(
                rf"{prefix}{pattern}\.(?P<idx>\d+)\.", name, "layers_pattern"
            )
            if found:
                return int(found["idx"])
        return None


def _validated(raw: dict[str, Any]) -> _Reproduced:
    try:
        fields = _Reproduced(**raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = str(first["loc"][0])
        given = "" if first["type"] == "missing" else f", given {shown(raw[field])}"
        why = f": {REASONS[field]}" if field in REASONS else ""
        raise _refusal(f"{field}: {first['msg']}{given}{why}") from error
    return fields


def _refuse_contradictions(fields: _Reproduced) -> None:
    """PEFT's rules on which fields go together, in `LoraConfig.__post_init__`."""
    if isinstance(fields.target_modules, str):
        for field in ("layers_to_transform", "layers_pattern"):
            if getattr(fields, field) is not None:
                raise _refusal(f"{field} cannot be used when target_modules is a string")
    if fields.layers_pattern and fields.layers_to_transform is None:
        raise _refusal("layers_pattern needs layers_to_transform")
    if fields.lora_bias and fields.use_dora:
        raise _refusal("lora_bias cannot be used with use_dora")


def _refuse_variants(raw: dict[str, Any]) -> None:
    for field, value in raw.items():
        if field in _Reproduced.model_fields or field in HARMLESS:
            continue
        if not value:  # off, which is PEFT's default of every field that is left
            continue
        why = REFUSALS.get(field, "this server does not know what it changes")
        raise _refusal(f"{shown(field)} is {shown(value)}: {why}")


def _refuse_changed_base(init: bool | str) -> None:
    if isinstance(init, bool) or init.lower() in PLAIN_INITS:
        return
    if init == "loftq":
        raise _refusal(
            "init_lora_weights is 'loftq': it was trained over a base model that LoftQ quantized, "
            "not over this one"
        )
    raise _refusal(
        f"init_lora_weights is {shown(init)}: it may have moved part of each base weight into the "
        "adapter, which is then wrong on the plain base. Convert it while training's initial "
        "adapter is at hand, with save_pretrained(..., path_initial_model_for_weight_conversion="
        "...): a converted checkpoint says init_lora_weights: true"
    )


def _ends_in(name: str, endings: frozenset[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[i:]) in endings for i in range(len(parts)))


def _refusal(message: str) -> AdapterError:
    return AdapterError(f"{CONFIG_NAME}: {message}")
