"""Which modules of one base model can carry a LoRA, and which decoder layer each belongs to.

Built once per base model by the loader; read by `checkpoint` (does this tensor fit?) and `lora`
(where do the hooks go?). Knows the model's structure, no adapter and no request.

The decoder layers are found by structure, the one `nn.ModuleList` as long as the config's
`num_hidden_layers`, because their name differs: `model.layers`, `transformer.h`, `gpt_neox.layers`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from server.errors import ModelError

Kind = Literal["linear", "conv1d", "embedding", "lm_head"]


@dataclass(frozen=True, slots=True)
class Target:
    """One module that can carry a LoRA, y = module(x) + delta(x).

    `layer_idx` is -1 for the input embedding (any depth >= 1 reaches it) and `num_layers` for
    `lm_head` (only full depth does). `in_features` and `out_features` are those of the delta: for
    the embedding the number of embeddings and their width.
    """

    module: nn.Module
    layer_idx: int
    kind: Kind
    in_features: int
    out_features: int

    def weight(self) -> Tensor:
        """Dequantized weight, detached, on the module's device, as stored.

        [out_features, in_features]; Conv1D and embedding store [in_features, out_features].
        """
        weight = self.module.weight
        if isinstance(weight, Tensor) and type(weight) in (nn.Parameter, Tensor):
            return weight.detach()
        # Only a quantized base needs PEFT, whose import takes 10 MB.
        from peft.utils.integrations import dequantize_module_weight

        return dequantize_module_weight(self.module).detach()


class Targets(Mapping[str, Target]):
    """Module name -> `Target`, for every module of `model` that can carry a LoRA.

    Raises `ModelError` when the decoder layers cannot be told from the structure.
    """

    num_layers: int
    names: frozenset[str]  # every module of the model, targetable or not
    linear_names: frozenset[str]  # what PEFT's target_modules="all-linear" means here
    architecture: str
    is_tied: bool  # lm_head shares the embedding's weight

    def __init__(self, model: PreTrainedModel) -> None:
        self.architecture = type(model).__name__
        config = model.config.get_text_config()
        self.num_layers = config.num_hidden_layers
        self.is_tied = bool(getattr(config, "tie_word_embeddings", False))
        self._layers_name = _layers_name(model, self.num_layers)
        embedding = model.get_input_embeddings()
        lm_head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._targets: dict[str, Target] = {}
        names, linear_names = set(), set()
        for name, module in model.named_modules():
            names.add(name)
            if module is embedding and isinstance(module, nn.Embedding):
                features = module.num_embeddings, module.embedding_dim
                self._targets[name] = Target(module, -1, "embedding", *features)
            elif module is lm_head and isinstance(module, nn.Linear):
                features = module.in_features, module.out_features
                self._targets[name] = Target(module, self.num_layers, "lm_head", *features)
            elif isinstance(module, nn.Linear | Conv1D):
                linear_names.add(name)
                layer_idx = self._layer_idx(name)
                if layer_idx is None or _is_routed(name):
                    continue
                if isinstance(module, nn.Linear):
                    features = module.in_features, module.out_features
                    self._targets[name] = Target(module, layer_idx, "linear", *features)
                else:
                    features = module.nx, module.nf
                    self._targets[name] = Target(module, layer_idx, "conv1d", *features)
        self.names = frozenset(names - {""})
        self.linear_names = frozenset(linear_names)

    def __getitem__(self, name: str) -> Target:
        return self._targets[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)

    def why_not(self, name: str) -> str:
        """Say why `name` is no target, to end a sentence that begins with the module."""
        if _is_routed(name):
            return (
                "which lies among routed experts: they see only the tokens routed to them, "
                "so a LoRA there is not served"
            )
        if name not in self.names:
            return (
                f"which the base model ({self.architecture}, {self.num_layers} layers) does not "
                "have: the adapter was made for another base"
            )
        if name in self.linear_names:
            return "which lies outside the decoder layers, where no depth reaches it"
        return "which is not a Linear, Conv1D, input embedding or lm_head, so it carries no LoRA"

    def _layer_idx(self, name: str) -> int | None:
        prefix, _, rest = name.partition(f"{self._layers_name}.")
        return int(rest.split(".")[0]) if rest and not prefix else None


def _layers_name(model: PreTrainedModel, num_layers: int) -> str:
    found: list[str] = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num_layers
        and all(any(isinstance(m, nn.Linear | Conv1D) for m in layer.modules()) for layer in module)
    ]
    outermost = [name for name in found if not any(name.startswith(f"{o}.") for o in found)]
    if len(outermost) != 1:
        raise ModelError(
            f"{type(model).__name__}: expected one list of {num_layers} decoder layers, found "
            f"{len(outermost)} {outermost}; depth would have no meaning"
        )
    return outermost[0]


def _is_routed(name: str) -> bool:
    return "experts" in name.split(".")
