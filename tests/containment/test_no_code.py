"""Nothing that is read can run: no pickle, no code beside a model, no template that reaches out.

First by the source, where every reader that could run something would have to be written; then by
payloads that do run when they are read carelessly, which each control shows.
"""

import ast
import json
import pickle
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from server.errors import AdapterError, BadRequest, ModelError
from server.model import loader
from server.model.checkpoint import read_checkpoint
from tests.model.hostile import PICKLE, WEIGHTS
from tests.test_house import ROOT, imported, is_within, plant, sources
from tests.tiny import Tiny

CODE_READERS = (
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
)
CODE_CALLS = ("eval", "exec", "compile", "__import__", "torch.load", "torch.hub.load", "yaml.load")


OWN_TEXT = {("server/model/replay/triton_chain.py", call) for call in ("compile", "exec")}
"""Runs what `kernel_text` has written of sizes, strides and numbers: it holds no text that was read."""


def code_readers(root: Path) -> set[str]:
    """Places in the source that could run what they read."""
    found = set()
    for path, tree in sources(root):
        for module in CODE_READERS:
            if any(is_within(name, module) for name in imported(path, tree)):
                found.add(f"{path} imports {module}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (path, ast.unparse(node.func)) not in OWN_TEXT:
                found |= {f"{path}:{node.lineno} {why}" for why in _faults(node)}
    return found


def _faults(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    said = {each.arg: ast.unparse(each.value) for each in call.keywords}
    if name in CODE_CALLS:
        yield f"calls {name}"
    if "allow_pickle" in said or name in ("np.load", "numpy.load"):
        yield "may read a pickle"
    if said.get("trust_remote_code", "False") != "False":
        yield "trusts remote code"
    if name.endswith(".from_pretrained") and name.startswith("Auto"):
        if "trust_remote_code" not in said:
            yield f"{name} does not refuse remote code"
        if name.startswith("AutoModel") and said.get("use_safetensors") != "True":
            yield f"{name} may read a pickle"


def test_no_line_of_the_source_runs_what_it_reads() -> None:
    assert code_readers(ROOT) == set()


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load('x', weights_only=True)",
        "eval('1')",
        "np.load('x')",
        "AutoConfig.from_pretrained('x')",
        "AutoTokenizer.from_pretrained('x', trust_remote_code=True)",
        "AutoModelForCausalLM.from_pretrained('x', trust_remote_code=False)",
    ],
)
def test_a_line_that_would_is_found(tmp_path: Path, line: str) -> None:
    assert code_readers(plant(tmp_path, [("server/a.py", line), ("boundary/b.py", "x.eval()")]))


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> Any:
        return (Path.touch, (self.sign,))


@pytest.fixture
def sign(tmp_path: Path) -> Path:
    return tmp_path / "somebody was here"


@pytest.fixture
def directory(model: Tiny, tmp_path: Path) -> Path:
    """A copy of a model that is served."""
    return Path(shutil.copytree(model.model_path, tmp_path / "model"))


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def plant_code(directory: Path, sign: Path) -> None:
    classes = ("Config", "Model", "Fast")
    code = f"import pathlib\npathlib.Path({str(sign)!r}).touch()\n"
    (directory / "evil.py").write_text(code + "".join(f"class {name}: pass\n" for name in classes))
    edit(
        directory / "config.json",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    edit(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Fast"]})


def load(directory: Path) -> loader.LoadedModel:
    return loader.load(str(directory), None, "cpu", "float32")


def test_code_beside_a_model_of_a_known_kind_is_left_alone(directory: Path, sign: Path) -> None:
    plant_code(directory, sign)
    assert type(load(directory).model).__module__.startswith("transformers.")
    assert not sign.exists()
    runpy.run_path(str(directory / "evil.py"))  # the control
    assert sign.exists()


def test_a_model_that_is_nothing_without_its_code_is_refused(directory: Path, sign: Path) -> None:
    plant_code(directory, sign)
    edit(directory / "config.json", model_type="evil")
    with pytest.raises(ModelError, match=r"trust_remote_code|evil"):
        load(directory)
    assert not sign.exists()


def test_a_pickled_model_is_refused(directory: Path, sign: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Payload(sign)}, directory / "pytorch_model.bin")
    with pytest.raises(ModelError):
        load(directory)
    assert not sign.exists()
    torch.load(directory / "pytorch_model.bin", weights_only=False)  # the control
    assert sign.exists()


@pytest.mark.parametrize("name", [PICKLE, WEIGHTS])
def test_a_pickled_adapter_is_refused(model: Tiny, tmp_path: Path, sign: Path, name: str) -> None:
    path = Path(shutil.copytree(model.adapter("tuned"), tmp_path / "adapter"))
    (path / WEIGHTS).unlink()
    (path / name).write_bytes(pickle.dumps(Payload(sign)))
    with pytest.raises(AdapterError):
        read_checkpoint(path, model.targets)
    assert not sign.exists()
    pickle.loads((path / name).read_bytes())  # the control
    assert sign.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_reaches_nothing_and_ends(model: Tiny, template: str) -> None:
    from server.api.chat_template import render
    from server.api.messages import Message

    tokenizer = model.base.tokenizer
    before = tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        with pytest.raises(BadRequest):
            render(tokenizer, [Message(role="user", content="hi")], None)
    finally:
        tokenizer.chat_template = before
