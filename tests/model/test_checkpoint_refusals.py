"""Whatever is wrong with a checkpoint, reading it raises `AdapterError` and names the culprit."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from server.errors import AdapterError
from server.model.checkpoint import read_checkpoint
from server.model.tensor_file import TensorFile
from tests.model import hostile
from tests.model.peft_checkpoints import save_adapter, targets_of


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good")
    save_adapter("llama", path, target_modules=["q_proj"])
    return path


def _refusal(path: Path, base: str = "llama") -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(AdapterError) as refusal:
            read_checkpoint(path, targets_of(base))
    refusal.value.message.encode()  # it will be sent as UTF-8
    assert len(refusal.value.message) < 1500
    return refusal.value.message


def test_the_checkpoint_that_the_cases_spoil_is_good(good: Path) -> None:
    assert len(read_checkpoint(good, targets_of("llama")).modules) == 3


@pytest.mark.parametrize("name", hostile.CASES)
def test_a_spoiled_checkpoint_is_refused_by_name(name: str, good: Path, tmp_path: Path) -> None:
    case = hostile.CASES[name]
    path = shutil.copytree(good, tmp_path / "adapter")
    case.spoil(path)
    message = _refusal(path)
    assert all(culprit in message for culprit in case.culprits), message


@pytest.mark.parametrize("path", ["nowhere", "good\0bad", "x" * 5000, "adapter_config.json"])
def test_a_path_that_is_no_directory_is_refused(path: str, good: Path) -> None:
    assert "adapter_config.json" in _refusal(good / path)


def test_an_adapter_of_another_architecture_is_refused(good: Path) -> None:
    message = _refusal(good, "gpt2")
    assert hostile.A0 in message
    assert "GPT2LMHeadModel" in message


def test_an_adapter_of_a_wider_base_is_refused(tmp_path: Path) -> None:
    save_adapter("llama", tmp_path, target_modules=["v_proj"])
    hostile.named_tensors(
        {"base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight": torch.ones(16, 2)}
    )(tmp_path)
    message = _refusal(tmp_path)
    assert "v_proj.lora_B.weight" in message
    assert "16 -> 8" in message


def test_lora_on_expert_parameters_is_refused(tmp_path: Path) -> None:
    save_adapter("mixtral", tmp_path, target_modules="all-linear")
    assert "target_parameters" in _refusal(tmp_path, "mixtral")


def test_dora_over_a_row_without_length_is_refused(tmp_path: Path) -> None:
    save_adapter("llama", tmp_path, target_modules=["q_proj"], use_dora=True)
    weight = targets_of("llama")["model.layers.0.self_attn.q_proj"].weight()
    # B A that undoes row 0 of W exactly: A holds the row, scaling is 3.
    lora_A, lora_B = torch.zeros(2, 16), torch.zeros(16, 2)
    lora_A[0], lora_B[0, 0] = -weight[0], 1.0
    hostile.both(hostile.config(lora_alpha=2), hostile.tensors(A0=lora_A, B0=lora_B))(tmp_path)
    message = _refusal(tmp_path)
    assert "layers.0.self_attn.q_proj.lora_magnitude_vector" in message


def test_a_trained_embedding_beside_its_lora_is_refused(tmp_path: Path) -> None:
    save_adapter("llama", tmp_path, target_modules=["embed_tokens"])
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    stored = load_file(tmp_path / hostile.WEIGHTS)
    assert name in stored  # PEFT saves the base's own, which is accepted
    hostile.named_tensors({name: stored[name] + 0.01})(tmp_path)
    assert name in _refusal(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "shrinking.safetensors"
    path.write_bytes(save({"a": torch.ones(100_000)}))  # more than is read ahead
    with TensorFile(path) as file:
        with path.open("r+b") as other:
            other.truncate(200_000)
        with pytest.raises(AdapterError, match=r"'a' is cut off: .* shrank"):
            file.read("a")


# --- fuzzing, with safetensors' own reader as the judge -------------------------------------------

_SMALL = save({"a": torch.ones(2, 3), "b": torch.full((4,), 2.0, dtype=torch.bfloat16)})
_FUZZ = settings(
    max_examples=120,  # 4000 were tried when this was written
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the file is written anew
)


def _agrees_with_safetensors(path: Path) -> None:
    """The file is refused, or both readers read the same finite tensors."""
    try:
        with TensorFile(path) as file:
            ours = {name: file.read(name) for name in file.entries}
    except AdapterError:
        return
    try:
        theirs = load_file(path)
    except SafetensorError as error:
        pytest.fail(f"accepted what safetensors refuses: {error}")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@_FUZZ
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(_SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=4
    )
)
def test_fuzzed_bytes_are_refused_or_read_as_safetensors_reads_them(
    edits: list[tuple[int, int]], tmp_path: Path
) -> None:
    data = bytearray(_SMALL)
    for position, byte in edits:
        data[position] = byte
    path = tmp_path / "fuzzed.safetensors"
    path.write_bytes(data)
    _agrees_with_safetensors(path)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), inner)
    ),
    max_leaves=6,
)
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", "f32"]) | _JSON,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | _JSON,
        "data_offsets": st.lists(st.integers(-1, 32), min_size=2, max_size=2) | _JSON,
    }
)


@_FUZZ
@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b", "", "__metadata__"]), _ENTRY | _JSON, max_size=3
    ),
    num_bytes=st.integers(0, 40),
)
def test_fuzzed_headers_are_refused_or_read_as_safetensors_reads_them(
    header: dict[str, object], num_bytes: int, tmp_path: Path
) -> None:
    path = tmp_path / "fuzzed.safetensors"
    path.write_bytes(hostile.with_header(json.dumps(header).encode(), b"\0" * num_bytes))
    _agrees_with_safetensors(path)


@_FUZZ
@given(
    fields=st.dictionaries(
        st.sampled_from(
            [
                *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora"),
                *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
                *("bias", "task_type", "init_lora_weights", "modules_to_save", "use_newlora"),
            ]
        ),
        _JSON,
        max_size=3,
    )
)
def test_fuzzed_configs_are_read_or_refused(
    fields: dict[str, object], good: Path, tmp_path: Path
) -> None:
    path = tmp_path / "adapter"
    shutil.copytree(good, path, dirs_exist_ok=True)
    hostile.config(**fields)(path)
    try:
        read_checkpoint(path, targets_of("llama"))
    except AdapterError as refusal:
        refusal.message.encode()
