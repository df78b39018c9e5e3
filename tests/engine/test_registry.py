"""Names to adapters: what can be asked for, what is refused, and what identity a reading gets."""

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from boundary.record import FILE_NAME, BoundaryRecord, write
from server.engine import registry as registry_module
from server.engine.registry import AdapterRegistry
from server.engine.request import CalibratedDepth
from server.errors import AdapterError, BadRequest, Conflict, FathomError, NotFound
from server.model.checkpoint import LoraCheckpoint, module_kinds, read_checkpoint
from server.model.tensor_file import TensorFile
from tests.parity.zoo import NUM_LAYERS
from tests.tiny import BASE_NAME, Tiny

LIMIT_S = 60
REVISION = "sha256:0123456789abcdef"


def make_registry(tiny: Tiny, **settings: Any) -> AdapterRegistry:
    return AdapterRegistry(tiny.targets, base_name=BASE_NAME, base_revision=REVISION, **settings)


def names(registry: AdapterRegistry) -> list[str]:
    return [ref.name for ref in registry.loaded()]


# ---------------------------------------------------------------- loading


def test_a_reading_says_what_the_checkpoint_is(tiny: Tiny) -> None:
    registry = make_registry(tiny)
    ref = registry.load("x", tiny.adapter("shallow"))
    checkpoint = read_checkpoint(tiny.adapter("shallow"), tiny.targets)
    assert isinstance(ref.content, LoraCheckpoint)
    assert (ref.name, ref.digest, ref.rank) == ("x", checkpoint.digest, checkpoint.rank)
    assert (ref.max_depth, ref.num_bytes) == (3, checkpoint.num_bytes)
    assert (ref.modules, ref.layers) == (module_kinds(checkpoint.modules), (0, 2))
    assert ref.path == str(tiny.adapter("shallow"))
    assert registry.find("x") is ref


def test_a_reload_is_a_new_identity_and_only_on_request(tiny: Tiny) -> None:
    registry = make_registry(tiny)
    old = registry.load("x", tiny.adapter("a"))
    with pytest.raises(Conflict, match="'x' is loaded already"):
        registry.load("x", tiny.adapter("b"))
    assert registry.find("x") is old
    new = registry.load("x", tiny.adapter("b"), replace=True)
    assert registry.find("x") is new
    assert new.uid != old.uid
    assert new.digest != old.digest
    again = registry.load("x", tiny.adapter("b"), replace=True)
    assert (again.uid != new.uid, again.digest == new.digest) == (True, True)


@pytest.mark.parametrize(
    ("path", "error"), [("nowhere", NotFound), ("empty", AdapterError), ("a", AdapterError)]
)
def test_what_is_refused_changes_nothing(
    tiny: Tiny, tmp_path: Path, path: str, error: type[FathomError]
) -> None:
    """`a` is a good adapter of rank 4, over this registry's limit."""
    (tmp_path / "empty").mkdir()
    shutil.copytree(tiny.adapter("a"), tmp_path / "a")
    registry = make_registry(tiny, max_lora_rank=4)
    old = registry.load("x", tiny.adapter("a"))
    registry._max_lora_rank = 3
    with pytest.raises(error):
        registry.load("y", tmp_path / path)
    with pytest.raises(error):
        registry.load("x", tmp_path / path, replace=True)
    assert registry.loaded() == [old]
    with pytest.raises(NotFound):
        registry.unload("y")


@pytest.mark.parametrize(
    "name", ["", ".hidden", "a/b", "a\\b", "a@2", "a:b", "line\nbreak", "x" * 257]
)
def test_a_name_must_be_one_that_can_be_asked_for(tiny: Tiny, name: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        make_registry(tiny).load(name, tiny.adapter("a"))
    assert refusal.value.param == "lora_name"


def test_the_base_models_name_is_taken(tiny: Tiny) -> None:
    with pytest.raises(Conflict, match="base model"):
        make_registry(tiny).load(BASE_NAME, tiny.adapter("a"))


def test_unloading_forgets_the_name(tiny: Tiny) -> None:
    registry = make_registry(tiny)
    registry.load("x", tiny.adapter("a"))
    registry.unload("x")
    assert registry.find("x") is None
    with pytest.raises(NotFound):
        registry.unload("x")
    with pytest.raises(NotFound):
        registry.fetch("x")
    registry.load("x", tiny.adapter("b"))


# ---------------------------------------------------------------- a client's paths


def test_a_client_names_what_lies_below_the_root(tiny: Tiny) -> None:
    registry = make_registry(tiny, adapter_root=tiny.adapter_root)
    for path in (Path("a"), Path("./a"), tiny.adapter("a")):
        ref = registry.load_confined("x", path, replace=True)
        assert ref.path == str(tiny.adapter("a").resolve())
    with pytest.raises(Conflict):
        registry.load_confined("x", Path("b"))
    with pytest.raises(NotFound):
        registry.load_confined("y", Path("nowhere"))


@pytest.mark.parametrize("path", ["../model", "/", "{outside}", "a\x00", "a/../a"])
def test_a_client_names_nothing_else(tiny: Tiny, tmp_path: Path, path: str) -> None:
    shutil.copytree(tiny.adapter("a"), tmp_path / "outside")
    registry = make_registry(tiny, adapter_root=tiny.adapter_root)
    with pytest.raises(BadRequest) as refusal:
        registry.load_confined("x", Path(path.format(outside=tmp_path / "outside")))
    assert (refusal.value.param, refusal.value.code) == ("lora_path", "bad_adapter_path")
    assert registry.known() == []
    registry.load("x", tmp_path / "outside")  # the control: the operator may


def test_without_a_root_a_client_names_nothing_but_what_the_operator_did(
    tiny: Tiny, tmp_path: Path
) -> None:
    registry = make_registry(tiny)
    with pytest.raises(BadRequest, match="no --adapter-root"):
        registry.load_confined("x", tiny.adapter("a"))
    registry.load("x", tiny.adapter("a"))
    registry.register("y", tiny.adapter("b"))
    for name, path in (("x", tiny.adapter("a")), ("y", tiny.adapter("b"))):
        registry.unload(name)
        assert registry.load_confined(name, path).path == str(path)
    for path in (tiny.adapter("c"), tiny.adapter_root, tiny.adapter("a") / "..", Path("a")):
        with pytest.raises(BadRequest, match="no --adapter-root"):
            registry.load_confined("z", path)


# ---------------------------------------------------------------- registering without reading


@pytest.fixture
def tensors_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of tensors, as they are read from files."""
    names: list[str] = []
    read = TensorFile.read

    def note(file: TensorFile, name: str) -> Any:
        names.append(name)
        return read(file, name)

    monkeypatch.setattr(TensorFile, "read", note)
    return names


@pytest.mark.parametrize("name", ["a", "c", "shallow"])
def test_registering_reads_no_weight_and_says_the_same(
    tiny: Tiny, name: str, tensors_read: list[str]
) -> None:
    registry = make_registry(tiny)
    registered = registry.register("x", tiny.adapter(name))
    assert tensors_read == []
    assert (registry.known(), registry.loaded(), registry.find("x")) == ([registered], [], None)
    assert not registry.is_loaded(registered)
    assert registry.depths.calibrated(registered) is None
    read = registry.fetch("x")
    assert tensors_read  # the control: reading is seen
    for field in ("name", "rank", "max_depth", "modules", "layers", "num_bytes", "path"):
        assert getattr(registered, field) == getattr(read, field)
    assert (registered.digest, read.digest is None) == (None, False)
    assert registry.is_loaded(read)
    assert registry.known_as("x") == read  # what is known now has a digest too


def test_registering_refuses_what_the_header_shows(tiny: Tiny, tmp_path: Path) -> None:
    registry = make_registry(tiny, max_lora_rank=3)
    shutil.copytree(tiny.adapter("a"), tmp_path / "no_weights")
    (tmp_path / "no_weights" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="is missing"):
        registry.register("x", tmp_path / "no_weights")
    with pytest.raises(AdapterError, match="max_lora_rank is 3"):
        registry.register("x", tiny.adapter("a"))
    with pytest.raises(NotFound):
        registry.register("x", tmp_path / "nowhere")
    with pytest.raises(BadRequest):
        registry.register("x@2", tiny.adapter("a"))
    assert registry.known() == []


def test_what_only_the_weights_show_is_refused_to_everyone_who_asks(
    tiny: Tiny, tmp_path: Path
) -> None:
    shutil.copytree(tiny.adapter("a"), tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, file)
    registry = make_registry(tiny)
    registry.register("x", tmp_path / "a")
    for _ in range(2):
        with pytest.raises(AdapterError, match="holds NaN or Inf"):
            registry.select("x", 1)
    assert [ref.name for ref in registry.known()] == ["x"]


def test_a_registered_name_is_taken_until_it_is_unloaded(tiny: Tiny) -> None:
    registry = make_registry(tiny)
    registry.register("x", tiny.adapter("a"))
    for add in (registry.register, registry.load):
        with pytest.raises(Conflict, match="'x' is loaded already"):
            add("x", tiny.adapter("b"))
    registry.unload("x")
    assert registry.known_as("x") is None
    with pytest.raises(NotFound):
        registry.fetch("x")


def test_the_list_of_all_is_made_once_for_each_change(tiny: Tiny) -> None:
    registry = make_registry(tiny)
    registry.register("y", tiny.adapter("a"))
    first = registry.known()
    assert registry.known() is first
    assert registry.known_as("y") is first[0]
    registry.register("x", tiny.adapter("b"))
    assert [ref.name for ref in registry.known()] == ["x", "y"]
    registry.fetch("y")
    assert [ref.digest is None for ref in registry.known()] == [True, False]
    registry.unload("x")
    assert [ref.name for ref in registry.known()] == ["y"]
    assert [ref.name for ref in first] == ["y"], "who holds a list keeps what it said"


# ---------------------------------------------------------------- host memory and the root


def test_the_least_recently_used_leaves_host_memory_and_comes_back(tiny: Tiny) -> None:
    registry = make_registry(tiny, max_cpu_loras=2)
    a = registry.load("a", tiny.adapter("a"))
    registry.load("b", tiny.adapter("b"))
    assert registry.find("a") is a  # now b is the older
    registry.load("c", tiny.adapter("c"))
    assert names(registry) == ["a", "c"]
    assert registry.find("b") is None
    with pytest.raises(Conflict):  # its name is still taken
        registry.load("b", tiny.adapter("b"))
    back = registry.fetch("b")
    assert back.digest == read_checkpoint(tiny.adapter("b"), tiny.targets).digest
    assert names(registry) == ["b", "c"]
    assert registry.fetch("b") is back


def test_adapters_under_the_root_are_read_when_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(tiny.adapter("a"), root / "a")
    (root / "no_adapter").mkdir()
    shutil.copytree(tiny.adapter("b"), tmp_path / "outside")
    (root / "link").symlink_to(tmp_path / "outside")
    registry = make_registry(tiny, adapter_root=root)
    assert registry.loaded() == []
    assert registry.find("a") is None
    assert registry.select("a", 2).adapter == registry.find("a")
    for name in ("no_adapter", "nowhere", "../outside", "..", ".", "link", "a/../a", ""):
        with pytest.raises(NotFound) as refusal:
            registry.fetch(name)
        assert refusal.value.code == "model_not_found"
    assert registry._reading.keys() == {"a"}  # unknown names leave nothing behind


def test_what_was_unloaded_on_purpose_does_not_come_back_by_itself(
    tiny: Tiny, tmp_path: Path
) -> None:
    shutil.copytree(tiny.adapter("a"), tmp_path / "a")
    registry = make_registry(tiny, adapter_root=tmp_path)
    registry.fetch("a")
    registry.unload("a")
    with pytest.raises(NotFound):
        registry.fetch("a")
    registry.load("a", tmp_path / "a")
    assert names(registry) == ["a"]


class SlowDisk:
    """Reading a checkpoint waits for `ready`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_reading = threading.Event()
        self.ready = threading.Event()
        self.num_reads = 0
        monkeypatch.setattr(registry_module, "read_checkpoint", self._read)

    def _read(self, path: Path, targets: Any, **limits: Any) -> Any:
        self.num_reads += 1
        self.is_reading.set()
        assert self.ready.wait(LIMIT_S)
        return read_checkpoint(path, targets, **limits)


def test_looking_up_waits_for_no_reading(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = make_registry(tiny, adapter_root=tiny.adapter_root)
    known = registry.fetch("b")
    disk = SlowDisk(monkeypatch)
    got: list[Any] = []
    readers = [
        threading.Thread(target=lambda: got.append(registry.fetch("a")), daemon=True)
        for _ in range(3)
    ]
    for reader in readers:
        reader.start()
    assert disk.is_reading.wait(LIMIT_S)
    assert registry.find("b") is known
    assert registry.find("a") is None
    assert registry.select("b", 1).adapter is known
    registry.unload("b")
    disk.ready.set()
    for reader in readers:
        reader.join(LIMIT_S)
    assert disk.num_reads == 1
    assert got == [registry.find("a")] * 3


def test_what_is_unloaded_while_it_is_read_stays_unloaded(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = make_registry(tiny, max_cpu_loras=1)
    registry.load("a", tiny.adapter("a"))
    registry.load("b", tiny.adapter("b"))  # a is out of memory, and has to be read again
    disk = SlowDisk(monkeypatch)
    refused: list[NotFound] = []

    def fetch() -> None:
        try:
            registry.fetch("a")
        except NotFound as error:
            refused.append(error)

    reader = threading.Thread(target=fetch, daemon=True)
    reader.start()
    assert disk.is_reading.wait(LIMIT_S)
    registry.unload("a")
    disk.ready.set()
    reader.join(LIMIT_S)
    assert len(refused) == 1
    assert registry.find("a") is None
    with pytest.raises(NotFound):
        registry.fetch("a")


# ---------------------------------------------------------------- depth


def test_a_depth_is_what_was_asked_for_or_refused(tiny: Tiny) -> None:
    registry = make_registry(tiny)
    ref = registry.load("x", tiny.adapter("a"))
    for depth in range(NUM_LAYERS + 1):
        lora = registry.select("x", depth)
        assert (lora.adapter, lora.depth, lora.source) == (ref, depth, "request")
        assert (lora.num_layers, lora.effective_depth) == (NUM_LAYERS, depth)
    for whole in ("auto", "full", None):
        lora = registry.select("x", whole)
        assert (lora.depth, lora.source) == (NUM_LAYERS, "full")
    for depth in (-1, NUM_LAYERS + 1):
        with pytest.raises(BadRequest, match=f"from 0 to {NUM_LAYERS}.*got {depth}") as refusal:
            registry.select("x", depth)
        assert refusal.value.param == "lora_depth"


def test_an_adapter_ends_at_its_highest_layer(tiny: Tiny) -> None:
    registry = make_registry(tiny)
    registry.load("x", tiny.adapter("shallow"))
    effective = [registry.select("x", depth).effective_depth for depth in range(NUM_LAYERS + 1)]
    assert effective == [0, 1, 2, 3, 3]


def test_the_base_model_has_no_depth_but_0(tiny: Tiny) -> None:
    registry = make_registry(tiny)
    for depth in (None, 0, "auto"):
        lora = registry.select(BASE_NAME, depth)
        assert (lora.adapter, lora.depth, lora.source) == (None, 0, "base")
    for depth in (1, -1, "full"):
        with pytest.raises(BadRequest, match="base model"):
            registry.select(BASE_NAME, depth)


# ---------------------------------------------------------------- calibrated depths


def calibrated(tiny: Tiny, folder: Path, **changes: Any) -> Path:
    """A copy of adapter `a` with a record of depth 2 beside its weights."""
    shutil.copytree(tiny.adapter("a"), folder)
    fields = {
        "base": REVISION,
        "adapter": read_checkpoint(tiny.adapter("a"), tiny.targets).digest,
        "num_layers": NUM_LAYERS,
    }
    record = BoundaryRecord.pinned(2, reason="tried by hand", **(fields | changes))
    write(record, folder / FILE_NAME)
    return folder


def test_a_record_beside_the_weights_is_what_auto_means(tiny: Tiny, tmp_path: Path) -> None:
    registry = make_registry(tiny)
    ref = registry.load("x", calibrated(tiny, tmp_path / "x"))
    selection = registry.depths.resolve(ref, "auto")
    assert (selection.depth, selection.source, selection.boundary_version) == (
        2,
        "calibrated",
        None,
    )
    assert registry.depths.resolve(ref, None).depth == 2
    assert registry.depths.resolve(ref, "full").depth == NUM_LAYERS
    assert registry.depths.resolve(ref, 3).source == "request"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base": "sha256:another-base"}, "made for base model sha256:another-base"),
        ({"adapter": "sha256:another-adapter"}, "made for adapter content sha256:another-adapter"),
        ({"num_layers": NUM_LAYERS + 1}, f"made for {NUM_LAYERS + 1} layers"),
    ],
)
def test_a_record_made_for_something_else_is_not_applied_and_says_so(
    tiny: Tiny, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    registry = make_registry(tiny)
    ref = registry.load("x", calibrated(tiny, tmp_path / "x", **changes))
    assert ref.boundary is None
    assert reason in str(ref.boundary_error)
    assert registry.depths.resolve(ref, "auto").source == "full"


def test_a_record_that_cannot_be_read_does_not_keep_the_adapter_out(
    tiny: Tiny, tmp_path: Path
) -> None:
    registry = make_registry(tiny)
    path = calibrated(tiny, tmp_path / "x")
    (path / FILE_NAME).write_text('{"depth": 2')
    ref = registry.load("x", path)
    assert "boundary.json" in str(ref.boundary_error)
    assert registry.depths.resolve(ref, "auto").source == "full"


def test_what_is_set_goes_before_what_lies_beside_the_weights(tiny: Tiny, tmp_path: Path) -> None:
    registry = make_registry(tiny)
    ref = registry.load("x", calibrated(tiny, tmp_path / "x"))
    plain = registry.load("plain", tiny.adapter("b"))
    began = registry.depths.resolve(ref, "auto")
    registry.depths.set_calibrated({ref.digest: CalibratedDepth(1, 5, 0.0)})
    found = registry.depths.resolve(ref, "auto")
    assert (found.depth, found.source, found.boundary_version) == (1, "calibrated", 5)
    assert registry.depths.resolve(plain, "auto").source == "full"
    assert began.depth == 2, "a request keeps the depth it began with"
    registry.depths.set_calibrated({ref.digest: None})
    assert registry.depths.resolve(ref, "auto").source == "full"
