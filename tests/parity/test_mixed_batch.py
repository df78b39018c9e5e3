"""Invariants 2 and 3, Independence and Identity, with the negative controls that show the check works."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from server.engine import core as engine_core
from server.engine.block_manager import root_key
from server.engine.core import EngineCore
from server.engine.request import LoraSelection, Request
from server.model.batch import BatchedSequence
from server.model.lora import LoraStep
from tests.parity.conftest import AdapterPath, ModelPath, OracleOf
from tests.parity.generation import Generated, generate, greedy, open_core
from tests.parity.mixture import ADAPTERS, SETTINGS, mismatches, parts, run_mixed
from tests.parity.zoo import NUM_LAYERS, random_prompt

ARCHITECTURES = ("llama", "gemma2", "gpt_oss")
"""Plain attention; softcap and alternating windows; sinks, windows and routed experts."""

LoadAdapters = Callable[..., None]


@pytest.fixture(scope="module")
def load_adapters(adapter_path: AdapterPath) -> LoadAdapters:
    def load(core: EngineCore, architecture: str, names: Iterable[str] = ADAPTERS) -> None:
        for name in names:
            core.registry.load(name, adapter_path(architecture, *ADAPTERS[name]))

    return load


Alone = Callable[[str], dict[str, Generated]]


@pytest.fixture(scope="module")
def alone(model_path: ModelPath, load_adapters: LoadAdapters) -> Alone:
    """Each request of the mixture by itself, in an engine that has seen no other."""
    known: dict[str, dict[str, Generated]] = {}

    def generate_alone(architecture: str) -> dict[str, Generated]:
        if architecture not in known:
            known[architecture] = {}
            for part in parts():
                with open_core(model_path(architecture)) as core:
                    load_adapters(core, architecture, [part.adapter])
                    known[architecture] |= generate(core, [part.request(core)])
        return known[architecture]

    return generate_alone


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_thirty_mixed_requests_each_equal_themselves_alone(
    model_path: ModelPath, load_adapters: LoadAdapters, alone: Alone, architecture: str
) -> None:
    with open_core(model_path(architecture), **SETTINGS) as core:
        load_adapters(core, architecture)
        mixed = run_mixed(core)
        stats = core.stats()
    assert mismatches(mixed, alone(architecture)) == []
    # What makes the mixture a test did happen.
    assert stats.num_preemptions > 0
    assert any(mixed[p.id].num_cached_tokens > 0 and p.depth > 0 for p in parts())
    assert stats.num_steps > max(part.join_at for part in parts())
    assert len({generated.token_ids for generated in mixed.values()}) > len(mixed) / 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_requests_alone_equal_peft(
    oracle_of: OracleOf, alone: Alone, architecture: str
) -> None:
    expected = {}
    for part in parts():
        if part.sampling.temperature == 0:
            oracle = oracle_of(architecture, *ADAPTERS[part.adapter])
            answer = oracle.greedy(part.prompt, part.sampling.max_tokens, part.depth)
            expected[part.id] = Generated(answer.token_ids, list(answer.logits))
    assert mismatches(alone(architecture), expected) == []


class TestNegativeControls:
    """The same check, with what it guards taken away."""

    @pytest.mark.parametrize("missing", ["depth", "adapter", "both"])
    def test_without_adapter_or_depth_in_the_cache_key_requests_get_each_others_cache(
        self,
        monkeypatch: pytest.MonkeyPatch,
        model_path: ModelPath,
        load_adapters: LoadAdapters,
        alone: Alone,
        missing: str,
    ) -> None:
        def weaker_key(base_revision: str, lora: LoraSelection) -> bytes:
            if missing == "both" or lora.adapter is None:
                return b"constant"
            if missing == "depth":
                return root_key(base_revision, replace(lora, depth=NUM_LAYERS))
            return root_key(base_revision, replace(lora, adapter=replace(lora.adapter, digest="")))

        expected = alone("llama")
        monkeypatch.setattr(engine_core, "root_key", weaker_key)
        with open_core(model_path("llama"), **SETTINGS) as core:
            load_adapters(core, "llama")
            assert mismatches(run_mixed(core), expected) != []

    def test_with_the_depth_mask_off_every_shallow_request_differs(
        self,
        monkeypatch: pytest.MonkeyPatch,
        model_path: ModelPath,
        load_adapters: LoadAdapters,
        alone: Alone,
    ) -> None:
        build = LoraStep.build

        def build_full(batch: list[BatchedSequence], num_layers: int) -> LoraStep | None:
            full = [replace(s, depth=num_layers if s.slot >= 0 else 0) for s in batch]
            return build(full, num_layers)

        expected = alone("llama")
        monkeypatch.setattr(LoraStep, "build", staticmethod(build_full))
        with open_core(model_path("llama"), **SETTINGS) as core:
            load_adapters(core, "llama")
            lines = mismatches(run_mixed(core), expected)
        wrong = {line.partition(": ")[0] for line in lines}
        assert wrong == {part.id for part in parts() if 0 < part.depth < NUM_LAYERS}


@pytest.mark.parametrize("is_guarded", [True, False])
def test_a_reload_under_the_same_name_never_reuses_the_old_ones_cache(
    monkeypatch: pytest.MonkeyPatch,
    model_path: ModelPath,
    adapter_path: AdapterPath,
    oracle_of: OracleOf,
    is_guarded: bool,
) -> None:
    if not is_guarded:  # the negative control: identity by name instead of by content
        monkeypatch.setattr(
            engine_core,
            "root_key",
            lambda base_revision, lora: f"{lora.adapter.name}@{lora.effective_depth}".encode(),
        )
    prompt = random_prompt(30, seed=9)
    with open_core(model_path("llama")) as core:
        for seed in (0, 1):
            core.registry.load("same", adapter_path("llama", "plain", seed, 4), replace=True)
            lora = core.registry.select("same", "full")
            generated = generate(core, [greedy(f"{seed}", prompt, lora, 6)])[f"{seed}"]
        assert generated.num_cached_tokens == (0 if is_guarded else 28)
    answer = oracle_of("llama", "plain", 1, 4).greedy(prompt, 6, NUM_LAYERS)
    expected = {"1": Generated(answer.token_ids, list(answer.logits))}
    assert (mismatches({"1": generated}, expected) == []) == is_guarded


def test_requests_in_flight_keep_the_adapter_they_were_accepted_with(
    model_path: ModelPath, adapter_path: AdapterPath, oracle_of: OracleOf
) -> None:
    prompt = random_prompt(30, seed=12)
    requests: list[Request] = []
    with open_core(model_path("llama"), max_loras=1) as core:
        # One slot: while the old content runs, the new one has to wait for its turn.
        for seed in (0, 1, 2):
            core.registry.load("same", adapter_path("llama", "plain", seed, 4), replace=True)
            for depth in (1, NUM_LAYERS):
                lora = core.registry.select("same", depth)
                requests.append(greedy(f"{seed}@{depth}", prompt, lora, 8))
        core.registry.unload("same")
        generated = generate(core, requests, {r.id: i for i, r in enumerate(requests)})
    expected = {}
    for seed in (0, 1, 2):
        for depth in (1, NUM_LAYERS):
            answer = oracle_of("llama", "plain", seed, 4).greedy(prompt, 8, depth)
            expected[f"{seed}@{depth}"] = Generated(answer.token_ids, list(answer.logits))
    assert mismatches(generated, expected) == []
