"""What a name means on the disk: which depth, which cut of which content, and why not.

The cuts' own numbers are `boundary.export`'s, and are held against PEFT by its tests; through a real
vLLM they are by `make test-vllm`.
"""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from boundary.record import FILE_NAME, BoundaryRecord, write
from server.errors import AdapterError, BadRequest, NotFound
from server.model import content_digest as digests
from server.model.checkpoint import read_checkpoint
from server.vllm.adapter_root import AdapterRoot
from server.vllm.base import Base
from server.vllm.cut_cache import CutCache
from server.vllm.cutter import Answer, Cutter
from server.vllm.model_name import Asked, Depth
from tests.parity.zoo import NUM_LAYERS
from tests.tiny import Tiny

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def root(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.adapter_root, tmp_path / "adapters"))


@pytest.fixture
def cutter(root: Path, tmp_path: Path) -> Cutter:
    (tmp_path / "cache").mkdir()
    return Cutter(AdapterRoot(root), CutCache(tmp_path / "cache", 1 << 30), "auto")


@pytest.fixture
def base(tiny: Tiny) -> Base:
    return Base(str(tiny.model_path))


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING, "vllm.fathom"):
        yield caplog


def layers(answer: Answer) -> set[int]:
    """Those with LoRA in the cut."""
    names = load_file(answer.cut.path / WEIGHTS)
    return {int(name.split(".layers.")[1].split(".")[0]) for name in names}


def pin(tiny: Tiny, adapter: Path, depth: int, **fields: object) -> None:
    made = BoundaryRecord.pinned(
        depth,
        NUM_LAYERS,
        "for a test",
        base=tiny.base.revision,
        adapter=read_checkpoint(adapter, tiny.targets).digest,
    )
    write(made.model_copy(update=fields), adapter / FILE_NAME)


@pytest.mark.parametrize("depth", range(1, NUM_LAYERS + 1))
def test_a_depth_has_the_layers_below_it(cutter: Cutter, base: Base, depth: int) -> None:
    answer = cutter.answer(Asked("a", depth), base)
    assert (answer.depth, answer.num_layers) == (depth, NUM_LAYERS)
    assert layers(answer) == set(range(depth))


def test_depth_0_adds_nothing(cutter: Cutter, base: Base, root: Path) -> None:
    tensors = load_file(cutter.answer(Asked("a", 0), base).cut.path / WEIGHTS)
    added = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    assert added
    assert not any(tensor.any() for tensor in added)
    assert any(t.any() for n, t in load_file(root / "a" / WEIGHTS).items() if "lora_B" in n)


def test_depths_of_one_effect_are_one_cut(cutter: Cutter, base: Base) -> None:
    """`shallow` has LoRA in layers 0 and 2."""
    names = [cutter.answer(Asked("shallow", depth), base).cut.path.name for depth in range(5)]
    suffixes = [name.rpartition("-")[2] for name in names]
    assert suffixes == ["0", "1", "1", "whole", "whole"]
    assert len({name.rpartition("-")[0] for name in names}) == 1


@pytest.mark.parametrize("depth", [NUM_LAYERS, "full", None])
def test_the_whole_adapter_is_its_files_byte_for_byte(
    cutter: Cutter, base: Base, root: Path, depth: Depth | None
) -> None:
    cut = cutter.answer(Asked("a", depth), base).cut
    assert (cut.path / WEIGHTS).read_bytes() == (root / "a" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("asked", [None, "auto"])
def test_auto_is_the_records_depth(
    tiny: Tiny, cutter: Cutter, base: Base, root: Path, asked: Depth | None
) -> None:
    pin(tiny, root / "a", 3)
    assert cutter.answer(Asked("a", asked), base).depth == 3
    assert cutter.answer(Asked("a", "full"), base).depth == NUM_LAYERS
    assert cutter.answer(Asked("a", 1), base).depth == 1


def test_the_default_may_be_full(tiny: Tiny, base: Base, root: Path, tmp_path: Path) -> None:
    pin(tiny, root / "a", 3)
    cutter = Cutter(AdapterRoot(root), CutCache(tmp_path, 1 << 30), "full")
    assert cutter.answer(Asked("a", None), base).depth == NUM_LAYERS
    assert cutter.answer(Asked("a", "auto"), base).depth == 3


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"base_fingerprint": "sha256:another"}, "made for base model"),
        ({"adapter_fingerprint": "sha256:another"}, "made for adapter content"),
        ({"num_layers": 9}, "made for 9 layers"),
    ],
)
def test_a_record_of_something_else_is_not_applied(
    tiny: Tiny,
    cutter: Cutter,
    base: Base,
    root: Path,
    warnings: pytest.LogCaptureFixture,
    fields: dict[str, object],
    why: str,
) -> None:
    pin(tiny, root / "a", 3, **fields)
    assert cutter.answer(Asked("a", "auto"), base).depth == NUM_LAYERS
    assert why in warnings.text


def test_a_record_outside_the_root_is_not_applied(
    tiny: Tiny,
    cutter: Cutter,
    base: Base,
    root: Path,
    tmp_path: Path,
    warnings: pytest.LogCaptureFixture,
) -> None:
    pin(tiny, root / "a", 3)
    (root / "a" / FILE_NAME).rename(tmp_path / FILE_NAME)
    (root / "a" / FILE_NAME).symlink_to(tmp_path / FILE_NAME)
    assert cutter.answer(Asked("a", "auto"), base).depth == NUM_LAYERS
    assert "leads out of the root" in warnings.text


def test_an_unchanged_adapter_is_read_once(
    cutter: Cutter, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cutter.answer(Asked("a", 2), base)
    monkeypatch.setattr(AdapterRoot, "copy", lambda *_: pytest.fail("it was read again"))
    assert cutter.answer(Asked("a", 2), base).cut.path == first.cut.path
    assert cutter.answer(Asked("a", 1), base).cut.path != first.cut.path


def test_a_changed_adapter_has_another_cut_and_the_old_one_stays_while_it_is_held(
    cutter: Cutter, base: Base, root: Path
) -> None:
    first = cutter.answer(Asked("a", 2), base)
    before = (first.cut.path / WEIGHTS).read_bytes()
    tensors = load_file(root / "a" / WEIGHTS)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, root / "a" / WEIGHTS)
    assert cutter.signature(first) != first.signature
    second = cutter.answer(Asked("a", 2), base)
    assert second.cut.path != first.cut.path
    assert (first.cut.path / WEIGHTS).read_bytes() == before
    for name, tensor in load_file(second.cut.path / WEIGHTS).items():
        assert torch.equal(tensor, tensors[name] * 2)


def test_what_is_asked_for_in_vain(cutter: Cutter, base: Base, root: Path) -> None:
    with pytest.raises(NotFound):
        cutter.answer(Asked("nobody", 2), base)
    with pytest.raises(BadRequest, match=r"from 0 to 4 .*got 5"):
        cutter.answer(Asked("a", 5), base)
    (root / "a" / WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(AdapterError, match="cannot be read"):
        cutter.answer(Asked("a", 2), base)


def test_an_adapter_of_a_deeper_base_is_refused(cutter: Cutter, base: Base, root: Path) -> None:
    tensors = load_file(root / "a" / WEIGHTS)
    moved = {name.replace(".layers.3.", ".layers.7."): t for name, t in tensors.items()}
    save_file(moved, root / "a" / WEIGHTS)
    with pytest.raises(AdapterError, match="made for another base"):
        cutter.answer(Asked("a", 2), base)


@pytest.mark.parametrize("name", ["a", "b", "c", "shallow"])
def test_content_has_the_same_name_without_a_base(tiny: Tiny, name: str) -> None:
    whole = read_checkpoint(tiny.adapter(name), tiny.targets).digest
    assert digests.content_digest(tiny.adapter(name)) == whole
