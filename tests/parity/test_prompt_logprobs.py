"""Every prompt position's distribution, at every depth, is PEFT's: `lm_head` sees all rows then."""

from dataclasses import replace

import torch

from server.engine.request import Request
from tests.parity.conftest import AdapterPath, ModelPath, OracleOf
from tests.parity.generation import MAX_STEPS, greedy, open_core
from tests.parity.zoo import NUM_LAYERS, VOCAB_SIZE, random_prompt

VARIANTS = ("plain", "lm_head", "lm_head_and_low_layers", "embedding")
LOGPROBS_ATOL = 1e-4


def test_prompt_logprobs_of_mixed_requests_equal_peft(
    model_path: ModelPath, adapter_path: AdapterPath, oracle_of: OracleOf
) -> None:
    prompt = random_prompt(40, seed=11)
    cells = [(variant, depth) for variant in VARIANTS for depth in range(NUM_LAYERS + 1)]
    scored: dict[str, torch.Tensor] = {}
    with open_core(model_path("llama"), kv_cache_bytes=192 << 10, max_num_seqs=6) as core:
        for variant in VARIANTS:
            core.registry.load(variant, adapter_path("llama", variant))
        for index, (variant, depth) in enumerate(cells):
            request: Request = greedy(
                f"{variant}@{depth}", prompt, core.registry.select(variant, depth), 12
            )
            if index % 4:  # the others only generate, between those that score
                sampling = replace(request.sampling, prompt_logprobs=VOCAB_SIZE)
                request = replace(request, sampling=sampling)
            core.add(request)
        for _ in range(MAX_STEPS):
            if not core.has_work:
                break
            for output in core.step():
                if output.prompt_logprobs is not None:
                    assert output.request_id not in scored, "sent once"
                    assert output.prompt_logprobs[0] is None
                    rows = torch.empty(len(prompt) - 1, VOCAB_SIZE)
                    for row, position in zip(rows, output.prompt_logprobs[1:], strict=True):
                        assert position is not None
                        ids, values = zip(*position.top, strict=True)
                        row[list(ids)] = torch.tensor(values)
                    scored[output.request_id] = rows
        assert core.stats().num_preemptions > 0
    wanted = [cell for index, cell in enumerate(cells) if index % 4]
    assert set(scored) == {f"{variant}@{depth}" for variant, depth in wanted}
    for variant, depth in wanted:
        expected = oracle_of("llama", variant).logits(prompt, depth)[:-1].log_softmax(-1)
        error = (scored[f"{variant}@{depth}"] - expected).abs().max()
        assert error <= LOGPROBS_ATOL, (variant, depth)
