"""Measures what a depth does to the demo's adapters, on samples that no training saw.

    python -m server.demo.evaluate [--data DIR] [--json FILE] [--num-samples N]

For each adapter and each depth from 0 to all layers: the mean loss of a completion token, and the
share of greedy completions that equal the expected one to the character. Plain PEFT in float32,
not the server's engine.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import cyclopts
import torch
from peft import PeftModel
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from boundary.depth import lora_depth, num_decoder_layers
from server.demo import DATA, adapters, held_out_path
from server.demo.completion import IGNORED, as_batch, plain_ids
from server.demo.load import load_adapted
from server.demo.samples import Sample, read_samples


@dataclass(frozen=True)
class Score:
    """One adapter at one depth: loss in nats per completion token, exact match from 0 to 1."""

    depth: int
    loss: float
    exact_match: float


Scores = dict[str, list[Score]]
"""By adapter, ordered by depth from 0."""


@torch.inference_mode()
def completion_loss(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, samples: list[Sample]
) -> float:
    """Mean negative log-likelihood of a token, over all completions with their `eos`."""
    batch = as_batch([plain_ids(sample, tokenizer) for sample in samples], tokenizer.pad_token_id)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED
    )
    return loss.item()


@torch.inference_mode()
def greedy_completions(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, samples: list[Sample]
) -> list[str]:
    """What the model writes after each prompt until `eos`, or until it is longer than any
    expected text.
    """
    max_length = max(len(plain_ids(sample, tokenizer)[1]) for sample in samples)
    prompts = tokenizer([sample.prompt for sample in samples], padding=True, return_tensors="pt")
    output = model.generate(  # type: ignore[no-untyped-call]
        input_ids=prompts["input_ids"],
        attention_mask=prompts["attention_mask"],
        max_new_tokens=max_length + 1,
        do_sample=False,
    )
    completions = output[:, prompts["input_ids"].shape[1] :]
    return list(tokenizer.batch_decode(completions, skip_special_tokens=True))


def score(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, samples: list[Sample], depth: int
) -> Score:
    """Loss and exact match at one depth."""
    with lora_depth(model, depth):
        loss = completion_loss(model, tokenizer, samples)
        completions = greedy_completions(model, tokenizer, samples)
    pairs = zip(completions, samples, strict=True)
    num_matches = sum(text == sample.completion for text, sample in pairs)
    return Score(depth, round(loss, 4), round(num_matches / len(samples), 4))


def evaluate(data: Path, num_samples: int | None, on_score: Callable[[str, Score], None]) -> Scores:
    """Every adapter of a build at every depth, on its first `num_samples` test samples (None:
    all).
    """
    scores: Scores = {}
    for name in adapters(data):
        model, tokenizer = load_adapted(name, data)
        samples = read_samples(held_out_path(name, data))[:num_samples]
        scores[name] = []
        for depth in range(num_decoder_layers(model) + 1):
            scores[name].append(score(model, tokenizer, samples, depth))
            on_score(name, scores[name][-1])
    return scores


def rows(scores: Scores) -> list[list[str]]:
    """The header and one row a depth: loss and exact match of each adapter, as text."""
    header = ["depth", *(f"{name} {figure}" for name in scores for figure in ("loss", "exact"))]
    by_depth = zip(*scores.values(), strict=True)
    body = [
        [
            str(at_depth[0].depth),
            *(text for one in at_depth for text in (f"{one.loss:.3f}", f"{one.exact_match:.1%}")),
        ]
        for at_depth in by_depth
    ]
    return [header, *body]


def as_markdown(scores: Scores) -> str:
    """The table as the demo's README shows it."""
    header, *body = rows(scores)
    lines = [header, ["---:"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read_scores(path: Path) -> Scores:
    """Reads what `--json` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return {name: [Score(**one) for one in scores] for name, scores in content.items()}


def write_scores(path: Path, scores: Scores) -> None:
    """Writes `{adapter: [{"depth", "loss", "exact_match"}, ...]}`."""
    content = {name: [asdict(one) for one in of_name] for name, of_name in scores.items()}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main(*, data: Path = DATA, json: Path | None = None, num_samples: int | None = None) -> None:
    """Scores every adapter of a build at every depth.

    Parameters
    ----------
    data
        Directory of the build; the default is the shipped one.
    json
        File to write the scores to.
    num_samples
        Test samples to use for each adapter; the default is all.
    """
    console = Console()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("depths", total=None)

        def on_score(name: str, one: Score) -> None:
            progress.update(task, advance=1, description=f"{name} at depth {one.depth}")

        scores = evaluate(data, num_samples, on_score)
    header, *body = rows(scores)
    table = Table(*header, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for line in body:
        table.add_row(*line)
    console.print(table)
    if json is not None:
        write_scores(json, scores)
        console.print(f"wrote {json}")


if __name__ == "__main__":
    cyclopts.run(main)
