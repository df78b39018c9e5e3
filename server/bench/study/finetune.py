"""Trains one LoRA adapter on prompts and completions: `python -m server.bench.study.finetune`.

Plain PEFT and transformers: every linear module but the output head, loss on the completion and its
end of sequence alone, AdamW with warm-up and a cosine down to nothing. Float32 on one thread, so that
the same command writes the same weights on machines of one kind. Tokens are those that calibration
will see: both read a file through `boundary.dataset`.
"""

import json
import random
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import torch
from cyclopts import Parameter
from cyclopts.validators import Number
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
)
from transformers.utils import logging as transformers_logging

from boundary.dataset import Dataset, DatasetError, Sample, load
from server.bench.report import versions
from server.model.loader import max_position

IGNORED = -100
"""The label that the loss of transformers leaves out."""

_POSITIVE = Parameter(validator=Number(gte=1))
_WARMUP_SHARE = 0.05
_MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train. The defaults suit models of a few million parameters at most."""

    rank: Annotated[int, _POSITIVE] = 8
    """LoRA rank, the same for every module."""
    alpha: Annotated[int, _POSITIVE] = 16
    """LoRA alpha; the scaling is alpha / rank."""
    epochs: Annotated[int, _POSITIVE] = 10
    """How often each sample is read."""
    lr: Annotated[float, Parameter(validator=Number(gt=0, lt=1))] = 2e-3
    """Highest learning rate."""
    batch_size: Annotated[int, _POSITIVE] = 16
    """Samples in one step."""
    seed: Annotated[int, Parameter(validator=Number(gte=0))] = 0
    """Of the initial weights and the order of the samples."""


_DEFAULTS = Recipe()


def train(
    base: PreTrainedModel,
    samples: Sequence[Sample],
    eos_token_id: int | None,
    recipe: Recipe,
    on_epoch: Callable[[int, float], None],
) -> PeftModel:
    """An adapter on `base`, which is wrapped in place and whose own weights stay.

    `on_epoch(number, loss)` counts from 1; the loss is the mean over batches, before their updates.
    """
    rng = random.Random(recipe.seed)
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=0.0)
    num_steps = recipe.epochs * -(-len(samples) // recipe.batch_size)
    schedule = get_cosine_schedule_with_warmup(
        optimizer, int(_WARMUP_SHARE * num_steps) + 1, num_steps
    )
    model.train()
    for epoch in range(1, recipe.epochs + 1):
        order = rng.sample(list(samples), len(samples))
        losses = []
        for start in range(0, len(order), recipe.batch_size):
            batch = collate(order[start : start + recipe.batch_size], eos_token_id)
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, _MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        on_epoch(epoch, sum(losses) / len(losses))
    return model.eval()


def collate(samples: Sequence[Sample], eos_token_id: int | None) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, int64 `[num_samples, longest]`, padded on the right."""
    ends = [] if eos_token_id is None else [eos_token_id]
    completions = [[*sample.completion_token_ids, *ends] for sample in samples]
    longest = max(
        len(s.prompt_token_ids) + len(c) for s, c in zip(samples, completions, strict=True)
    )
    input_ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, (sample, completion) in enumerate(zip(samples, completions, strict=True)):
        start = len(sample.prompt_token_ids)
        end = start + len(completion)
        input_ids[row, :end] = torch.tensor([*sample.prompt_token_ids, *completion])
        attention_mask[row, :end] = 1
        labels[row, start:end] = torch.tensor(completion)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def save(model: PeftModel, out: Path, facts: dict[str, Any]) -> None:
    """The checkpoint, and `training.json` beside it."""
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    # PEFT keeps a set, whose order differs from run to run; the same training writes the same bytes.
    config.target_modules = sorted(config.target_modules or ())
    model.save_pretrained(str(out), save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")


def read_base(model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """In float32. Raises OSError or ValueError where there is none."""
    base = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    assert isinstance(base, PreTrainedModel)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return base, tokenizer


def read_samples(path: Path, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Completions, each with room for its end of sequence. Raises DatasetError."""
    dataset = load(path, tokenizer, max_position(base.config.get_text_config()) - 1)
    if dataset.kind == "prompt":
        raise DatasetError("has no completions, of which training is made", 1)
    return dataset


def main(
    model: str,
    *,
    data: Path,
    out: Path,
    max_samples: Annotated[int | None, _POSITIVE] = None,
    recipe: Annotated[Recipe, Parameter(name="*")] = _DEFAULTS,
) -> int:
    """Train an adapter and write it as a PEFT checkpoint.

    Parameters
    ----------
    model
        Directory or hub id of the base model.
    data
        JSON lines of prompt and completion, or of chat messages.
    out
        Directory to write.
    max_samples
        Train with the first so many samples; the default is all.
    """
    torch.set_num_threads(1)  # how sums are split over threads changes their last bits
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        base, tokenizer = read_base(model)
        dataset = read_samples(data, base, tokenizer)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    samples = dataset.samples[:max_samples]
    if dataset.truncated_lines:
        sys.stderr.write(f"the prompts of {len(dataset.truncated_lines)} samples were cut to fit\n")
    losses: list[float] = []

    def on_epoch(epoch: int, loss: float) -> None:
        losses.append(loss)
        sys.stderr.write(f"epoch {epoch}/{recipe.epochs}: loss {loss:.4f}\n")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks on hub files that are not there
        adapted = train(base, samples, tokenizer.eos_token_id, recipe, on_epoch)
        facts = {
            "recipe": asdict(recipe),
            "num_samples": len(samples),
            "data": {"name": data.name, "fingerprint": dataset.fingerprint},
            "loss_by_epoch": losses,
            "versions": versions(),
        }
        save(adapted, out, facts)
    sys.stdout.write(f"wrote {out}\n")
    return 0


if __name__ == "__main__":
    cyclopts.run(main)
