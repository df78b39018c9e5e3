"""A model that is built without the compiler is the same: every shape on the way, every number in the end."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.model import loader, meta_shapes
from tests.parity.zoo import BY_NAME, SERVED, save_model

LOADED = """
import json, sys
sys.modules["torchao"] = None  # as if it were not installed: transformers imports it, and it compiles
from server.model import waiting_compiler
assert waiting_compiler.wait()
from tests.model.test_meta_shapes import digest
for name in json.loads(sys.argv[1]):
    print(json.dumps([name, digest(name), waiting_compiler.is_waiting()]))
"""

CASES: dict[str, Callable[[], Tensor]] = {
    "integers": lambda: torch.arange(5, device="meta"),
    "floats": lambda: torch.arange(0, 1, 0.25, device="meta"),
    "of a dtype": lambda: torch.arange(0, 8, 2, dtype=torch.float64, device="meta"),
    "quotient": lambda: torch.arange(8, device="meta") / 4,
    "of floats": lambda: torch.empty(3, 2, dtype=torch.bfloat16, device="meta") / 4,
    "of a number": lambda: 1.0 / torch.arange(8, device="meta"),
    "power": lambda: torch.empty(3, 1, device="meta") ** torch.empty(4, device="meta"),
    "of a number, too": lambda: 10000.0 ** torch.arange(8, device="meta"),
    "drawn": lambda: torch.nn.init.normal_(torch.empty(2, 3, device="meta")),
    "drawn in place": lambda: torch.empty(2, 3, device="meta").normal_(0.0, 0.02),
    "transposed": lambda: torch.empty(2, 3, device="meta").t() / 2,
    "large": lambda: torch.empty(1 << 17, device="meta") / 2,
}


def digest(directory: str) -> str:
    """Of every parameter and buffer of the model that is loaded from there."""
    model = loader.load(directory, None, "cpu", "float32").model
    found = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        said = (name, tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)
        found.update(f"{said}{tensor.requires_grad}".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("name", CASES)
def test_shape_dtype_and_strides_are_torchs_own(name: str) -> None:
    expected = CASES[name]()
    with meta_shapes._Shapes():
        actual = CASES[name]()
    assert actual.is_meta
    assert actual.dtype is expected.dtype
    assert actual.shape == expected.shape
    assert actual.stride() == expected.stride()


def test_memory_for_what_is_on_the_meta_device_is_as_large() -> None:
    meta = torch.empty(3, 4, dtype=torch.bfloat16, device="meta")
    with meta_shapes._Shapes():
        made = torch.empty_like(meta, device="cpu")
        assert torch.empty_like(meta).is_meta
        assert torch.empty_like(torch.ones(2), device="meta").is_meta
    assert (made.dtype, made.shape, made.device.type) == (meta.dtype, meta.shape, "cpu")


def test_what_has_numbers_keeps_them() -> None:
    with meta_shapes._Shapes():
        assert torch.arange(3).tolist() == [0, 1, 2]
        assert (torch.ones(2) / 2).tolist() == [0.5, 0.5]
        assert (2.0 ** torch.ones(2)).tolist() == [2, 2]
        assert torch.nn.init.normal_(torch.zeros(64)).ne(0).all()
        assert torch.empty_like(torch.ones(2), device="cpu").shape == (2,)


def test_it_does_nothing_where_the_compiler_is_there() -> None:
    with meta_shapes.without_compiler():
        assert not torch.overrides._is_torch_function_mode_enabled()


def test_models_are_the_same_and_most_need_no_compiler(tmp_path: Path) -> None:
    names = [architecture.name for architecture in SERVED if architecture.name != "gpt_bigcode"]
    directories = []
    for name in [*names, "gpt_bigcode"]:  # the last: it needs the compiler
        (tmp_path / name).mkdir()
        directories.append(str(save_model(BY_NAME[name], tmp_path / name)))
    words = [sys.executable, "-c", LOADED, json.dumps(directories)]
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [name for name, _, is_waiting in found if not is_waiting] == directories[-1:]
    assert [(name, made) for name, made, _ in found] == [
        (directory, digest(directory)) for directory in directories
    ]
