"""The CUDA kernel does not run here; what it is told does.

`by_the_book` computes what the documentation of `varlen_attn` says of each argument, in plain float64.
With it in the kernel's place a step must equal the SDPA step, whatever the batch.
"""

from typing import Any

import pytest
import torch

from server.errors import ModelError
from server.model import varlen
from server.model.attention import AttentionVariant
from server.model.batch import BatchedSequence
from server.model.kv_cache import KVCache, KVSpec
from server.model.sdpa import AttentionStep
from server.model.varlen import VarlenStep

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SPEC = KVSpec(num_kv_heads=2, key_dim=8, value_dim=8)


def by_the_book(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
) -> torch.Tensor:
    assert {cu_seq_q.dtype, cu_seq_k.dtype, seqused_k.dtype, block_table.dtype} == {torch.int32}
    assert query.is_contiguous()
    assert enable_gqa or query.shape[1] == key.shape[2]
    assert max_q == cu_seq_q.diff().max()
    assert max_k >= seqused_k.max()  # a recorded step says what it has room for
    assert torch.equal(cu_seq_k.diff(), seqused_k)
    assert window_size[1] == 0 or window_size == (-1, -1)
    # Without it the kernel packs no heads and splits no history of a decode step.
    assert window_size[1] == 0 or max_q == 1
    assert window_size[0] >= 0 or max_q > 1 or window_size[1] == -1
    rows = []
    for i, length in enumerate(seqused_k.tolist()):
        pages = block_table[i].long()
        keys = key[pages].flatten(0, 1)[:length].double()
        values = value[pages].flatten(0, 1)[:length].double()
        group = query.shape[1] // keys.shape[1]
        first, end = int(cu_seq_q[i]), int(cu_seq_q[i + 1])
        for row in range(first, end):
            position = length - (end - row)  # causal masks are aligned at the bottom right
            left = 0 if window_size[0] < 0 else max(0, position - window_size[0])
            end_seen = length if window_size[1] < 0 else position + 1 + window_size[1]
            seen = slice(left, end_seen)
            heads = []
            for head in range(query.shape[1]):
                scores = keys[seen, head // group] @ query[row, head].double() * scale
                heads.append(scores.softmax(0) @ values[seen, head // group])
            rows.append(torch.stack(heads))
    return torch.stack(rows).to(query.dtype)


def sequence(num_tokens: int, start: int, blocks: list[int]) -> BatchedSequence:
    return BatchedSequence([0] * num_tokens, start, blocks, -1, 0, 1)


BATCHES = {
    "decodes": [sequence(1, 6, [3, 1]), sequence(1, 2, [0]), sequence(1, 0, [5])],
    "prefill": [sequence(7, 0, [4, 2])],
    "chunk": [sequence(3, 5, [7, 6])],
    "mixed": [sequence(1, 9, [8, 3, 1]), sequence(5, 4, [0, 9, 2]), sequence(4, 0, [6])],
}


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("num_heads", [2, 6])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_a_step_equals_the_sdpa_step(
    batch: list[BatchedSequence],
    num_heads: int,
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", by_the_book)
    torch.manual_seed(0)
    caches = [KVCache([SPEC], 10, 4, torch.float32, CPU) for _ in range(2)]
    history = torch.randn_like(caches[0].keys[0]), torch.randn_like(caches[0].values[0])
    num_rows = sum(len(part.token_ids) for part in batch)
    query = torch.randn(num_rows, num_heads, 8)
    key, value = torch.randn(2, num_rows, 2, 8)
    variant = AttentionVariant(0.3, sliding_window=window)
    outputs = []
    for cache, layout in zip(caches, (AttentionStep, VarlenStep), strict=True):
        cache.keys[0].copy_(history[0])
        cache.values[0].copy_(history[1])
        step = layout.build(cache, batch, CPU)
        outputs.append(step.attend(0, query, key, value, variant))
    torch.testing.assert_close(outputs[1], outputs[0])
    wrong = VarlenStep.build(caches[1], batch, CPU).attend(
        0, query, key, value, AttentionVariant(0.3, sliding_window=1)
    )
    if num_rows > 1 or batch[0].start > 0:
        assert not torch.allclose(wrong, outputs[0], atol=1e-3)  # the comparison sees a window


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"device": CPU}, "not on cpu"),
        ({"dtype": torch.float32}, "not in float32"),
        ({"variants": [AttentionVariant(1.0, softcap=5.0)]}, "softcap"),
        ({"variants": [AttentionVariant(1.0, sinks=torch.ones(2))]}, "sinks"),
        ({"specs": [KVSpec(2, 12, 12)]}, "multiple of 8"),
        ({"specs": [KVSpec(2, 512, 512)]}, "up to 256"),
        ({"specs": [KVSpec(2, 64, 32)]}, "one width"),
        ({"block_size": 16}, "block_size 16"),
    ],
)
def test_where_it_cannot_serve_it_says_why(changed: dict[str, Any], reason: str) -> None:
    given: dict[str, Any] = {
        "device": CUDA,
        "dtype": torch.bfloat16,
        "specs": [KVSpec(2, 64, 64)],
        "variants": [AttentionVariant(1.0, sliding_window=8)],
        "block_size": None,
    }
    assert varlen.why_not(**given) is None
    assert reason in (varlen.why_not(**(given | changed)) or "")


def test_an_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value: query)
    reason = varlen.why_not(CUDA, torch.bfloat16, [SPEC], [AttentionVariant(1.0)], None)
    assert reason is not None
    assert "block_table" in reason


def test_a_softcap_never_reaches_the_kernel() -> None:
    cache = KVCache([SPEC], 2, 4, torch.float32, CPU)
    step = VarlenStep.build(cache, [sequence(1, 0, [0])], CPU)
    rows = torch.ones(1, 2, 8)
    with pytest.raises(ModelError, match="softcap"):
        step.attend(0, rows, rows, rows, AttentionVariant(1.0, softcap=2.0))
