"""The sampler against a plain float64 reference, transformers' processors, and itself alone."""

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import generation

from server.engine import logprobs as logprobs_module
from server.engine.logprobs import prompt_logprobs
from server.engine.request import SamplingParams
from server.engine.row_state import RowState
from server.engine.sampler import MAX_CANDIDATES, Sampled, Sampler
from server.errors import BadRequest, GenerationError

VOCAB_SIZE = 330
EOS = frozenset({7})
PROMPT = (1, 2, 3, 3, 250)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])]


class FixedRow(RowState):
    """A row whose uniform is given, so that one batch can walk along a whole distribution."""

    uniform_value = 0.5

    def uniform(self) -> float:
        return self.uniform_value


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(max_tokens=16, **changes)


def make_row(
    sampling: SamplingParams,
    output: Sequence[int] = (),
    *,
    index: int = 0,
    vocab_size: int = VOCAB_SIZE,
    uniform: float | None = None,
) -> RowState:
    if uniform is None:
        row = RowState(sampling, index, PROMPT, EOS, vocab_size)
    else:
        row = FixedRow(sampling, index, PROMPT, EOS, vocab_size)
        row.uniform_value = uniform
    for token_id in output:
        row.append(token_id)
    return row


def make_logits(num_rows: int, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def bitmask(allowed: Collection[int], vocab_size: int = VOCAB_SIZE) -> np.ndarray:
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def reference_probs(
    logits: torch.Tensor,
    sampling: SamplingParams,
    output: Sequence[int] = (),
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """One row's distribution, stage by stage, with no care for speed."""
    x = logits.double().cpu().numpy().copy()
    if len(output) < sampling.min_tokens:
        for token_id in EOS.union(sampling.stop_token_ids):
            x[token_id] = -np.inf
    if mask is not None:
        for token_id in range(len(x)):
            if not mask[token_id // 32] >> token_id % 32 & 1:
                x[token_id] = -np.inf
    for token_id, bias in sampling.logit_bias:
        x[token_id] += bias
    if sampling.repetition_penalty != 1:
        for token_id in {*PROMPT, *output}:
            penalty = sampling.repetition_penalty
            x[token_id] = x[token_id] / penalty if x[token_id] > 0 else x[token_id] * penalty
    for token_id, count in Counter(output).items():
        x[token_id] -= sampling.presence_penalty + sampling.frequency_penalty * count
    if sampling.temperature == 0:
        return np.eye(len(x))[x.argmax()]
    x = x / sampling.temperature
    probs = np.exp(x - x.max())
    probs[probs < sampling.min_p] = 0
    order = sorted(range(len(x)), key=lambda i: (-probs[i], i))
    if sampling.top_k:
        probs[order[sampling.top_k :]] = 0
    probs /= probs.sum()
    reached = 0.0
    for token_id in order:
        if sampling.top_p < 1 and reached >= sampling.top_p:
            probs[token_id] = 0
        reached += probs[token_id]
    return probs / probs.sum()


def assert_distributed(
    sampler: Sampler,
    logits: torch.Tensor,
    probs: np.ndarray,
    sampling: SamplingParams,
    output: Sequence[int] = (),
    mask: np.ndarray | None = None,
) -> None:
    """The inverse CDF of `probs` at 200 places is what the sampler draws there."""
    uniforms = (np.arange(200) + 0.5) / 200
    cdf = probs.cumsum()
    expected = np.searchsorted(cdf, uniforms, side="right")
    # float32 may put a uniform that lies on a step on either side of it.
    is_clear = np.abs(cdf[:, None] - uniforms).min(axis=0) > 2e-6
    vocab_size = len(probs)
    rows = [make_row(sampling, output, vocab_size=vocab_size, uniform=u) for u in uniforms]
    drawn = sampler.sample(logits.expand(len(rows), -1), rows, [mask] * len(rows))
    got = np.array([sampled.token_id for sampled in drawn])
    assert is_clear.sum() > 160
    assert (got[is_clear] == expected[is_clear]).all()


STAGES: dict[str, dict[str, Any]] = {
    "min_tokens": {"min_tokens": 9, "stop_token_ids": (11, 12)},
    "bias": {"logit_bias": ((4, 9.5), (5, -100.0), (2, 3.0))},
    "repetition": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.8},
    "temperature": {"temperature": 1.6},
    "min_p": {"min_p": 0.1},
    "top_k": {"top_k": 9},
    "top_p": {"top_p": 0.7},
}
OUTPUT = (2, 8, 8, 8, 9, 11)


def spiked_logits() -> torch.Tensor:
    """Logits on which each stage matters: end tokens and seen tokens are among the likely ones."""
    logits = make_logits(1)[0]
    logits[[2, 3, 7, 8, 9, 11]] = torch.tensor([8.5, 8.0, 9.0, 8.2, 7.7, 8.8])
    return logits


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "masked"),
    [(torch.float32, False), (torch.bfloat16, True)],
    ids=["float32 free", "bfloat16 masked"],
)
@pytest.mark.parametrize(
    "names", [*itertools.combinations(STAGES, 1), *itertools.combinations(STAGES, 2), tuple(STAGES)]
)
def test_every_stage_and_pair_draws_what_the_reference_gives(
    names: tuple[str, ...], masked: bool, dtype: torch.dtype, device: str
) -> None:
    merged: dict[str, Any] = {}
    for name in names:
        merged |= STAGES[name]
    sampling = params(**merged)
    mask = bitmask(range(0, 328, 3)) if masked else None
    logits = spiked_logits().to(device, dtype)
    probs = reference_probs(logits.float(), sampling, OUTPUT, mask)
    sampler = Sampler(VOCAB_SIZE, torch.device(device))
    assert_distributed(sampler, logits, probs, sampling, OUTPUT, mask)


@pytest.mark.parametrize("name", STAGES)
def test_the_comparison_notices_a_missing_stage(name: str) -> None:
    probs = reference_probs(spiked_logits(), params(), OUTPUT)
    sampler = Sampler(VOCAB_SIZE, torch.device("cpu"))
    with pytest.raises(AssertionError):
        assert_distributed(sampler, spiked_logits(), probs, params(**STAGES[name]), OUTPUT)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        *({"top_k": k} for k in (1, 5, 100, 329, 330, 5000)),
        *({"top_p": p} for p in (1e-6, 0.1, 0.5, 0.9, 0.999)),
        *({"min_p": p} for p in (0.001, 0.05, 0.5, 1.0)),
        {"top_k": 30, "top_p": 0.6},
        {"min_p": 0.02, "top_k": 30, "top_p": 0.6},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.6},
    ],
    ids=str,
)
def test_agrees_with_transformers_processors(temperature: float, changes: dict[str, Any]) -> None:
    scores = make_logits(1, seed=3)
    ids = torch.tensor([[*PROMPT, *OUTPUT]])
    warpers: list[Any] = [generation.TemperatureLogitsWarper(temperature)]
    if "repetition_penalty" in changes:
        penalty = generation.RepetitionPenaltyLogitsProcessor(changes["repetition_penalty"])
        warpers.insert(0, penalty)
    if "min_p" in changes:
        warpers.append(generation.MinPLogitsWarper(changes["min_p"]))
    if "top_k" in changes:
        warpers.append(generation.TopKLogitsWarper(changes["top_k"]))
    if "top_p" in changes:
        warpers.append(generation.TopPLogitsWarper(changes["top_p"]))
    warped = scores.clone()
    for warper in warpers:
        warped = warper(ids, warped)
    sampling = params(temperature=temperature, **changes)
    sampler = Sampler(VOCAB_SIZE, torch.device("cpu"))
    assert_distributed(sampler, scores[0], warped[0].double().softmax(-1).numpy(), sampling, OUTPUT)


@pytest.mark.parametrize("scale", [0.05, 1.0, 3.0])
@pytest.mark.parametrize(
    "changes",
    [
        {"top_p": 0.9},
        {"top_p": 0.99999},
        {"top_k": MAX_CANDIDATES},
        {"top_k": MAX_CANDIDATES + 1},
        {"top_k": 1500, "top_p": 0.2},
        {"top_k": 1999},
    ],
    ids=str,
)
def test_a_nucleus_may_be_larger_than_the_candidates(changes: dict[str, Any], scale: float) -> None:
    logits = make_logits(1, vocab_size=2000)[0] * scale
    probs = reference_probs(logits, params(**changes))
    assert_distributed(Sampler(2000, torch.device("cpu")), logits, probs, params(**changes))


def test_draws_follow_the_distribution() -> None:
    logits = make_logits(1, seed=5, vocab_size=20) / 2
    sampling = params(seed=11, temperature=0.9)
    row = make_row(sampling, vocab_size=20, index=0)
    num_draws = 20_000
    sampler = Sampler(20, torch.device("cpu"))
    drawn = sampler.sample(logits.expand(num_draws, -1), [row] * num_draws, [None] * num_draws)
    counts = np.bincount([sampled.token_id for sampled in drawn], minlength=20)

    def chi_square(probs: np.ndarray) -> float:
        return float(((counts - num_draws * probs) ** 2 / (num_draws * probs)).sum())

    # 19 degrees of freedom: above 43.8 once in a thousand.
    assert chi_square(reference_probs(logits[0], sampling)) < 43.8
    assert chi_square(reference_probs(logits[0], params(temperature=0.8))) > 100


@pytest.mark.parametrize("uniform", [0.0, 1e-300, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("changes", [{}, {"top_k": 3}, {"top_p": 0.4}, {"min_p": 0.3}])
def test_no_uniform_draws_an_impossible_token(uniform: float, changes: dict[str, Any]) -> None:
    sampler = Sampler(VOCAB_SIZE, torch.device("cpu"))
    for seed in range(20):
        logits = make_logits(1, seed)[0]
        mask = bitmask([seed + 5, seed + 40, seed + 41, seed + 150, 320 - seed])
        probs = reference_probs(logits, params(**changes), mask=mask)
        row = make_row(params(**changes), uniform=uniform)
        [sampled] = sampler.sample(logits[None], [row], [mask])
        assert probs[sampled.token_id] > 0


MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 0},
    {"temperature": 0.0, "frequency_penalty": 0.4, "logprobs": 4},
    {"seed": -1},
    {"seed": 2, "temperature": 1e-30},
    {"seed": 3, "top_p": 0.8, "logprobs": 20},
    {"seed": 4, "top_k": 7, "temperature": 0.7},
    {"seed": 5, "top_k": 1200, "top_p": 0.9999, "temperature": 4.0},
    {"seed": 6, "min_p": 0.05, "logprobs": 1},
    {"seed": 7, "repetition_penalty": 1.2, "presence_penalty": 0.5},
    {"seed": 8, "logit_bias": ((5, 4.0), (6, -4.0)), "min_tokens": 3},
    {"seed": 9, "top_p": 0.9999, "temperature": 3.0},
    {"seed": 10, **{k: v for stage in STAGES.values() for k, v in stage.items()}, "logprobs": 5},
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_alone_equals_the_row_in_any_batch(dtype: torch.dtype, device: str) -> None:
    vocab_size = 1500
    sampler = Sampler(vocab_size, torch.device(device))
    masks = [bitmask(range(0, 1500, 7), vocab_size) if i % 3 == 2 else None for i in range(13)]

    def run(batches: list[list[int]]) -> list[list[Sampled]]:
        """Five steps of all rows, a step split into these batches."""
        rows = [make_row(params(**mixed), vocab_size=vocab_size) for mixed in MIXED]
        steps = []
        for step in range(5):
            logits = make_logits(len(rows), step, vocab_size).to(device, dtype)
            logits[:, 1300:] = logits[:, :1]
            found: dict[int, Sampled] = {}
            for batch in batches:
                drawn = sampler.sample(
                    logits[batch], [rows[i] for i in batch], [masks[i] for i in batch]
                )
                found |= dict(zip(batch, drawn, strict=True))
            for i, row in enumerate(rows):
                row.append(found[i].token_id)
            steps.append([found[i] for i in range(len(rows))])
        return steps

    everyone = list(range(len(MIXED)))
    alone = run([[i] for i in everyone])
    assert run([everyone]) == alone
    assert run([everyone[::-1]]) == alone
    assert run([everyone[:4], everyone[4:]]) == alone
    assert not any(sampled.error for step in alone for sampled in step)
    # Without a generator of its own a row would depend on who is drawn before it.
    assert any(a != b for a, b in zip(alone[0], alone[1], strict=True))


class TorchCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def torch_calls(sampling: list[SamplingParams]) -> list[str]:
    sampler = Sampler(VOCAB_SIZE, torch.device("cpu"))
    logits = make_logits(len(sampling))
    rows = [make_row(each, OUTPUT) for each in sampling]
    with TorchCalls() as calls:
        sampler.sample(logits, rows, [None] * len(rows))
    return calls.names


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, ["aten.max.dim"]),
        (torch.float32, ["aten.detach.default"]),  # NumPy reads them, which is given them by this
    ],
)
def test_a_greedy_batch_reads_its_logits_once(dtype: torch.dtype, expected: list[str]) -> None:
    sampler = Sampler(VOCAB_SIZE, torch.device("cpu"))
    logits = make_logits(16).to(dtype)

    class Readers(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if any(isinstance(arg, torch.Tensor) and arg.numel() >= VOCAB_SIZE for arg in args):
                self.names.append(str(func))
            return func(*args, **kwargs or {})

    rows = [make_row(params(temperature=0.0)) for _ in range(16)]
    with Readers() as readers:
        sampler.sample(logits, rows, [None] * 16)
    assert readers.names == expected
    assert len(torch_calls([params(temperature=0.0)] * 16)) <= 5


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("top_k", "aten.topk.default"),
        ("top_p", "aten.topk.default"),
        ("temperature", "aten.searchsorted.Tensor"),
    ],
)
def test_a_stage_costs_nothing_where_no_row_asks_for_it(stage: str, name: str) -> None:
    greedy = params(temperature=0.0)
    small = Sampler(VOCAB_SIZE, torch.device("cpu"))
    assert small.vocab_size < MAX_CANDIDATES
    name = "aten.sort.default" if name.startswith("aten.topk") else name
    assert name not in torch_calls([greedy] * 3)
    assert name in torch_calls([greedy, params(**STAGES[stage])])


@pytest.mark.parametrize("num_rows", [1, 9])
@pytest.mark.parametrize("changes", MIXED, ids=str)
def test_one_step_makes_a_bounded_number_of_torch_calls(
    changes: dict[str, Any], num_rows: int
) -> None:
    alone, together = torch_calls([params(**changes)]), torch_calls([params(**changes)] * num_rows)
    assert len(together) <= len(alone) + 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mixed", MIXED, ids=str)
@pytest.mark.parametrize("fault", ["nan", "inf", "all -inf", "masked nan", "no token left"])
def test_a_bad_row_errs_alone(fault: str, mixed: dict[str, Any], device: str) -> None:
    sampler = Sampler(VOCAB_SIZE, torch.device(device))
    logits = make_logits(3).to(device)
    masks: list[np.ndarray | None] = [None, bitmask(range(100, 300)), None]

    def sample() -> list[Sampled]:
        rows = [make_row(params(**each)) for each in (MIXED[5], mixed, MIXED[0])]
        return sampler.sample(logits, rows, masks)

    before = sample()
    if fault == "nan":
        logits[1, 150] = torch.nan
    elif fault == "inf":
        logits[1, 150] = torch.inf
    elif fault == "all -inf":
        logits[1] = -torch.inf
    elif fault == "masked nan":
        logits[1, 329] = torch.nan
    else:
        masks[1] = bitmask([])
    after = sample()
    assert not before[1].error
    assert after[1] == Sampled(token_id=-1, logprobs=None, error=True)
    assert after[::2] == before[::2]


def test_a_mask_of_end_tokens_and_min_tokens_leaves_nothing() -> None:
    sampler = Sampler(VOCAB_SIZE, torch.device("cpu"))
    row = make_row(params(min_tokens=2))
    assert sampler.sample(make_logits(1), [row], [bitmask(EOS)])[0].error
    row.append(1)
    row.append(1)
    assert sampler.sample(make_logits(1), [row], [bitmask(EOS)])[0].token_id == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_left_as_they_are(dtype: torch.dtype) -> None:
    logits = make_logits(len(MIXED)).to(dtype)
    before = logits.clone()
    rows = [make_row(params(**mixed), OUTPUT) for mixed in MIXED]
    sampler = Sampler(VOCAB_SIZE, torch.device("cpu"))
    sampler.sample(logits, rows, [bitmask(range(300))] * len(rows))
    assert logits.equal(before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}])
def test_ties_go_to_the_lowest_id(changes: dict[str, Any], device: str) -> None:
    logits = torch.zeros(1, VOCAB_SIZE, device=device) - 1
    logits[0, [3, 200, 329]] = 0.0
    logits[0, 3] = -0.0
    sampler = Sampler(VOCAB_SIZE, torch.device(device))
    for _ in range(20):
        [sampled] = sampler.sample(logits, [make_row(params(logprobs=4, **changes))], [None])
        assert sampled.token_id == 3
        assert sampled.logprobs is not None
        assert [token_id for token_id, _ in sampled.logprobs.top] == [3, 200, 329, 0]


def draws(row: RowState, num_draws: int = 30) -> list[int]:
    sampler = Sampler(VOCAB_SIZE, torch.device("cpu"))
    logits = torch.zeros(1, VOCAB_SIZE)
    return [sampler.sample(logits, [row], [None])[0].token_id for _ in range(num_draws)]


def test_a_seed_fixes_the_draws_of_each_of_n_sequences() -> None:
    first = draws(make_row(params(seed=5), index=0))
    assert draws(make_row(params(seed=5), index=0)) == first
    assert draws(make_row(params(seed=5), index=1)) != first
    assert draws(make_row(params(seed=6), index=0)) != first
    assert draws(make_row(params())) != draws(make_row(params()))


def test_one_uniform_is_drawn_for_each_sampled_token_and_none_for_a_greedy_one() -> None:
    row, greedy = make_row(params(seed=5)), make_row(params(seed=5, temperature=0.0))
    draws(row, 7)
    draws(greedy, 7)
    generator = np.random.Generator(np.random.PCG64([5, 0]))
    assert greedy.uniform() == generator.random()
    generator.random(6)
    assert row.uniform() == generator.random()


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = make_logits(1, seed=2)
    sampling = params(seed=3, temperature=2.0, logit_bias=((17, 100.0),), top_k=5, logprobs=6)
    [sampled] = Sampler(VOCAB_SIZE, torch.device("cpu")).sample(
        logits, [make_row(sampling)], [None]
    )
    expected = logits[0].log_softmax(-1)
    reported = sampled.logprobs
    assert reported is not None
    assert reported.token_id == sampled.token_id == 17
    assert reported.logprob == pytest.approx(expected[17].item(), abs=1e-6)
    assert reported.rank == 1 + int((expected > expected[17]).sum())
    values, ids = expected.topk(6)
    assert [token_id for token_id, _ in reported.top] == ids.tolist()
    assert [logprob for _, logprob in reported.top] == pytest.approx(values.tolist(), abs=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_top", [0, 1, 2000])
@pytest.mark.parametrize("chunk", [1, 700, 1 << 24])
def test_prompt_logprobs_are_those_of_the_token_that_follows(
    chunk: int, num_top: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs_module, "MAX_LOGPROB_ELEMENTS", chunk)
    logits = make_logits(5).to(device, dtype)
    token_ids = torch.tensor([0, 329, 3, 3, 112], device=device)
    found = prompt_logprobs(logits, token_ids, num_top)
    expected = logits.double().cpu().log_softmax(-1)
    order = (-logits.float().cpu()).sort(dim=-1, stable=True).indices
    assert len(found) == 5
    for row, one in enumerate(found):
        assert one.token_id == token_ids[row]
        assert one.logprob == pytest.approx(expected[row, one.token_id].item(), abs=2e-5)
        assert one.rank == 1 + int((logits[row] > logits[row, one.token_id]).sum())
        assert [token_id for token_id, _ in one.top] == order[row, :num_top].tolist()


def test_prompt_logprobs_of_a_broken_position_are_refused() -> None:
    logits = make_logits(3)
    logits[1, 5] = torch.nan
    with pytest.raises(GenerationError, match="token 1"):
        prompt_logprobs(logits, torch.tensor([1, 2, 3]), 0)
    assert prompt_logprobs(logits[:0], torch.zeros(0, dtype=torch.int64), 3) == []


def test_an_empty_step_and_a_bias_outside_the_vocabulary() -> None:
    assert Sampler(VOCAB_SIZE, torch.device("cpu")).sample(make_logits(0), [], []) == []
    with pytest.raises(BadRequest, match="token 330; ids go from 0 to 329"):
        make_row(params(logit_bias=((VOCAB_SIZE, 1.0),)))
