"""What a base model's files say of it: its layers, and its content's name. For who does not load it here.

`loader` makes the same name of the model that it has loaded.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from boundary.fingerprint import base_fingerprint
from server.errors import ModelError


def layers_of_files(model: str) -> int:
    """How many decoder layers a directory's or hub id's config says. Raises ModelError."""
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"no model could be read at {model!r}: {error}", param="model") from error
    num_layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if type(num_layers) is not int or num_layers < 1:
        raise ModelError(f"the config at {model!r} does not say how many layers there are")
    return num_layers


def revision_of_files(path: str) -> str:
    """`base_fingerprint` of a model that is not loaded: of each weight a few pages are read.

    path: a directory, or a hub id that is in the local cache or can be asked for.

    Raises ModelError where the files do not tell: weights that transformers renames, merges or
    computes while it loads them, and formats other than safetensors.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if not Path(path).is_dir():
            return base_fingerprint(path, config, ())
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"no model could be read at {path!r}: {error}", param="model") from error
    model.tie_weights()
    state = model.state_dict(keep_vars=True)
    files = _where_each_lies(Path(path))
    alias = {id(tensor): name for name, tensor in state.items() if name in files}
    return base_fingerprint(
        path,
        config,
        (
            (name, _stored(name, tensor, alias.get(id(tensor), name), files))
            for name, tensor in sorted(state.items())
        ),
    )


def _where_each_lies(directory: Path) -> dict[str, Path]:
    """Tensor -> file. Sharded or not: every safetensors file that the index, or its absence, names."""
    index = directory / "model.safetensors.index.json"
    try:
        if index.exists():
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            paths = [directory / Path(str(name)).name for name in sorted(set(named))]
        else:
            paths = [directory / "model.safetensors"]
        found: dict[str, Path] = {}
        for path in paths:
            with safe_open(path, framework="pt") as file:
                found.update(dict.fromkeys(file.keys(), path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ModelError(f"its safetensors files cannot be read: {error}") from error
    return found


def _stored(name: str, wanted: Tensor, stored_as: str, files: dict[str, Path]) -> Tensor:
    if stored_as not in files:
        raise ModelError(f"its files hold no tensor {name!r}: transformers makes it while loading")
    with safe_open(files[stored_as], framework="pt") as file:
        tensor: Tensor = file.get_tensor(stored_as)
    if tensor.shape != wanted.shape:
        raise ModelError(f"tensor {name!r} has another shape in its files than in the model")
    return tensor
