"""Static batches of transformers or PEFT in a process of their own, asked by pipe.

`generate` is the base model alone, `peft` its adapters. One line of JSON in, `{"items": [[prompt,
output_len, adapter], ...], "batch": n}`, one line out, with the seconds that the batches took. Run with
Fathom's interpreter, whose `server.bench.baseline` is what completes a batch.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from server.bench.baseline import GenerateBaseline, PeftBaseline, run_batches
from server.bench.mix import Choice
from server.bench.workload import WorkItem


class FastestPeft(PeftBaseline):
    """`adapter_names` only where a batch mixes adapters; otherwise the one is made the active one."""

    def _selection(self, batch: Sequence[WorkItem]) -> dict[str, Any]:
        choices = {item.choice for item in batch}
        if len(choices) > 1:
            return super()._selection(batch)
        self._model.set_adapter(self._names[choices.pop()], inference_mode=True)
        return {}


class Recorded:
    """A `StaticModel` whose answers are kept by prompt, since `run_batches` sorts what it is given."""

    def __init__(self, model: GenerateBaseline) -> None:
        self.name = model.name
        self.log_probabilities = model.log_probabilities
        self.answers: dict[tuple[int, ...], list[int]] = {}
        self._model = model

    def complete(self, batch: Sequence[WorkItem]) -> list[list[int]]:
        """See `StaticModel.complete`."""
        completions = self._model.complete(batch)
        self.answers.update(zip((item.prompt for item in batch), completions, strict=True))
        return completions


def load(directory: str, adapters: dict[str, Path]) -> GenerateBaseline:
    """The float32 model, with adapters where there are any."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    if not adapters:
        made = GenerateBaseline(model)
    else:
        made = FastestPeft(model, adapters, [Choice(name) for name in adapters])
    model.requires_grad_(True)  # see `server.bench.baseline.load_baselines`
    return made


def answer(model: GenerateBaseline, request: dict[str, Any]) -> dict[str, Any]:
    """One request's answer."""
    items = [
        WorkItem(tuple(prompt), output_len, Choice(adapter))
        for prompt, output_len, adapter in request["items"]
    ]
    recorded = Recorded(model)
    result = run_batches(recorded, items, request["batch"], is_open=False)
    completions = [recorded.answers[item.prompt] for item in items]
    return {"duration_s": result.duration_s, "completions": completions}


def say(found: dict[str, Any]) -> None:
    """One line on standard output."""
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", action="append", default=[], help="NAME=PATH")
    given = parser.parse_args()
    pairs = (pair.split("=", 1) for pair in given.adapter)
    loaded = load(given.model, {name: Path(path) for name, path in pairs})
    say({"is_ready": True})
    for line in sys.stdin:
        say(answer(loaded, json.loads(line)))
