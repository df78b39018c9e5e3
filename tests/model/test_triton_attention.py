"""Decode attention in Triton against torch's over gathered blocks: in its interpreter, on a GPU as it is."""

import pytest
import torch
from torch import Tensor

from server.model.attention import AttentionVariant
from server.model.decode_attention import DecodeRows, GatheredDecode, kernel_error
from server.model.kv_cache import KVCache, KVSpec

triton = pytest.importorskip(
    "triton",
    reason="no triton, which the dev extra installs on Linux x86-64: its kernels are not tested",
)

from server.model import triton_attention  # noqa: E402
from server.model.triton_attention import TritonDecode  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
"""Largest ||Triton's - torch's in float64|| / ||torch's||. The interpreter cuts bfloat16 off."""
SIZE, NUM_BLOCKS = 4, 40
KV_LENS = [1, 2, 4, 5, 9, 33, 60]
"""A first token, a block just begun, just filled, one more, and histories of many blocks."""
VARIANTS = {
    "plain": {},
    "window": {"sliding_window": 3},
    "softcap": {"softcap": 4.0},
    "sinks": {"sinks": True},
    "all": {"sliding_window": 7, "softcap": 4.0, "sinks": True},
}
SHAPES = [(2, 2, 16, 16), (6, 2, 24, 16), (4, 1, 80, 80)]
"""num_heads, num_kv_heads, key_dim, value_dim"""


class Case:
    """Rows of different lengths over a cache whose unread places hold NaN."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
        self.num_heads, num_kv_heads, key_dim, value_dim = shape
        generator = torch.Generator().manual_seed(1)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(DEVICE, dtype)

        self.cache = KVCache(
            [KVSpec(num_kv_heads, key_dim, value_dim)], NUM_BLOCKS, SIZE, dtype, DEVICE,
            has_scratch=True,
        )  # fmt: skip
        order = torch.randperm(NUM_BLOCKS, generator=generator).tolist()
        width = max(self.cache.num_blocks_for(kv_len) for kv_len in KV_LENS) + 2
        tables, places = [], []
        for pool in (self.cache.keys[0], self.cache.values[0]):
            pool.fill_(torch.nan)
        for kv_len in KV_LENS:
            blocks = [order.pop() for _ in range(self.cache.num_blocks_for(kv_len))]
            tables.append((blocks + [NUM_BLOCKS] * width)[:width])
            held = [blocks[at // SIZE] * SIZE + at % SIZE for at in range(kv_len)]
            places.append(held[-1])
            for pool in (self.cache.keys[0], self.cache.values[0]):
                rows = pool.flatten(0, 1)
                rows[held[:-1]] = draw(kv_len - 1, *rows.shape[1:])
        num_rows = len(KV_LENS)
        self.rows = DecodeRows(
            places=torch.tensor(places, device=DEVICE),
            begun_blocks=torch.full((num_rows,), NUM_BLOCKS, device=DEVICE),
            block_tables=torch.tensor(tables, dtype=torch.int32, device=DEVICE),
            kv_lens=torch.tensor(KV_LENS, dtype=torch.int32, device=DEVICE),
        )
        # As a model hands them over: heads first, so a row's stride is not that of its heads.
        self.query = draw(self.num_heads, num_rows, key_dim).transpose(0, 1)
        self.key = draw(num_kv_heads, num_rows, key_dim).transpose(0, 1)
        self.value = draw(num_kv_heads, num_rows, value_dim).transpose(0, 1)
        self.sinks = draw(self.num_heads)

    def variant(self, **differences: object) -> AttentionVariant:
        if differences.pop("sinks", False):
            differences["sinks"] = self.sinks
        return AttentionVariant(0.25, **differences)  # type: ignore[arg-type]

    def expected(self, variant: AttentionVariant) -> Tensor:
        """In float64, over a copy of the cache with zeros in place of NaN."""
        cache = KVCache([], 0, SIZE, torch.float64, DEVICE)
        cache.keys = [self.cache.keys[0].double().nan_to_num(0.0)]
        cache.values = [self.cache.values[0].double().nan_to_num(0.0)]
        return GatheredDecode.over(cache, self.rows).attend(
            0, self.query.double(), self.key.double(), self.value.double(), variant
        )

    def run(self, variant: AttentionVariant) -> Tensor:
        return TritonDecode.over(self.cache, self.rows).attend(
            0, self.query, self.key, self.value, variant
        )


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("least_split", [10_000, 16], ids=["whole", "split"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_attention_is_torchs(
    name: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    least_split: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_attention, "_LEAST_SPLIT", least_split)
    case = Case(shape, dtype)
    variant = case.variant(**VARIANTS[name])
    expected = case.expected(variant)
    actual = case.run(variant)
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    assert error(actual, expected) <= TOLERANCE[dtype]
    # The step's own tokens are in the cache, and nothing else of it has changed.
    keys, values = (pool[0].flatten(0, 1) for pool in (case.cache.keys, case.cache.values))
    assert torch.equal(keys[case.rows.places], case.key)
    assert torch.equal(values[case.rows.places], case.value)
    num_held = sum(KV_LENS)
    assert int(keys.isfinite().all(dim=(1, 2)).sum()) == num_held


def test_what_a_row_may_not_see_would_show() -> None:
    case = Case(SHAPES[0], torch.float32)
    window, plain = case.variant(sliding_window=3), case.variant()
    assert error(case.run(window), case.expected(plain)) > 0.1


def test_rows_of_nobody_are_finite_and_touch_the_scratch_block_alone() -> None:
    case = Case(SHAPES[0], torch.float32)
    case.rows.block_tables[2:] = NUM_BLOCKS
    case.rows.kv_lens[2:] = 1
    before = case.cache.keys[0].clone()
    output = case.run(case.variant())
    assert output.isfinite().all()
    changed = (case.cache.keys[0] != before) & ~(case.cache.keys[0].isnan() & before.isnan())
    blocks = set(changed.flatten(1).any(dim=1).nonzero().flatten().tolist())
    own = {int(place) // SIZE for place in case.rows.places[:2]}
    assert blocks == own | {NUM_BLOCKS}


def test_a_history_is_split_only_where_rows_do_not_fill_the_device() -> None:
    assert triton_attention._num_splits(64 * 8, 4096) == 1
    assert triton_attention._num_splits(8, 4096) == 32
    assert triton_attention._num_splits(8, 256) == 4
    assert triton_attention._num_splits(8, 64) == 1


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block_size", [16, 256])
def test_a_models_attention_is_tried_before_it_is_believed(
    dtype: torch.dtype, block_size: int
) -> None:
    variant = AttentionVariant(0.2, sliding_window=20, softcap=9.0)
    spec = KVSpec(2, 16, 16)
    error = kernel_error(TritonDecode, DEVICE, dtype, 4, spec, variant, block_size)
    assert error <= TOLERANCE[dtype]


def test_control_a_kernel_that_does_something_else_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attend = TritonDecode.attend

    def without_window(self, layer_idx, query, key, value, variant):  # type: ignore[no-untyped-def]
        return attend(self, layer_idx, query, key, value, AttentionVariant(variant.scaling))

    monkeypatch.setattr(TritonDecode, "attend", without_window)
    variant = AttentionVariant(0.2, sliding_window=20)
    error = kernel_error(TritonDecode, DEVICE, torch.float32, 4, KVSpec(2, 16, 16), variant, 16)
    assert error > 0.1
