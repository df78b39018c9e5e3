"""Recorded decode steps against steps that Python runs, while adapters, depths and histories change.

`tape` stands for CUDA graphs, with their hazards; the controls show that it has them. On a GPU machine
CUDA records the same: `python -m server.bench.gpu` compares there.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.model import products
from server.model.batch import BatchedSequence
from server.model.checkpoint import read_checkpoint
from server.model.decode import DecodeInputs
from server.model.gathered import GatheredSlots
from server.model.gathered_kernel import DownProjections, Rows, TorchKernel, UpProjections
from server.model.gathered_step import GatheredStep
from server.model.graphs import (
    Bucket,
    DecodeGraphs,
    block_bucket,
    depth_bucket,
    row_bucket,
)
from server.model.kv_cache import KVCache
from server.model.loader import probe_attention
from server.model.native.library import Library, load
from server.model.recorder import Recorder, Recording
from server.model.replay.bound_chain import BoundChain
from server.model.replay.chain import Chain
from server.model.replay.lowered import Beside, BindChain, RunChain, _Memory
from server.model.replay.tape import Call, NotReplayable, TapeWriter
from server.model.runner import ModelRunner
from server.model.siblings import find_siblings
from tests.model.tape import Tape, TapeRecorder
from tests.parity.adapters import save_adapter
from tests.parity.zoo import BY_NAME, NUM_LAYERS, SERVED, random_prompt, save_model
from tests.tiny import (
    Tiny,
    assert_everything_is_back,
    load_tiny,
    make_request,
    num_hooks,
    open_tiny,
    run,
)

ATOL = 2e-4
DIFFER = r"^tensor\("
"""How `Bench.step` says that logits differ, and by how much."""
BLOCK_SIZE, NUM_BLOCKS, MAX_LEN = 4, 320, 64
ADAPTERS = {
    "plain": ("plain", 1),
    "other": ("plain", 2),
    "dora": ("dora", 3),
    "ranks": ("patterns", 4),
    "rslora": ("rslora", 5),
}


@dataclass
class Live:
    """One sequence of a test, in blocks of its own."""

    token_ids: list[int]
    blocks: list[int]
    uid: int | None = None
    depth: int = 0


class Bench:
    """Two runners of one model: one records, the other does not. Both hold the same adapters."""

    def __init__(
        self,
        tiny: Tiny,
        max_loras: int = 3,
        recorder: Recorder | None = None,
        bind: BindChain | None = None,
    ) -> None:
        model = tiny.base.model
        self.tiny = tiny
        self.runners = []
        for is_recording in (True, False):
            cache = KVCache(
                tiny.base.kv_specs, NUM_BLOCKS, BLOCK_SIZE, model.dtype, model.device,
                has_scratch=is_recording,
            )  # fmt: skip
            slots = GatheredSlots(tiny.targets, max_loras, model.dtype, model.device)
            runner = ModelRunner(
                model, cache, tiny.targets, max_loras, gathered=slots if is_recording else None
            )
            for pool in (*cache.keys, *cache.values):
                pool[:NUM_BLOCKS] = torch.nan  # what nobody wrote must not be read
            self.runners.append(runner)
        self.recording, self.plain = self.runners
        self.recording.record_steps(recorder or TapeRecorder(), 16, MAX_LEN, bind=bind)
        self._free = list(range(NUM_BLOCKS))[::-1]
        self._slots: dict[int, int] = {}
        self._uid = 0

    @property
    def graphs(self) -> DecodeGraphs:
        assert self.recording.graphs is not None
        return self.recording.graphs

    def load(self, name: str) -> int:
        """Put an adapter in a slot of both, at the cost of one that is not used."""
        self._uid += 1
        checkpoint = self.tiny.adapter(name)
        slots = {
            runner.slots.acquire(self._uid, read_checkpoint(checkpoint, self.tiny.targets))
            for runner in self.runners
        }
        (slot,) = slots
        assert slot is not None
        self._slots[self._uid] = slot
        return self._uid

    def release(self, uid: int) -> None:
        for runner in self.runners:
            runner.slots.release(uid)

    def start(self, num_tokens: int, uid: int | None = None, depth: int = 0) -> Live:
        """A sequence whose prompt both have computed."""
        blocks = [self._free.pop() for _ in range(-(-MAX_LEN // BLOCK_SIZE))]
        prompt = list(random_prompt(num_tokens, seed=blocks[0]))
        live = Live(prompt, blocks, uid, depth if uid is not None else 0)
        num_replays = self.graphs.num_replays
        rows = [self.run(runner, [self._part(live, 0)])[0] for runner in self.runners]
        assert torch.allclose(*rows, atol=ATOL)
        assert self.graphs.num_replays == num_replays  # a prompt is never recorded
        live.token_ids.append(int(rows[1].argmax()))
        return live

    def step(self, *lives: Live) -> Tensor:
        """A decode step of both, compared; returns its rows in the order of `lives`."""
        batch = [self._part(live, len(live.token_ids) - 1) for live in lives]
        recorded, order = self.run(self.recording, batch)
        expected, same_order = self.run(self.plain, batch)
        assert order == same_order
        assert recorded.isfinite().all()
        assert torch.allclose(recorded, expected, atol=ATOL), (recorded - expected).abs().max()
        for index, row in zip(order, expected, strict=True):
            lives[index].token_ids.append(int(row.argmax()))
        return recorded[torch.tensor(order).argsort()].clone()

    def run(self, runner: ModelRunner, batch: list[BatchedSequence]) -> tuple[Tensor, list[int]]:
        """A step of one of the two; the other's hooks are off the model that they share."""
        for other in self.runners:
            if other is not runner:
                other.hooks.install(0)
        return runner.run(batch)

    def _part(self, live: Live, start: int) -> BatchedSequence:
        slot = -1 if live.uid is None or live.depth == 0 else self._slots[live.uid]
        num_blocks = -(-len(live.token_ids) // BLOCK_SIZE)
        table = live.blocks[:num_blocks]
        return BatchedSequence(live.token_ids[start:], start, table, slot, live.depth, 1)

    def close(self) -> None:
        for runner in self.runners:
            runner.close()
        assert num_hooks(self.tiny.base.model) == 0


Open = Callable[..., Bench]


@pytest.fixture(scope="module")
def tiny_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """A tiny model of an architecture and its adapters; "NAME shared" has what reads one tensor as one
    product, as a CUDA device has."""
    made: dict[str, Tiny] = {}

    def get(key: str) -> Tiny:
        if key not in made:
            name, _, shared = key.partition(" ")
            root: Path = tmp_path_factory.mktemp(name)
            architecture = BY_NAME[name]
            save_model(architecture, root / "model")
            for adapter, (variant, seed) in ADAPTERS.items():
                save_adapter(architecture, variant, root / "adapters" / adapter, seed=seed)
            if name == "llama":
                for variant in ("lm_head", "embedding", "lora_bias", "some_layers"):
                    save_adapter(architecture, variant, root / "adapters" / variant, seed=6)
                wide = root / "adapters" / "wide"
                save_adapter(architecture, "plain", wide, seed=7, rank=24)
            made[key] = load_tiny(root / "model", root / "adapters")
            if shared:
                model = made[key].base.model
                siblings = find_siblings(model, lambda: probe_attention(model))
                assert (products.share(model, siblings) > 0) == (name in ("llama", "qwen2"))
        return made[key]

    return get


@pytest.fixture
def open_bench(tiny_of: Callable[[str], Tiny]) -> Iterator[Open]:
    opened: list[Bench] = []

    def open_one(name: str = "llama", **options: int) -> Bench:
        opened.append(Bench(tiny_of(name), **options))
        return opened[-1]

    yield open_one
    for bench in opened:
        bench.close()


# ---------------------------------------------------------------- recorded is as run


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3",
        "gpt_neox",
        "phi3",
        "gpt_oss",
        "mixtral",
        "opt",
        "llama shared",
        "qwen2 shared",
        "phi3 shared",
    ],
)
def test_adapters_and_depths_unseen_when_recorded_are_right(open_bench: Open, name: str) -> None:
    bench = open_bench(name)
    first, second = bench.load("plain"), bench.load("other")
    lives = [bench.start(5), bench.start(9, first, NUM_LAYERS), bench.start(3, second, 3)]
    bench.step(*lives)
    (bucket,) = bench.graphs.buckets
    for _ in range(3):
        bench.step(*lives)
    lives[1].depth, lives[2].depth = 2, NUM_LAYERS  # depths that the recording has not seen
    bench.step(*lives)
    for uid in (first, second):
        bench.release(uid)
    third, fourth = bench.load("rslora"), bench.load("other")  # and adapters, in the same slots
    lives = [bench.start(4, fourth, 1), bench.start(7, third, NUM_LAYERS), bench.start(6)]
    bench.step(*lives)
    bench.step(lives[2], *lives[:2])
    assert bench.graphs.why_off is None
    assert bench.graphs.buckets == [bucket]
    assert bench.graphs.num_replays == 7


@pytest.mark.parametrize("model", ["llama", "llama shared"])
@pytest.mark.parametrize("name", ["dora", "ranks", "lm_head", "embedding", "lora_bias", "wide"])
def test_every_kind_of_adapter_beside_others(open_bench: Open, name: str, model: str) -> None:
    bench = open_bench(model)
    plain, kind = bench.load("plain"), bench.load(name)
    lives = [bench.start(5, plain, NUM_LAYERS), bench.start(6, kind, NUM_LAYERS), bench.start(3)]
    for depth in (NUM_LAYERS, NUM_LAYERS, 3, 1, 2, 0):
        lives[1].depth = depth
        bench.step(*lives)
    assert bench.graphs.why_off is None


def test_histories_grow_beyond_a_recording(open_bench: Open) -> None:
    bench = open_bench()
    uid = bench.load("plain")
    lives = [bench.start(2), bench.start(11, uid, 2)]
    for _ in range(40):
        bench.step(*lives)
    assert [bucket.num_blocks for bucket in bench.graphs.buckets] == [4, 8, 16]


def test_rows_of_nobody_leave_no_trace(open_bench: Open) -> None:
    """A batch of 5 runs as one of 8: every block but those of its sequences stays what it was."""
    bench = open_bench()
    lives = [bench.start(3 + index) for index in range(5)]
    cache = bench.recording.cache
    own = {live.blocks[len(live.token_ids) // BLOCK_SIZE] for live in lives}
    own |= {live.blocks[(len(live.token_ids) - 1) // BLOCK_SIZE] for live in lives}
    others = [block for block in range(NUM_BLOCKS) if block not in own]
    before = [pool[others].clone() for pool in (*cache.keys, *cache.values)]
    bench.step(*lives)
    after = [pool[others] for pool in (*cache.keys, *cache.values)]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old.nan_to_num(9e9), new.nan_to_num(9e9))
    assert bench.graphs.buckets == [Bucket(8, 0, 4)]


def test_a_base_step_is_recorded_without_a_hook(open_bench: Open) -> None:
    bench = open_bench()
    uid = bench.load("plain")
    live = bench.start(5, uid, 0)
    bench.run(bench.recording, [bench._part(live, len(live.token_ids) - 1)])
    assert num_hooks(bench.tiny.base.model) == 0
    assert bench.graphs.buckets == [Bucket(1, 0, 4)]


# ---------------------------------------------------------------- recorded as a tape with chains


class Again(TapeRecorder):
    """`recorder.Recorder` of steps that are launched again, as a lowered step may be."""

    def record(self, step: Callable[[], None]) -> Recording:
        @dataclass
        class Step:
            replay: Callable[[], None] = step

        return Step()


def bind_compiled(chain: Chain, on_host: Collection[int]) -> RunChain:
    """The CPU's kernel in the place of the GPU's."""
    assert not on_host
    library = load()
    assert isinstance(library, Library)
    bound = BoundChain(chain)

    def run(tensors: Sequence[Tensor]) -> None:
        for index, tensor in enumerate(tensors):
            bound.place(index, tensor.data_ptr())
        library.run(bound.kernel, bound.call, 1)

    return run


@pytest.mark.parametrize("name", [a.name for a in SERVED if a.name != "gpt2"])
def test_a_lowered_step_is_the_models(open_bench: Open, name: str) -> None:
    bench = open_bench(name, recorder=Again(), bind=bind_compiled)
    uid, other = bench.load("plain"), bench.load("dora")
    lives = [bench.start(5), bench.start(9, uid, NUM_LAYERS), bench.start(3, other, 2)]
    for _ in range(3):
        bench.step(*lives)
    lives[1].depth, lives[2].depth = 1, NUM_LAYERS
    bench.step(*lives)
    assert bench.graphs.why_off is None
    assert bench.graphs.num_replays == 4
    assert bench.graphs.why_plain is None


class Late(Again):
    """What runs beside other things runs as late as it may."""

    def __init__(self) -> None:
        self.num_beside = 0

    def fork(self) -> Beside:
        self.num_beside += 1
        return lambda launch: launch


@pytest.mark.parametrize("name", ["llama", "llama shared", "qwen2 shared", "phi3", "gpt_oss"])
def test_what_runs_beside_others_may_be_as_late_as_it_is_waited_for(
    open_bench: Open, name: str
) -> None:
    recorder = Late()
    bench = open_bench(name, recorder=recorder, bind=bind_compiled)
    uid, other = bench.load("plain"), bench.load("rslora")
    lives = [bench.start(5), bench.start(9, uid, NUM_LAYERS), bench.start(3, other, 2)]
    for _ in range(2):
        bench.step(*lives)
    assert bench.graphs.why_plain is None
    assert recorder.num_beside > 0


def test_control_what_is_never_waited_for(open_bench: Open) -> None:
    class Never(Again):
        def fork(self) -> Beside:
            return lambda launch: lambda: None

    bench = open_bench(recorder=Never(), bind=bind_compiled)
    lives = [bench.start(5), bench.start(9, bench.load("plain"), NUM_LAYERS)]
    bench.step(*lives)
    assert "KeyError" in str(bench.graphs.why_plain)


def test_a_product_is_launched_before_what_runs_beside_it(
    open_bench: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    call = _Memory.call

    def noted(memory: _Memory, noted_call: Call) -> None:
        launched.append(type(noted_call.function).__name__)
        call(memory, noted_call)

    class Noting(Again):
        def fork(self) -> Beside:
            launched.append("fork")
            return super().fork()

    monkeypatch.setattr(_Memory, "call", noted)
    bench = open_bench("llama shared", recorder=Noting(), bind=bind_compiled)
    bench.step(bench.start(5))
    assert launched
    assert "fork" not in launched
    bench.step(bench.start(9, bench.load("plain"), NUM_LAYERS))
    forks = [index for index, name in enumerate(launched) if name == "fork"]
    assert len(forks) > 0
    assert len(forks) % (4 * NUM_LAYERS) == 0
    for index in forks:
        assert launched[index + 1] not in ("Shrink", "Delta")
        assert launched[index + 2 : index + 4] == ["Shrink", "Delta"]


def test_weights_are_asked_for_beside_what_makes_their_input(
    open_bench: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    call, run = _Memory.call, bind_compiled

    def noted(memory: _Memory, noted_call: Call) -> None:
        launched.append(type(noted_call.function).__name__)
        call(memory, noted_call)

    def bind(chain: Chain, on_host: Collection[int]) -> RunChain:
        bound = run(chain, on_host)

        def noting(tensors: Sequence[Tensor]) -> None:
            launched.append("chain")
            bound(tensors)

        return noting

    def fetch_of(
        kernel: TorchKernel, down: DownProjections, up: UpProjections, rows: Rows, layer_idx: int
    ) -> Callable[[], None]:
        assert len(down.ranks) == len(up.ranks)
        return lambda: launched.append(f"fetch {layer_idx}")

    monkeypatch.setattr(_Memory, "call", noted)
    monkeypatch.setattr(TorchKernel, "fetch_of", fetch_of)
    bench = open_bench("llama shared", recorder=Again(), bind=bind)
    bench.step(bench.start(5))
    assert "chain" in launched
    assert not [name for name in launched if name.startswith("fetch")]
    launched.clear()
    bench.step(bench.start(9, bench.load("plain"), NUM_LAYERS))
    assert bench.graphs.why_plain is None
    places = [index for index, name in enumerate(launched) if name.startswith("fetch")]
    layers = [int(launched[index].split()[1]) for index in places]
    assert layers[: 4 * NUM_LAYERS] == [layer for layer in range(NUM_LAYERS) for _ in range(4)]
    for index in places:
        made_input, product, *beside = launched[index - 1], *launched[index + 1 : index + 4]
        assert made_input in ("chain", "NotedAttention", "method"), launched
        assert product not in ("chain", "Shrink", "Delta")
        assert beside == ["Shrink", "Delta"]


def test_a_model_that_cannot_be_noted_is_recorded_by_its_own_code(
    open_bench: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_noted(writer: TapeWriter) -> None:
        raise NotReplayable("it looks at a number")

    monkeypatch.setattr(TapeWriter, "__enter__", not_noted)
    bench = open_bench(bind=bind_compiled)
    lives = [bench.start(5), bench.start(4)]
    for _ in range(2):
        bench.step(*lives)
    assert bench.graphs.why_plain == "NotReplayable('it looks at a number')"
    assert bench.graphs.why_off is None
    assert bench.graphs.num_replays == 2


def test_a_lowered_step_that_gives_something_else_is_not_believed(open_bench: Open) -> None:
    def bind_wrong(chain: Chain, on_host: Collection[int]) -> RunChain:
        run = bind_compiled(chain, on_host)
        stored = [index for index, o in enumerate(chain.operands) if o.value in chain.stores]

        def wrong(tensors: Sequence[Tensor]) -> None:
            run(tensors)
            for index in stored:
                tensors[index].mul_(1.01)

        return wrong

    bench = open_bench(recorder=Again(), bind=bind_wrong)
    lives = [bench.start(5), bench.start(4)]
    bench.step(*lives)
    assert str(bench.graphs.why_plain).startswith("its chains give other logits")
    assert bench.graphs.why_off is None


# ---------------------------------------------------------------- what makes a recording void


def test_another_module_or_a_wider_stack_records_anew(open_bench: Open) -> None:
    bench = open_bench()
    some = bench.load("some_layers")  # layers 0 and 2
    lives = [bench.start(5, some, NUM_LAYERS), bench.start(4)]
    bench.step(*lives)
    recorded = dict(bench.graphs._recorded)
    plain = bench.load("plain")  # every layer
    lives.append(bench.start(4, plain, NUM_LAYERS))
    bench.step(*lives[:2])
    assert bench.graphs._recorded[Bucket(2, 4, 4)] is not recorded[Bucket(2, 4, 4)]
    recorded = dict(bench.graphs._recorded)
    wide = bench.load("wide")
    lives[1] = bench.start(4, wide, 3)
    bench.step(*lives[:2])
    assert bench.graphs._recorded[Bucket(2, 4, 4)] is not recorded[Bucket(2, 4, 4)]


def test_a_recording_below_the_change_stays(open_bench: Open) -> None:
    """Layer 1 gains hooks, which a recording of depth 1 does not reach."""
    bench = open_bench()
    some = bench.load("some_layers")
    low, base = bench.start(5, some, 1), bench.start(3)
    bench.step(low)
    bench.step(base)
    recorded = dict(bench.graphs._recorded)
    bench.load("plain")
    bench.step(low)
    bench.step(base)
    assert dict(bench.graphs._recorded) == recorded
    assert set(recorded) == {Bucket(1, 1, 4), Bucket(1, 0, 4)}


def test_few_recordings_are_kept(open_bench: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.model.graphs.MAX_RECORDINGS", 2)
    bench = open_bench()
    lives = [bench.start(3) for _ in range(4)]
    bench.step(lives[0])
    bench.step(*lives[:2])
    bench.step(lives[0])
    bench.step(*lives)
    assert [bucket.num_rows for bucket in bench.graphs.buckets] == [1, 4]


# ---------------------------------------------------------------- what is not recorded


def test_steps_that_are_not_one_token_each_run_as_ever(open_bench: Open) -> None:
    bench = open_bench()
    lives = [bench.start(3 + index % 5) for index in range(17)]
    bench.step(*lives)  # too many: 16 at most
    batch = [bench._part(lives[0], len(lives[0].token_ids) - 1), bench._part(lives[1], 0)]
    bench.run(bench.recording, batch)  # a prompt among them
    unasked = bench._part(lives[0], len(lives[0].token_ids) - 1)
    bench.run(bench.recording, [replace(unasked, num_logits=0)])
    lent = bench.recording.slots.lend(
        read_checkpoint(bench.tiny.adapter("plain"), bench.tiny.targets)
    )
    bench.run(bench.recording, [replace(unasked, slot=lent, depth=2)])
    bench.recording.slots.take_back(lent)
    assert bench.graphs.buckets == []


def test_a_model_that_cannot_be_recorded_runs_as_ever(open_bench: Open) -> None:
    """GPT-2 looks in its input for padding, and waits for the device to see it."""
    bench = open_bench("gpt2")
    lives = [bench.start(5, bench.load("plain"), 2), bench.start(4)]
    bench.step(*lives)
    assert "cannot be recorded" in (bench.graphs.why_off or "")
    bench.step(*lives)
    assert bench.graphs.num_replays == 0


def test_a_step_that_fails_is_not_the_recordings_fault(
    open_bench: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = open_bench()
    live = bench.start(5)
    with monkeypatch.context() as patch:
        patch.setattr(bench.tiny.base.model, "forward", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bench.run(bench.recording, [bench._part(live, len(live.token_ids) - 1)])
    bench.step(live)
    assert bench.graphs.num_replays == 1


# ---------------------------------------------------------------- controls: the tape has the hazards


def steps_with_other_adapters(bench: Bench) -> None:
    uid = bench.load("plain")
    lives = [bench.start(5, uid, NUM_LAYERS), bench.start(4)]
    bench.step(*lives)
    bench.step(*lives)
    bench.release(uid)
    lives = [bench.start(5), bench.start(4, bench.load("other"), NUM_LAYERS)]
    bench.step(*lives)
    bench.step(*lives)


def test_the_steps_of_the_controls_are_right_as_they_are(open_bench: Open) -> None:
    bench = open_bench()
    steps_with_other_adapters(bench)
    assert bench.graphs.num_replays == 4


def test_control_rows_that_python_chose(open_bench: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots taken from Python, as the grouped kernel takes them, are those of the first step."""
    init = GatheredStep.__init__

    def frozen(self: GatheredStep, slots: GatheredSlots, rows: Rows, num_layers: int) -> None:
        init(self, slots, Rows(rows.slots.clone(), rows.depths.clone()), num_layers)

    def record(self: TapeRecorder, step: Callable[[], None]) -> Tape:
        tape = Tape()
        with tape:
            step()
        tape.calls = [
            call for call in tape.calls if call.function is not torch.ops.aten.clone.default
        ]
        return tape

    monkeypatch.setattr(GatheredStep, "__init__", frozen)
    monkeypatch.setattr(TapeRecorder, "record", record)
    with pytest.raises(AssertionError, match=DIFFER):
        steps_with_other_adapters(open_bench())


def test_control_a_mask_that_was_kept_from_the_warm_up(
    open_bench: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = DecodeInputs.attention
    kept: dict[tuple[int, int], object] = {}

    def reused(self: DecodeInputs, num_rows: int, num_blocks: int):
        made = attention(self, num_rows, num_blocks)
        return kept.setdefault((num_rows, num_blocks), made)

    monkeypatch.setattr(DecodeInputs, "attention", reused)
    with pytest.raises(AssertionError, match=DIFFER):
        steps_with_other_adapters(open_bench())


def test_control_a_stack_that_moves_unnoticed(
    open_bench: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GatheredSlots, "signature", lambda self, depth: ())
    bench = open_bench()
    lives = [bench.start(5, bench.load("plain"), NUM_LAYERS), bench.start(4)]
    bench.step(*lives)
    lives[1] = bench.start(4, bench.load("wide"), NUM_LAYERS)
    with pytest.raises(AssertionError, match=DIFFER):
        bench.step(*lives)


def test_a_recording_that_gives_something_else_is_not_believed(
    open_bench: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = Tape.replay

    def broken(self: Tape) -> None:
        replay(self)
        self.calls[-1].args[0].mul_(1.1)  # the logits

    monkeypatch.setattr(Tape, "replay", broken)
    bench = open_bench()
    bench.step(bench.start(5))
    assert "other logits" in (bench.graphs.why_off or "")


# ---------------------------------------------------------------- an engine


def test_an_engine_that_records_says_what_one_says_that_does_not(tiny: Tiny) -> None:
    """With fewer slots than adapters and fewer blocks than tokens, so that everything moves about."""
    settings = {"max_loras": 2, "num_blocks": 26, "max_num_seqs": 6}
    names = ("a", "b", "c", "shallow")
    said = []
    for recorder in (TapeRecorder(), None):
        with open_tiny(tiny, *names, recorder=recorder, **settings) as core:
            requests = []
            for index in range(16):
                lora = core.registry.select(names[index % 4], index % (NUM_LAYERS + 1))
                sampling = {"temperature": 0.8, "seed": index} if index % 3 == 0 else {}
                prompt = random_prompt(5 + index, seed=index)
                requests.append(make_request(f"{index}", prompt, lora, 12, **sampling))
            outbox = run(core, *requests)
            said.append([outbox.token_ids(request.id) for request in requests])
            assert core.stats().num_preemptions > 0
            graphs = core.runner.graphs
            if graphs is not None:
                assert graphs.why_off is None
                assert graphs.num_replays > core.stats().num_steps / 3
            assert_everything_is_back(core)
    assert said[0] == said[1]


# ---------------------------------------------------------------- buckets


def test_buckets_hold_what_they_are_for() -> None:
    assert [row_bucket(n) for n in (1, 2, 3, 5, 8, 9, 17, 64, 65)] == [
        1,
        2,
        4,
        8,
        8,
        16,
        24,
        64,
        72,
    ]
    assert [depth_bucket(d, 32) for d in (0, 1, 8, 9, 31, 32)] == [0, 8, 8, 16, 32, 32]
    assert [depth_bucket(d, 3) for d in (0, 1, 2, 3)] == [0, 2, 3, 3]
    assert [block_bucket(n) for n in (1, 4, 5, 9)] == [4, 4, 8, 16]
    for num_layers in (1, 3, 4, 12, 31, 32, 80):
        for depth in range(1, num_layers + 1):
            assert depth <= depth_bucket(depth, num_layers) <= num_layers
