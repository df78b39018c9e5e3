"""Attention against its definition in float64, and the paged cache against computing all anew."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from server.bench.allocation import peak_bytes
from server.errors import ModelError
from server.model import context
from server.model.attention import AttentionVariant, paged_attention
from server.model.attention_probe import AttentionProbe
from server.model.batch import BatchedSequence
from server.model.kv_cache import KVCache, KVSpec
from server.model.native import step as native
from server.model.native.step import NativeStep
from server.model.sdpa import AttentionStep, attend
from tests.model.native.levels import LEVELS, library_of

HEAD_DIM, VALUE_DIM = 16, 32
NUM_HEADS = 4
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Largest difference of outputs that are averages of values around 1, by dtype."""
PROMPT_TOLERANCE = TOLERANCE | {torch.float32: 1e-5}
"""A prompt's scores are sums from the first to the last element, where a decode row's are one a lane."""
CPU = torch.device("cpu")


def reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, variant: AttentionVariant
) -> Tensor:
    """softmax(cap(q k^T scaling)) v, one query head at a time, in float64.

    query [num_queries, num_heads, head_dim], key and value [kv_len, num_kv_heads, head_dim],
    mask [num_queries, kv_len]. Returns [num_queries, num_heads, value_dim].
    """
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // group].T * variant.scaling
        if variant.softcap is not None:
            scores = variant.softcap * torch.tanh(scores / variant.softcap)
        weights = scores.exp() * mask
        total = weights.sum(-1, keepdim=True)
        if variant.sinks is not None:
            total = total + variant.sinks[head].double().exp()
        heads.append(weights / total @ value[:, head // group])
    return torch.stack(heads, dim=1)


def causal_mask(num_queries: int, kv_len: int, window: int | None = None) -> Tensor:
    """Queries are the last of the keys; `window` counts the query's own key."""
    position = torch.arange(kv_len - num_queries, kv_len).unsqueeze(1)
    distance = position - torch.arange(kv_len)
    return (distance >= 0) & (distance < (window or kv_len))


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def variants(
    dtype: torch.dtype = torch.float32, num_heads: int = NUM_HEADS
) -> dict[str, AttentionVariant]:
    sinks = draw(num_heads, seed=9, dtype=dtype)
    return {
        "plain": AttentionVariant(0.3),
        "softcap": AttentionVariant(0.9, softcap=1.5),
        "sinks": AttentionVariant(0.3, sinks=sinks),
        "window": AttentionVariant(0.3, sliding_window=5),
        "everything": AttentionVariant(0.9, sliding_window=3, softcap=1.5, sinks=sinks),
    }


VARIANTS = sorted(variants())


# ---------------------------------------------------------------- one softmax


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_queries", [1, 6, 13])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", VARIANTS)
def test_attend_is_its_definition(
    name: str, num_kv_heads: int, num_queries: int, dtype: torch.dtype
) -> None:
    kv_len, variant = 13, variants(dtype)[name]
    query = draw(num_queries, NUM_HEADS, HEAD_DIM, seed=0, dtype=dtype)
    key = draw(kv_len, num_kv_heads, HEAD_DIM, seed=1, dtype=dtype)
    value = draw(kv_len, num_kv_heads, VALUE_DIM, seed=2, dtype=dtype)
    mask = causal_mask(num_queries, kv_len, variant.sliding_window)
    out = attend(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        mask[None, None],
        variant,
    )
    assert out.dtype == dtype
    expected = reference(query, key, value, mask, variant)
    error = (out[0].transpose(0, 1).double() - expected).abs().max()
    assert error <= TOLERANCE[dtype] * 4


@pytest.mark.parametrize("name", ["plain", "softcap", "sinks"])
@pytest.mark.parametrize(("num_queries", "kv_len"), [(6, 6), (1, 6), (3, 6), (1, 1)])
def test_no_mask_is_causal_over_one_sequence_and_full_otherwise(
    name: str, num_queries: int, kv_len: int
) -> None:
    variant = variants()[name]
    query = draw(num_queries, NUM_HEADS, HEAD_DIM, seed=0)
    key, value = draw(kv_len, 2, HEAD_DIM, seed=1), draw(kv_len, 2, HEAD_DIM, seed=2)
    is_causal = num_queries == kv_len
    mask = causal_mask(kv_len, kv_len) if is_causal else torch.ones(num_queries, kv_len).bool()
    expected = reference(query, key, value, mask, variant)
    out = attend(*(t.transpose(0, 1)[None] for t in (query, key, value)), None, variant)
    assert torch.allclose(out[0].transpose(0, 1).double(), expected, atol=1e-5)


def test_a_batch_has_masks_of_its_own() -> None:
    for variant in variants().values():
        query = draw(3, NUM_HEADS, 1, HEAD_DIM, seed=0)
        key, value = draw(3, 2, 7, HEAD_DIM, seed=1), draw(3, 2, 7, HEAD_DIM, seed=2)
        lengths = torch.tensor([[1], [7], [4]])
        mask = torch.arange(7) < lengths
        out = attend(query, key, value, mask[:, None, None], variant)
        for row in range(3):
            expected = reference(
                query[row].transpose(0, 1),
                key[row].transpose(0, 1),
                value[row].transpose(0, 1),
                mask[row : row + 1],
                variant,
            )
            assert torch.allclose(out[row].transpose(0, 1).double(), expected, atol=1e-5)


# ---------------------------------------------------------------- memory


def peak_of_a_chunk(variant: AttentionVariant, kv_len: int, dtype: torch.dtype) -> int:
    """Bytes that a chunk of 64 queries at the end of a long prompt allocates at once."""
    query = draw(64, 8, HEAD_DIM, seed=0, dtype=dtype)
    key = draw(kv_len, 2, HEAD_DIM, seed=1, dtype=dtype)
    value = draw(kv_len, 2, HEAD_DIM, seed=2, dtype=dtype)
    mask = causal_mask(64, kv_len)[None, None]
    inputs = (part.transpose(0, 1)[None] for part in (query, key, value))
    with torch.inference_mode():
        return peak_bytes(partial(attend, *inputs, mask, variant))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_chunk_makes_no_scores_of_all_heads(dtype: torch.dtype) -> None:
    """One mask in the kernel's dtype, and what does not depend on the context."""
    short, long = (
        peak_of_a_chunk(AttentionVariant(0.3), length, dtype) for length in (4096, 16_384)
    )
    mask_bytes = 64 * 16_384 * dtype.itemsize
    assert long - short <= 1.1 * 0.75 * mask_bytes
    assert long <= 1.5 * mask_bytes


def test_what_makes_scores_is_seen_to() -> None:
    """The formula with a softcap, which no fused kernel has: eight heads in float32, and more."""
    peak = peak_of_a_chunk(AttentionVariant(0.3, softcap=1.5), 16_384, torch.float32)
    assert peak >= 8 * 64 * 16_384 * 4


# ---------------------------------------------------------------- the paged cache

BLOCK_SIZE = 4
LENGTHS = (23, 9, 14)
"""Tokens of the sequences that run beside each other."""
CUTS = ((0, 8, 9, 15, 16, 20, 21, 22, 23), (0, 1, 2, 5, 6, 7, 8, 9), (0, 14))
"""Where each sequence's steps begin and end: chunks and single tokens, on and off block ends."""


def tables(num_blocks: int, seed: int) -> list[list[int]]:
    """Physical blocks of each sequence, in no order."""
    shuffled = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    found = []
    for length in LENGTHS:
        needed = -(-length // BLOCK_SIZE)
        found.append(shuffled[:needed])
        del shuffled[:needed]
    return found


LAYOUTS = [AttentionStep, NativeStep]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("stale", [0.0, torch.nan])
def test_steps_over_shuffled_blocks_are_one_pass_over_everything(
    name: str, stale: float, layout: type[AttentionStep]
) -> None:
    """Whatever the blocks held before: a masked NaN is still read."""
    variant = variants()[name]
    cache = KVCache([KVSpec(2, HEAD_DIM, VALUE_DIM)] * 2, 16, BLOCK_SIZE, torch.float32, CPU)
    for pool in (*cache.keys, *cache.values):
        pool.fill_(stale)
    sequences = []
    for index, length in enumerate(LENGTHS):
        sequences.append(
            (
                draw(length, NUM_HEADS, HEAD_DIM, seed=10 * index),
                draw(length, 2, HEAD_DIM, seed=10 * index + 1),
                draw(length, 2, VALUE_DIM, seed=10 * index + 2),
            )
        )
    expected = [
        reference(q, k, v, causal_mask(len(q), len(q), variant.sliding_window), variant)
        for q, k, v in sequences
    ]
    actual: list[list[Tensor]] = [[], [], []]
    spans = [list(pairwise(cuts)) for cuts in CUTS]
    block_tables = tables(16, seed=3)
    for number in range(max(map(len, spans))):
        live = [i for i in range(3) if number < len(spans[i])]
        live.sort(key=lambda i: spans[i][number][1] - spans[i][number][0] > 1)
        batch = [
            BatchedSequence(
                token_ids=[0] * (spans[i][number][1] - spans[i][number][0]),
                start=spans[i][number][0],
                block_table=block_tables[i][: -(-spans[i][number][1] // BLOCK_SIZE)],
                slot=-1,
                depth=0,
                num_logits=0,
            )
            for i in live
        ]
        step = layout.build(cache, batch, CPU)
        rows = [
            torch.cat([sequences[i][part][slice(*spans[i][number])] for i in live])
            for part in range(3)
        ]
        step.attend(0, *(torch.ones_like(part) for part in rows), variant)  # another layer
        out = step.attend(1, *rows, variant)
        sizes = [len(sequence.token_ids) for sequence in batch]
        for i, part in zip(live, out.split(sizes), strict=True):
            actual[i].append(part)
    for parts, whole in zip(actual, expected, strict=True):
        assert torch.allclose(torch.cat(parts).double(), whole, atol=1e-5)


def test_a_window_is_a_window() -> None:
    """The control: each variant of the above gives another result than plain attention."""
    query, key = draw(13, NUM_HEADS, HEAD_DIM, seed=0), draw(13, 2, HEAD_DIM, seed=1)
    value = draw(13, 2, VALUE_DIM, seed=2)
    plain = AttentionVariant(0.3)
    expected = reference(query, key, value, causal_mask(13, 13), plain)
    for name, variant in variants().items():
        mask = causal_mask(13, 13, variant.sliding_window)
        differs = not torch.allclose(
            reference(query, key, value, mask, variant), expected, atol=1e-2
        )
        assert differs == (name != "plain")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_that_another_sequence_holds_is_not_read(layout: type[AttentionStep]) -> None:
    """The short row of a decode batch is padded, and what pads it must be finite."""
    cache = KVCache([KVSpec(1, HEAD_DIM, HEAD_DIM)], 4, BLOCK_SIZE, torch.float32, CPU)
    cache.keys[0][0] = cache.values[0][0] = torch.nan
    cache.keys[0][1:] = cache.values[0][1:] = 1.0
    batch = [
        BatchedSequence([0], 1, [3], -1, 0, 1),
        BatchedSequence([0], 7, [1, 2], -1, 0, 1),
    ]
    step = layout.build(cache, batch, CPU)
    rows = draw(2, 1, HEAD_DIM, seed=0)
    out = step.attend(0, rows, rows, rows, AttentionVariant(1.0))
    assert bool(out.isfinite().all())


def cache_of_nans(
    spec: KVSpec, num_blocks: int, block_size: int, dtype: torch.dtype
) -> tuple[KVCache, list[int]]:
    """One layer's, and its blocks in no order."""
    cache = KVCache([spec], num_blocks, block_size, dtype, CPU)
    for pool in (*cache.keys, *cache.values):
        pool.fill_(torch.nan)
    return cache, torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "value_dim"),
    [(4, 4, 64, 64), (4, 1, 80, 48), (4, 2, 128, 16), (4, 4, 16, 128)],
)
@pytest.mark.parametrize("block_size", [7, 16, 256])
def test_long_histories_are_attended_in_place(
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    name: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over several tiles of tokens, some of them partly filled, by several threads."""
    variant = variants(dtype)[name]
    lengths = (1, 63, 64, 65, 300)
    spec = KVSpec(num_kv_heads, head_dim, value_dim)
    cache, free = cache_of_nans(spec, 80, block_size, dtype)
    tables = [[free.pop() for _ in range(cache.num_blocks_for(length))] for length in lengths]
    keys = [draw(n, num_kv_heads, head_dim, seed=n, dtype=dtype) for n in lengths]
    values = [draw(n, num_kv_heads, value_dim, seed=n + 1, dtype=dtype) for n in lengths]
    query = draw(num_heads, len(lengths), head_dim, seed=2, dtype=dtype).transpose(0, 1)
    for table, key, value in zip(tables, keys, values, strict=True):
        history = BatchedSequence([0] * len(key), 0, table, -1, 0, 0)
        cache.write(0, torch.tensor(cache.slot_mapping([history])), key, value)
    batch = [
        BatchedSequence([0], length - 1, table, -1, 0, 1)
        for length, table in zip(lengths, tables, strict=True)
    ]
    outputs = []
    for num_threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda own=num_threads: own)
        step = NativeStep.build(cache, batch, CPU)
        new_keys, new_values = (torch.stack([rows[-1] for rows in r]) for r in (keys, values))
        outputs.append(step.attend(0, query, new_keys, new_values, variant))
    assert torch.equal(*outputs)
    for row, (key, value) in enumerate(zip(keys, values, strict=True)):
        mask = causal_mask(1, len(key), variant.sliding_window)
        expected = reference(query[row : row + 1], key, value, mask, variant)
        error = (outputs[0][row : row + 1].double() - expected).abs().max()
        assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "value_dim"),
    [(4, 4, 64, 64), (9, 3, 80, 48), (4, 2, 128, 16), (70, 1, 16, 32)],
)
@pytest.mark.parametrize("block_size", [7, 256])
def test_prompts_are_attended_in_place(
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    name: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whole ones and their ends, over several tiles, behind a decode row: by any number of threads the same,
    and the same in a step of its own."""
    variant = variants(dtype, num_heads)[name]
    spans = ((40, 1), (2, 2), (65, 65), (130, 64), (200, 17), (150, 129))  # tokens, of them new
    spec = KVSpec(num_kv_heads, head_dim, value_dim)
    cache, free = cache_of_nans(spec, 90, block_size, dtype)
    keys = [draw(n, num_kv_heads, head_dim, seed=n, dtype=dtype) for n, _ in spans]
    values = [draw(n, num_kv_heads, value_dim, seed=n + 1, dtype=dtype) for n, _ in spans]
    queries = [
        draw(num_heads, new, head_dim, seed=n + 2, dtype=dtype).transpose(0, 1) for n, new in spans
    ]
    batch = []
    for (length, new), key, value in zip(spans, keys, values, strict=True):
        table = [free.pop() for _ in range(cache.num_blocks_for(length))]
        history = BatchedSequence([0] * (length - new), 0, table, -1, 0, 0)
        slots = torch.tensor(cache.slot_mapping([history]), dtype=torch.int64)
        cache.write(0, slots, key[: length - new], value[: length - new])
        batch.append(BatchedSequence([0] * new, length - new, table, -1, 0, 1))

    def attend_to(indices: list[int]) -> list[Tensor]:
        step = NativeStep.build(cache, [batch[i] for i in indices], CPU)
        rows = [
            torch.cat([part[i][len(part[i]) - spans[i][1] :] for i in indices])
            for part in (queries, keys, values)
        ]
        out = step.attend(0, rows[0], rows[1], rows[2], variant)
        return list(out.split([spans[i][1] for i in indices]))

    everyone = list(range(len(spans)))
    outputs = attend_to(everyone)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for i, again in enumerate(attend_to(everyone)):
        assert torch.equal(again, outputs[i])
        assert torch.equal(attend_to([i])[0], outputs[i])
        mask = causal_mask(spans[i][1], spans[i][0], variant.sliding_window)
        expected = reference(queries[i], keys[i], values[i], mask, variant)
        assert (outputs[i].double() - expected).abs().max() <= PROMPT_TOLERANCE[dtype]


@pytest.mark.parametrize("level", LEVELS)
def test_prompts_are_attended_alike_by_each_instruction_set(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = library_of(level, monkeypatch)
    monkeypatch.setattr(native, "load", lambda: library)
    cache = KVCache([KVSpec(2, 48, 64)], 10, 16, torch.float32, CPU)
    query, key = draw(100, 4, 48, seed=0), draw(100, 2, 48, seed=1)
    value, variant = draw(100, 2, 64, seed=2), AttentionVariant(0.2, sliding_window=50)
    batch = [BatchedSequence([0] * 100, 0, list(range(7)), -1, 0, 1)]
    out = NativeStep.build(cache, batch, CPU).attend(0, query, key, value, variant)
    expected = reference(query, key, value, causal_mask(100, 100, 50), variant)
    assert (out.double() - expected).abs().max() <= PROMPT_TOLERANCE[torch.float32]


def test_a_score_that_is_no_number_spoils_its_own_row_alone() -> None:
    cache = KVCache([KVSpec(1, HEAD_DIM, HEAD_DIM)], 4, BLOCK_SIZE, torch.float32, CPU)
    batch = [BatchedSequence([0], 1, [index], -1, 0, 1) for index in range(3)]
    cache.keys[0][1] = torch.nan
    rows = draw(3, 1, HEAD_DIM, seed=0)
    out = NativeStep.build(cache, batch, CPU).attend(0, rows, rows, rows, AttentionVariant(1.0))
    assert out.isfinite().all(dim=2).flatten().tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("device", "dtype", "dim", "reason"),
    [
        ("cpu", torch.float32, 16, None),
        ("cpu", torch.bfloat16, 48, None),
        ("cuda", torch.float32, 16, "it runs on a CPU, not on cuda"),
        ("cpu", torch.float16, 16, "it reads float32 and bfloat16, not float16"),
        ("cpu", torch.float32, 24, "heads must be a multiple of 16 wide"),
    ],
)
def test_where_histories_are_attended_in_place(
    device: str, dtype: torch.dtype, dim: int, reason: str | None
) -> None:
    assert native.why_not(torch.device(device), dtype, [KVSpec(1, 16, dim)]) == reason


# ---------------------------------------------------------------- what transformers passes


class FakeModule(nn.Module):
    layer_idx = 0


def call(module: nn.Module, attention_mask: Tensor | None = None, **kwargs: object) -> Tensor:
    query, key = draw(1, NUM_HEADS, 5, HEAD_DIM, seed=0), draw(1, 2, 5, HEAD_DIM, seed=1)
    with context.step(context.StepContext(AttentionProbe())):
        output, weights = paged_attention(module, query, key, key, attention_mask, **kwargs)  # type: ignore[arg-type]
    assert weights is None
    assert output.shape == (1, 5, NUM_HEADS, HEAD_DIM)
    return output


@pytest.mark.parametrize(
    "unknown", [{"position_bias": torch.zeros(1)}, {"alibi": 1.0}, {"head_mask": torch.ones(4)}]
)
def test_an_argument_that_is_not_known_is_refused(unknown: dict[str, object]) -> None:
    (name,) = unknown
    with pytest.raises(ModelError, match=f"FakeModule passes {name}, not supported"):
        call(FakeModule(), **unknown)
    call(FakeModule(), **{name: None})  # nothing was asked for


def test_a_mask_is_refused() -> None:
    with pytest.raises(ModelError, match="attention_mask"):
        call(FakeModule(), attention_mask=torch.zeros(1, 1, 5, 5))


def test_what_changes_nothing_is_let_through() -> None:
    plain = call(FakeModule())
    given = {"dropout": 0.0, "is_causal": True, "position_ids": torch.arange(5), "use_cache": False}
    assert torch.equal(call(FakeModule(), **given), plain)
    assert torch.equal(call(FakeModule(), scaling=HEAD_DIM**-0.5), plain)


@pytest.mark.parametrize("given", [{"scaling": 1.0}, {"softcap": 0.5}, {"s_aux": torch.ones(4)}])
def test_what_changes_the_result_does(given: dict[str, object]) -> None:
    assert not torch.allclose(call(FakeModule(), **given), call(FakeModule()), atol=1e-3)


def test_a_module_without_a_layer_has_no_place_in_the_cache() -> None:
    with pytest.raises(ModelError, match="no layer_idx"):
        call(nn.Linear(1, 1))


def test_outside_a_step_there_is_no_attention() -> None:
    query = draw(1, NUM_HEADS, 5, HEAD_DIM, seed=0)
    with pytest.raises(LookupError):
        paged_attention(FakeModule(), query, query, query, None)


def test_the_probe_notes_what_each_layer_needs() -> None:
    probe = AttentionProbe()
    query, key = draw(3, NUM_HEADS, HEAD_DIM, seed=0), draw(3, 2, HEAD_DIM, seed=1)
    value = draw(3, 2, VALUE_DIM, seed=2)
    for layer_idx in (1, 0, 1):
        out = probe.attend(layer_idx, query, key, value, AttentionVariant(0.3))
    expected = reference(query, key, value, causal_mask(3, 3), AttentionVariant(0.3))
    assert torch.allclose(out.double(), expected, atol=1e-5)
    assert probe.calls == [1, 0, 1]
    assert probe.specs == dict.fromkeys((0, 1), KVSpec(2, HEAD_DIM, VALUE_DIM))
