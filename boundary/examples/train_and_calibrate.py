"""Train an adapter with PEFT, find how deep it has to reach, and publish it with the evidence.

    python -m boundary.examples.train_and_calibrate --model MODEL --train train.jsonl --valid valid.jsonl \
        --out my-adapter [--push NAME/REPOSITORY]

Both files hold one sample a line, `{"prompt": ..., "completion": ...}` or `{"messages": [...]}`, and
must share none: a depth that was chosen on what the adapter learnt by heart says nothing.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

import boundary
from boundary import dataset


def main(arguments: Sequence[str] | None = None) -> boundary.Calibrated:
    """The five steps, in order."""
    given = parse(arguments)

    # 1. A base model with a fresh adapter.
    tokenizer = AutoTokenizer.from_pretrained(given.model, trust_remote_code=False)
    base = AutoModelForCausalLM.from_pretrained(
        given.model, trust_remote_code=False, use_safetensors=True
    )
    config = LoraConfig(
        r=given.rank, lora_alpha=2 * given.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)  # not PEFT's mixed model, which was not asked for

    # 2. Train it, as anybody would; nothing here knows of depths.
    train(model, tokenizer, given.train, given.steps, given.learning_rate)
    model.save_pretrained(given.out)

    # 3. Find its depth from samples that it has not seen.
    options = boundary.CalibrationOptions(tolerance=given.tolerance)
    found = boundary.calibrate(model, tokenizer, given.valid, options, name=given.out.name)
    print(found)

    # 4. Put the record beside the weights, and what it says into the model card.
    if found.record is not None:
        print("wrote", found.save(given.out))
        print("wrote", found.update_card(given.out))

    # 5. Publish all of it, if that was asked for.
    if given.push is not None:
        print("pushed to", push(given.out, given.push, HfApi()))
    return found


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    num_steps: int,
    learning_rate: float,
) -> None:
    """Some steps of ordinary fine-tuning, with a loss on the completions alone."""
    samples = dataset.load(path, tokenizer, max_len=512).samples
    features = [
        {
            "input_ids": [*sample.prompt_token_ids, *sample.completion_token_ids],
            "labels": [-100] * len(sample.prompt_token_ids) + [*sample.completion_token_ids],
        }
        for sample in samples
    ]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    with tempfile.TemporaryDirectory() as checkpoints:
        Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=checkpoints,
                max_steps=num_steps,
                per_device_train_batch_size=8,
                learning_rate=learning_rate,
                logging_steps=max(1, num_steps // 4),
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=features,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        ).train()


def push(adapter: Path, repository: str, hub: HfApi) -> str:
    """Upload the adapter's directory, record and card with the weights; returns the page's address."""
    hub.create_repo(repository, exist_ok=True)
    hub.upload_folder(
        repo_id=repository, folder_path=adapter, commit_message="Adapter with its calibrated depth"
    )
    return f"{hub.endpoint}/{repository}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What is typed."""
    parser = argparse.ArgumentParser(description="Train an adapter, calibrate it, publish it.")
    parser.add_argument("--model", required=True, help="base model: a directory or a hub id")
    parser.add_argument("--train", type=Path, required=True, help="samples to learn, JSONL")
    parser.add_argument("--valid", type=Path, required=True, help="other samples, JSONL")
    parser.add_argument("--out", type=Path, required=True, help="directory of the new adapter")
    parser.add_argument("--push", metavar="NAME/REPOSITORY", help="publish it on the hub")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--tolerance", type=float, default=0.0, help="loss not worth more depth")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
