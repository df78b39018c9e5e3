"""One tiny Llama with its adapters, and engines over it that cost milliseconds to make.

The model is loaded once a session and shared by engines that follow each other; every engine has
its own cache, slots, hooks and registry, and leaves the model as it was.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from server.config import Settings
from server.engine.core import EngineCore
from server.engine.protocol import ModelInfo
from server.engine.registry import AdapterRegistry
from server.engine.request import LoraSelection, Request, RequestOutput, SamplingParams
from server.model import loader
from server.model.gathered import GatheredSlots
from server.model.kv_cache import KVCache
from server.model.loader import LoadedModel
from server.model.recorder import Recorder
from server.model.runner import ModelRunner
from server.model.targets import Targets
from tests.parity.adapters import save_adapter
from tests.parity.zoo import BY_NAME, NUM_LAYERS, save_model

BASE_NAME = "tiny"
MAX_STEPS = 500
"""An engine that has not finished by then is stuck."""

BASE = LoraSelection(None, 0, NUM_LAYERS, "base")

ADAPTERS = {"a": ("plain", 1), "b": ("plain", 2), "c": ("dora", 3), "shallow": ("some_layers", 4)}
"""Name -> variant and seed. `shallow` reaches layers 0 and 2 only."""


@dataclass(frozen=True, slots=True)
class Tiny:
    """A loaded model and where it and its adapters lie on the disk."""

    base: LoadedModel
    targets: Targets
    model_path: Path
    adapter_root: Path

    def adapter(self, name: str) -> Path:
        return self.adapter_root / name


def make_tiny(directory: Path) -> Tiny:
    """Write model and adapters below `directory`, load the model."""
    llama = BY_NAME["llama"]
    model_path = save_model(llama, directory / "model")
    for name, (variant, seed) in ADAPTERS.items():
        save_adapter(llama, variant, directory / "adapters" / name, seed=seed)
    return load_tiny(model_path, directory / "adapters")


def load_tiny(model_path: Path, adapter_root: Path) -> Tiny:
    """Load the model; a second engine that runs meanwhile needs a model of its own."""
    base = loader.load(str(model_path), None, "cpu", "float32")
    return Tiny(base, Targets(base.model), model_path, adapter_root)


def make_core(
    tiny: Tiny,
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    recorder: Recorder | None = None,
    **settings: Any,
) -> EngineCore:
    """A fresh engine with no adapter loaded; with a recorder, one that records its decode steps."""
    given = Settings(
        model=str(tiny.model_path),
        **({"max_num_batched_tokens": 16, "max_num_seqs": 8, "max_loras": 4} | settings),
    )
    base = tiny.base
    model = base.model
    cache = KVCache(
        base.kv_specs, num_blocks, block_size, model.dtype, model.device,
        has_scratch=recorder is not None,
    )  # fmt: skip
    info = ModelInfo(
        name=BASE_NAME,
        path=str(tiny.model_path),
        num_layers=base.num_layers,
        vocab_size=base.vocab_size,
        max_model_len=min(base.max_position, num_blocks * block_size),
        created=0,
        revision=base.revision,
    )
    registry = AdapterRegistry(
        tiny.targets,
        base_name=BASE_NAME,
        base_revision=base.revision,
        adapter_root=given.adapter_root,
        max_cpu_loras=given.max_cpu_loras,
        max_lora_rank=given.max_lora_rank,
        default_depth=given.default_depth,
    )
    slots = None
    if recorder is not None:
        slots = GatheredSlots(tiny.targets, given.max_loras, model.dtype, model.device)
    runner = ModelRunner(
        model,
        cache,
        tiny.targets,
        given.max_loras,
        gathered=slots,
        max_lora_bytes=given.max_lora_bytes,
    )
    if recorder is not None:
        runner.record_steps(recorder, given.max_num_seqs, info.max_model_len)
    return EngineCore(base, runner, registry, info, given)


@contextmanager
def open_tiny(tiny: Tiny, *adapters: str, **settings: Any) -> Iterator[EngineCore]:
    """A fresh engine with these adapters loaded, closed at the end."""
    core = make_core(tiny, **settings)
    try:
        for name in adapters:
            core.registry.load(name, tiny.adapter(name))
        yield core
    finally:
        core.close()


def make_request(
    request_id: str,
    prompt: Iterable[int],
    lora: LoraSelection = BASE,
    max_tokens: int = 6,
    **sampling: Any,
) -> Request:
    """A greedy request that does not end by itself."""
    given = {"temperature": 0.0, "ignore_eos": True} | sampling
    return Request(request_id, tuple(prompt), SamplingParams(max_tokens, **given), lora)


class Outbox:
    """What each request got. An output after a request's last one is an error."""

    def __init__(self) -> None:
        self.outputs: dict[str, list[RequestOutput]] = defaultdict(list)

    def take(self, outputs: Iterable[RequestOutput]) -> None:
        for output in outputs:
            assert not self.is_finished(output.request_id), f"{output} comes after the last"
            self.outputs[output.request_id].append(output)

    def is_finished(self, request_id: str) -> bool:
        outputs = self.outputs.get(request_id)
        return bool(outputs) and outputs[-1].finished

    def last(self, request_id: str) -> RequestOutput:
        assert self.is_finished(request_id), f"{request_id} has no last output"
        return self.outputs[request_id][-1]

    def token_ids(self, request_id: str, index: int = 0) -> tuple[int, ...]:
        return tuple(
            token_id
            for output in self.outputs[request_id]
            for delta in output.deltas
            if delta.index == index
            for token_id in delta.token_ids
        )

    def text(self, request_id: str, index: int = 0) -> str:
        return "".join(
            delta.text
            for output in self.outputs[request_id]
            for delta in output.deltas
            if delta.index == index
        )

    def finish_reasons(self, request_id: str) -> dict[int, str]:
        """By index; each sequence ends once."""
        reasons: dict[int, str] = {}
        for output in self.outputs[request_id]:
            for delta in output.deltas:
                if delta.finish_reason is not None:
                    assert delta.index not in reasons
                    reasons[delta.index] = delta.finish_reason
        return reasons


def run_to_end(core: EngineCore, outbox: Outbox) -> Outbox:
    """Step until there is no work."""
    for _ in range(MAX_STEPS):
        if not core.has_work:
            return outbox
        outbox.take(core.step())
    raise AssertionError(f"work is left after {MAX_STEPS} steps")


def run(core: EngineCore, *requests: Request) -> Outbox:
    """Add requests together and run them to their ends."""
    for request in requests:
        core.add(request)
    return run_to_end(core, Outbox())


def num_hooks(model: nn.Module) -> int:
    """Forward hooks on the model, counted on its modules and not on what installed them."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def assert_everything_is_back(core: EngineCore) -> None:
    """No block, slot or request is held, and closing leaves no hook."""
    assert not core.has_work
    assert core.blocks.num_free == core.blocks.num_blocks
    assert core.blocks.num_free_among(range(core.blocks.num_blocks)) == core.blocks.num_blocks
    assert core.runner.slots.num_users == 0
    assert core.close() == []
    assert core.runner.slots.resident_uids == []
    assert num_hooks(core.runner.model) == 0
