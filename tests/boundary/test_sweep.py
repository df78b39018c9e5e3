"""The forking sweep against one plain PEFT forward pass a depth."""

import copy
import itertools
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import boundary.sweep
from boundary.depth import decoder_layers, lora_depth, lora_modules
from boundary.forks import ForkPlan
from boundary.mask import Mask, depth_masks
from boundary.progress import Progress, Stopped, drain
from boundary.rows import PeftLoraRows
from boundary.sample import completion_positions
from boundary.score import KLToFull
from boundary.sweep import Scores, reference, sweep, sweep_slices
from tests.boundary.adapted import HookedRows, Sample, Untouched, adapted, samples_of, traces
from tests.parity.adapters import EXTRA_VARIANTS
from tests.parity.zoo import BY_NAME, NUM_LAYERS, SERVED, Architecture, build_model

TOLERANCE = 1e-4  # fp32, in nats; some sample tells neighbouring depths apart by 20 times that
LLAMA = BY_NAME["llama"]
TOP_AND_MIDDLE: list[Mask] = [
    (False, True, False, True),
    (False, True, True, False),
    (True, True, False, True),
    (False, True, False, True),
]
UNEVEN = samples_of((5, 4), (17, 6), (1, 5))  # the longest is beyond the zoo's sliding windows
TWO = samples_of((7, 3), (16, 2))


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
    return adapted(LLAMA, "plain", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected(untouched: PeftModel) -> Scores:
    """The reference's scores of `UNEVEN` at every depth of `model`."""
    return reference(untouched, UNEVEN)


@pytest.fixture
def model(untouched: PeftModel) -> PeftModel:
    """A Llama with a plain adapter, each test's own."""
    return copy.deepcopy(untouched)


def worst(swept: Scores, expected: Scores) -> float:
    return float(np.abs(swept - expected).max())


@contextmanager
def rows_by_layer(model: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """`(num_rows, num_tokens)` of every call of a decoder layer inside the block."""
    seen: list[tuple[int, int]] = []
    # After the layer, because its own pre-hooks may still change what it is given.
    handles = [
        layer.register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape[:2])))
        for layer in decoder_layers(model)[1]
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("variant", ["plain", "dora"])
@pytest.mark.parametrize("architecture", SERVED, ids=lambda architecture: architecture.name)
def test_sweep_is_the_reference(architecture: Architecture, variant: str, tmp_path: Path) -> None:
    model = adapted(architecture, variant, tmp_path)
    plainly = reference(model, TWO)
    assert plainly.shape == (len(TWO), NUM_LAYERS + 1)
    assert plainly.dtype == np.float64
    assert np.abs(np.diff(plainly)).max(axis=0).min() > 20 * TOLERANCE
    assert worst(sweep(model, TWO), plainly) < TOLERANCE
    assert traces(model) == []


@pytest.mark.parametrize("variant", ["rslora", "patterns", *EXTRA_VARIANTS])
def test_sweep_is_the_reference_for_every_variant(variant: str, tmp_path: Path) -> None:
    model = adapted(LLAMA, variant, tmp_path)
    assert worst(sweep(model, UNEVEN), reference(model, UNEVEN)) < TOLERANCE


def test_rows_are_told_apart_in_modules_that_flatten_them(tmp_path: Path) -> None:
    """The expert that all tokens share sees `[num_rows * num_tokens, hidden_size]`."""
    targets = ("shared_expert.up_proj", "shared_expert.down_proj")
    model = adapted(replace(BY_NAME["qwen2_moe"], targets=targets), "plain", tmp_path)
    assert len(lora_modules(model)) == 2 * NUM_LAYERS
    assert worst(sweep(model, UNEVEN), reference(model, UNEVEN)) < TOLERANCE


def test_rows_that_cannot_be_told_apart_are_refused(model: PeftModel) -> None:
    name, module, layer_idx = lora_modules(model)[0]
    with PeftLoraRows(model) as rows:
        rows.reach(layer_idx, 1, 2)
        with pytest.raises(ValueError, match=rf"{name} got 5 rows, no multiple of 2"):
            module(torch.zeros(5, 64))
    assert traces(model) == []


@pytest.mark.parametrize("variant", ["plain", "lm_head", "embedding"])
def test_masks_that_are_no_depths(variant: str, tmp_path: Path) -> None:
    model = adapted(LLAMA, variant, tmp_path)
    plainly = reference(model, UNEVEN, masks=TOP_AND_MIDDLE)
    swept = sweep(model, UNEVEN, masks=TOP_AND_MIDDLE)
    assert worst(swept, plainly) < TOLERANCE
    assert (swept[:, 0] == swept[:, 3]).all()


@pytest.mark.parametrize("max_tokens", [1, 23, 50, 120, 250, 10_000])
@pytest.mark.parametrize("max_logits", [1, 264 * 12, 2**26])
def test_chunks_change_nothing(
    model: PeftModel, expected: Scores, max_tokens: int, max_logits: int
) -> None:
    swept = sweep(model, UNEVEN, max_tokens=max_tokens, max_logits=max_logits)
    assert worst(swept, expected) < TOLERANCE


@pytest.mark.parametrize("max_tokens", [30, 10_000])
def test_kl_to_full(model: PeftModel, max_tokens: int) -> None:
    prompts = [Sample(sample.prompt_token_ids, ()) for sample in UNEVEN]
    for samples, score in (
        (prompts, KLToFull()),
        (UNEVEN, KLToFull()),
        (UNEVEN, KLToFull(completion_positions)),
    ):
        plainly = reference(model, samples, score=score)
        swept = sweep(model, samples, score=score, max_tokens=max_tokens)
        assert worst(swept, plainly) < TOLERANCE
        assert plainly[:, :-1].min() > 20 * TOLERANCE
        assert swept[:, -1].max() < TOLERANCE


def test_depth_is_that_of_lora_depth(model: PeftModel, expected: Scores) -> None:
    """The reference itself, against the switches that define depth."""
    sample = UNEVEN[0]
    input_ids = torch.tensor([[*sample.prompt_token_ids, *sample.completion_token_ids]])
    for depth, score in enumerate(expected[0]):
        with lora_depth(model, depth), torch.no_grad():
            loss = nn.functional.cross_entropy(
                model(input_ids=input_ids).logits[0, 4:-1], input_ids[0, 5:]
            )
        assert score == pytest.approx(-loss.item(), abs=1e-6)


def one_layer_late(num_layers: int) -> list[Mask]:
    return [*depth_masks(num_layers)[1:], (True,) * num_layers]


def test_a_fork_one_layer_late_is_found(
    model: PeftModel, expected: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: the comparisons above could not pass with a trunk that is left too late."""
    monkeypatch.setattr(boundary.sweep, "depth_masks", one_layer_late)
    assert worst(sweep(model, UNEVEN), expected) > 20 * TOLERANCE


class Everywhere(PeftLoraRows):
    """LoRA in all rows: tails that never leave the adapter."""

    def reach(self, layer_idx: int, num_lora_rows: int, num_rows: int) -> None:
        super().reach(layer_idx, num_rows, num_rows)


def test_tails_that_keep_lora_are_found(model: PeftModel, expected: Scores) -> None:
    swept = sweep(model, UNEVEN, rows=Everywhere(model))
    assert worst(swept, expected) > 20 * TOLERANCE


def test_layer_evaluations(model: PeftModel) -> None:
    with rows_by_layer(model) as seen:
        sweep(model, UNEVEN[:1])
        run = [num_rows for num_rows, num_tokens in seen if num_tokens > 1]
    assert run == [2, 3, 4, 5]
    assert sum(run) == NUM_LAYERS * (NUM_LAYERS + 3) // 2
    with rows_by_layer(model) as seen:
        reference(model, UNEVEN[:1])
    assert len(seen) == NUM_LAYERS * (NUM_LAYERS + 1)


def test_layers_without_lora_share_their_rows(tmp_path: Path) -> None:
    model = adapted(LLAMA, "some_layers", tmp_path)  # layers 0 and 2
    with rows_by_layer(model) as seen:
        swept = sweep(model, UNEVEN[:1])
    assert [num_rows for num_rows, _ in seen[:NUM_LAYERS]] == [2, 2, 3, 3]
    assert (swept[:, 1] == swept[:, 2]).all()
    assert (swept[:, 3] == swept[:, 4]).all()


@pytest.mark.parametrize("max_tokens", [23, 60, 115, 230, 1000])
def test_tokens_in_a_layer_are_bounded(model: PeftModel, max_tokens: int) -> None:
    samples = UNEVEN + samples_of((3, 2), (6, 3), (5, 4), (11, 12))
    with rows_by_layer(model) as seen:
        sweep(model, samples, max_tokens=max_tokens, max_logits=1)
    assert max(num_rows * num_tokens for num_rows, num_tokens in seen) <= max_tokens
    with rows_by_layer(model) as seen:
        sweep(model, samples, score=KLToFull(), max_tokens=2 * max_tokens, max_logits=1)
    assert max(num_rows * num_tokens for num_rows, num_tokens in seen) <= 2 * max_tokens


def test_one_row_of_the_longest_sample_is_the_least(model: PeftModel) -> None:
    with rows_by_layer(model) as seen:
        sweep(model, UNEVEN, max_tokens=1)
    assert {num_rows for num_rows, num_tokens in seen if num_tokens > 1} == {1}


@pytest.mark.parametrize("max_logits", [1, 264 * 5 * 2, 264 * 5 * 4])
def test_logits_are_bounded(model: PeftModel, max_logits: int) -> None:
    seen: list[int] = []
    head = model.get_base_model().get_output_embeddings()
    head.register_forward_hook(lambda _, __, output: seen.append(output.numel()))
    sweep(model, UNEVEN, max_logits=max_logits)
    assert max(seen) <= max(max_logits, 264 * (NUM_LAYERS + 1))
    num_positions = sum(len(sample.completion_token_ids) for sample in UNEVEN)
    assert sum(seen) == 264 * (NUM_LAYERS + 1) * num_positions


def test_between_slices_the_model_is_its_own(model: PeftModel, expected: Scores) -> None:
    untouched = Untouched(model)
    seen: list[Progress] = []

    def watched() -> Generator[Progress, None, Scores]:
        slices = sweep_slices(model, UNEVEN, max_tokens=50)
        while True:
            try:
                seen.append(next(slices))
            except StopIteration as end:
                return end.value
            untouched.check()
            yield seen[-1]

    swept = drain(watched())
    assert worst(swept, expected) < TOLERANCE
    done = [progress.done for progress in seen]
    assert done == sorted(set(done))
    assert done[0] == 0
    assert len(done) > len(UNEVEN) + 1
    assert {progress.total for progress in seen} == {done[-1]} == {swept.size}


def test_nothing_runs_before_the_first_yield(model: PeftModel) -> None:
    with rows_by_layer(model) as seen:
        slices = sweep_slices(model, UNEVEN)
        assert next(slices) == Progress("score", 0, 15)
        assert seen == []
        next(slices)
        assert seen != []


def test_layer_evaluations_are_counted_as_they_are_run(model: PeftModel) -> None:
    *_, last = sweep_slices(model, UNEVEN, max_tokens=60)  # the longest in parts
    with rows_by_layer(model) as seen:
        sweep(model, UNEVEN, max_tokens=60)
    run = sum(num_rows for num_rows, num_tokens in seen if num_tokens > 1)
    assert last.num_layer_evaluations == run > len(UNEVEN) * NUM_LAYERS * (NUM_LAYERS + 3) // 2


@pytest.mark.parametrize("num_slices", [0, 1, 3])
def test_a_closed_sweep_leaves_nothing(model: PeftModel, num_slices: int) -> None:
    untouched = Untouched(model)
    slices = sweep_slices(model, UNEVEN, max_tokens=50)
    for _ in range(num_slices + 1):
        next(slices)
    slices.close()
    untouched.check()


def test_the_limit_of_tokens_is_asked_before_every_slice(
    model: PeftModel, expected: Scores
) -> None:
    limits = itertools.cycle([60, 400, 25, 1, 120])
    limit = [0]

    def ask() -> int:
        limit[0] = next(limits)
        return limit[0]

    run: list[int] = []

    def watched() -> Generator[Progress, None, Scores]:
        slices = sweep_slices(model, UNEVEN * 3, max_tokens=ask)
        while True:
            with rows_by_layer(model) as seen:
                try:
                    yield next(slices)
                except StopIteration as end:
                    return end.value
            widths = [num_rows * num_tokens for num_rows, num_tokens in seen]
            run.append(max(widths, default=0))
            one_row = max((num_tokens for _, num_tokens in seen), default=0)
            assert run[-1] <= max(limit[0], one_row)

    swept = drain(watched())
    assert worst(swept, np.tile(expected, (3, 1))) < TOLERANCE
    assert max(run) > 120
    assert len(set(run)) > 4


def test_a_sample_in_parts_goes_through_its_depths_in_order(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbouring depths share the most layers."""
    parts: list[list[int]] = []
    score_chunk = boundary.sweep._score_chunk

    def spy(decoder: object, samples: object, masks: list[Mask], *rest: object) -> object:
        parts.append([sum(mask) for mask in masks])
        return score_chunk(decoder, samples, masks, *rest)

    monkeypatch.setattr(boundary.sweep, "_score_chunk", spy)
    sweep(model, UNEVEN[:1], max_tokens=2 * 9)
    assert parts == [[0, 1], [2, 3], [4]]


def test_stopping(model: PeftModel) -> None:
    answers = iter([False, True])
    done: list[int] = []
    with pytest.raises(Stopped, match="after 10 of 15 in stage 'score'"):
        sweep(
            model,
            UNEVEN,
            max_tokens=120,
            on_progress=lambda count, _: done.append(count),
            should_stop=lambda: next(answers),
        )
    assert done == [10]
    assert traces(model) == []


class Broken(KLToFull):
    def values(self, *_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken score")


def broken(*_: object) -> None:
    raise RuntimeError("broken layer")


def test_everything_is_restored_after_an_exception(model: PeftModel) -> None:
    input_ids = torch.arange(7).view(1, 7)
    whole = model(input_ids=input_ids).logits
    with pytest.raises(RuntimeError, match="broken score"):
        sweep(model, UNEVEN, score=Broken())
    assert traces(model) == []
    handle = decoder_layers(model)[1][2].mlp.register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="broken layer"):
        sweep(model, UNEVEN)
    handle.remove()
    assert traces(model) == []
    assert torch.equal(model(input_ids=input_ids).logits, whole)


@torch.no_grad()
def test_rows_of_another_kind_over_the_plain_model(model: PeftModel, expected: Scores) -> None:
    plain = build_model(LLAMA)
    swept = sweep(plain, UNEVEN, rows=HookedRows(plain, model))
    assert worst(swept, expected) < TOLERANCE
    assert traces(plain) == []


def test_the_plan_forks_where_masks_differ_first() -> None:
    plan = ForkPlan.of([(False, True, True), (False, True, False), (True, True, False)])
    assert [layer.sources for layer in plan.layers] == [(0, 0), (1, 0), (0, 0, 1)]
    assert [layer.num_lora_groups for layer in plan.layers] == [1, 2, 1]
    assert plan.leaves == (0, 1, 2)
    for num_layers in (1, 2, 16, 32):
        plan = ForkPlan.of(depth_masks(num_layers))
        assert plan.num_layer_evaluations == num_layers * (num_layers + 3) // 2
        assert [layer.num_lora_groups for layer in plan.layers] == [1] * num_layers


def test_a_plan_follows_every_mask() -> None:
    masks = list(itertools.product([False, True], repeat=4))[3:14]
    plan = ForkPlan.of(masks)
    walked: list[Mask] = [()]
    for layer in plan.layers:
        walked = [
            (*walked[source], group < layer.num_lora_groups)
            for group, source in enumerate(layer.sources)
        ]
    assert [walked[leaf] for leaf in plan.leaves] == masks


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        ([], {}, "no samples"),
        ([Sample((), (1,))], {}, "sample 0 has no prompt"),
        ([UNEVEN[0], Sample((1,), ())], {}, "sample 1 has no position to score"),
        (UNEVEN, {"masks": []}, "no masks"),
        (UNEVEN, {"masks": [(True,) * 3]}, "4 values, one a layer, got 3"),
        (UNEVEN, {"max_tokens": 0}, "must be positive: 0"),
        (UNEVEN, {"max_logits": 0}, "must be positive"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    model: PeftModel, samples: Sequence[Sample], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(model, samples, **options)


def test_a_score_that_is_not_finite_names_sample_and_layers(model: PeftModel) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers.2." in name and "lora_B" in name:
                parameter.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"score of sample [012] is nan with LoRA in layers 1110"):
        sweep(model, UNEVEN)


def test_training_mode_is_refused(model: PeftModel) -> None:
    with pytest.raises(ValueError, match="training mode"):
        sweep(model.train(), UNEVEN)


def test_a_plain_model_needs_rows() -> None:
    with pytest.raises(TypeError, match="needs rows"):
        sweep(build_model(LLAMA), UNEVEN)


def test_an_input_that_cannot_be_grown_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    model = adapted(BY_NAME["gemma3n"], "plain", tmp_path)
    with pytest.raises(ValueError, match="layer 0 got hidden states"):
        sweep(model, UNEVEN)
    assert traces(model) == []


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_lora_of_routed_experts_is_refused() -> None:
    config = LoraConfig(
        target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"], lora_dropout=0.0
    )
    model = get_peft_model(build_model(BY_NAME["mixtral"]), config).eval()
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts"):
        sweep(model, UNEVEN)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_variant_that_is_not_known_to_go_by_rows_is_refused() -> None:
    config = LoraConfig(
        target_modules=["q_proj"], alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"
    )
    model = get_peft_model(build_model(LLAMA), config).eval()
    with pytest.raises(ValueError, match="ALoraLinearVariant"):
        sweep(model, UNEVEN)
