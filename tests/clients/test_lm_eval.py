"""lm-evaluation-harness as it is, against the server; its own `hf` backend over PEFT is the oracle."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from boundary.depth import lora_depth
from server import demo
from tests.clients.conftest import API_KEY
from tests.live.process import LiveServer

ADAPTER = "arithmetic"
NUM_DOCS = 6
TOLERANCE = 5e-4
"""Of a sum of some sixty log-probabilities in float32; two depths differ by whole units."""

DATA = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
"""
TASKS = {
    "demo_choice": """
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "demo_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
    "demo_generate": """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: answer
generation_kwargs: {until: ["\\n"], max_gen_toks: 32, do_sample: false, temperature: 0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
SCORED = ["demo_choice", "demo_rolling"]


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of local files: a problem's answer beside the next one's, whole texts, and answers."""
    folder = tmp_path_factory.mktemp("tasks")
    with demo.held_out_path(ADAPTER).open(encoding="utf-8") as file:
        samples = [json.loads(line) for line, _ in zip(file, range(NUM_DOCS), strict=False)]
    rows = [
        {
            "prompt": sample["prompt"],
            "choices": [sample["completion"], other["completion"]],
            "gold": 0,
            "answer": sample["completion"].strip(),
            "text": sample["prompt"] + sample["completion"],
        }
        for sample, other in zip(samples, [*samples[1:], samples[0]], strict=True)
    ]
    data = folder / "samples.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        text = f"task: {name}{DATA.format(file=data)}{text}"
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def tuned() -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(demo.model_path(), dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(demo.adapters()[ADAPTER]))


def evaluate(model: Any, tasks: Iterable[str], folder: Path, **more: Any) -> dict[str, Any]:
    """The harness's results: metrics by task, and each sample's responses."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=manager,
        bootstrap_iters=0,
        cache_requests=False,
        **more,
    )
    assert found is not None
    return found


def responses(found: dict[str, Any], task: str) -> list[Any]:
    return [answer for sample in found["samples"][task] for (answer,) in sample["resps"]]


def close(ours: list[Any], theirs: list[Any]) -> bool:
    """Log-likelihoods, alone or each with whether it was greedy."""
    flat = [pair if isinstance(pair, tuple | list) else (pair, None) for pair in ours]
    other = [pair if isinstance(pair, tuple | list) else (pair, None) for pair in theirs]
    return len(flat) == len(other) and all(
        abs(a[0] - b[0]) < TOLERANCE and a[1] == b[1] for a, b in zip(flat, other, strict=True)
    )


def over_http(base_url: str, model: str, **more: Any) -> dict[str, Any]:
    given = {"model": model, "base_url": f"{base_url}/completions", "max_length": 512}
    return given | {"tokenizer": str(demo.model_path()), "add_bos_token": True} | more


def oracle(model: PeftModel) -> HFLM:
    """The harness's own backend, which begins with what the tokenizer begins with by default."""
    return HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(demo.model_path()))


@pytest.mark.parametrize("concurrent", [1, 4])
@pytest.mark.parametrize("depth", [0, 4, 12])
def test_log_likelihoods_are_those_of_the_hf_backend(
    base_url: str, tuned: PeftModel, task_folder: Path, depth: int, concurrent: int
) -> None:
    arguments = over_http(base_url, f"{ADAPTER}@{depth}", num_concurrent=concurrent)
    ours = evaluate("local-completions", SCORED, task_folder, model_args=arguments)
    with lora_depth(tuned, depth):
        theirs = evaluate(oracle(tuned), SCORED, task_folder)
    for task in SCORED:
        assert close(responses(ours, task), responses(theirs, task)), task
    assert ours["results"]["demo_choice"] == theirs["results"]["demo_choice"]
    # The control: another depth is another model, and this comparison tells them apart.
    with lora_depth(tuned, 8):
        others = evaluate(oracle(tuned), SCORED, task_folder)
    assert not any(close(responses(ours, task), responses(others, task)) for task in SCORED)


def test_a_batch_of_prompts_in_one_request(base_url: str, task_folder: Path) -> None:
    arguments = over_http(base_url, ADAPTER)
    single = evaluate("local-completions", SCORED, task_folder, model_args=arguments)
    batched = evaluate("local-completions", SCORED, task_folder, model_args=arguments, batch_size=4)
    for task in SCORED:
        assert close(responses(single, task), responses(batched, task)), task


@pytest.mark.parametrize("depth", [4, 12])
def test_generations_are_those_of_the_hf_backend(
    base_url: str, tuned: PeftModel, task_folder: Path, depth: int
) -> None:
    arguments = over_http(base_url, f"{ADAPTER}@{depth}")
    ours = evaluate("local-completions", ["demo_generate"], task_folder, model_args=arguments)
    with lora_depth(tuned, depth):
        theirs = evaluate(oracle(tuned), ["demo_generate"], task_folder)
    assert responses(ours, "demo_generate") == responses(theirs, "demo_generate")


def test_chat_is_evaluated_without_a_tokenizer(base_url: str, task_folder: Path) -> None:
    """The adapter knows the answers; at depth 0, which is the base model, nobody does."""
    scores = {}
    for model in (ADAPTER, f"{ADAPTER}@0"):
        found = evaluate(
            "local-chat-completions",
            ["demo_generate"],
            task_folder,
            model_args={"model": model, "base_url": f"{base_url}/chat/completions"},
            apply_chat_template=True,
        )
        scores[model] = found["results"]["demo_generate"]["exact_match,none"]
    assert scores == {ADAPTER: 1.0, f"{ADAPTER}@0": 0.0}


def test_the_command_needs_neither_a_tokenizer_nor_a_network(
    server: LiveServer, task_folder: Path, tmp_path: Path
) -> None:
    """The harness finds the server's own tokenizer, as vLLM offers it."""
    arguments = f"model={ADAPTER}@full,base_url={server.url}/v1/completions,auth_token={API_KEY}"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"]
    command += ["--model_args", arguments, "--tasks", "demo_choice", "--include_path"]
    command += [str(task_folder), "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Using remote tokenizer" in done.stdout + done.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["demo_choice"]["acc,none"] == 1.0
