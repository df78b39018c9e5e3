"""Makes the demo from nothing: text, tokenizer, base model, three adapters with their held-out
samples.

    python -m server.demo.build [--out DIR] [--seed N] [--quick] [--device DEVICE]

The same seed draws the same data and the same initial weights; the trained weights agree between
machines only as far as their floating point does.
"""

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import cyclopts
import torch
from peft import LoraConfig, PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from server.demo import DATA, held_out_path, model_path, valid_path
from server.demo.arithmetic import word_problem
from server.demo.finetune import finetune, num_finetune_steps
from server.demo.load import load_base
from server.demo.mixture import documents
from server.demo.pirate import rewriting
from server.demo.pretrain import pretrain
from server.demo.recipe import FULL, QUICK, Recipe
from server.demo.restaurants import description
from server.demo.samples import Sample, Split, draw_split, write_samples
from server.demo.tokenizer import train_tokenizer

BASE_NAME = "fathom-demo"
"""What the adapters' configs name as their base: a name, since a path would hold on one machine
only.
"""

TASKS: dict[str, Callable[[Random], Sample]] = {
    "arithmetic": word_problem,
    "pirate": rewriting,
    "restaurant": description,
}


def task_split(name: str, seed: int, recipe: Recipe) -> Split:
    """The samples of one adapter, as `build` draws them."""
    draw = TASKS[name]
    return draw_split(draw, seed, recipe.num_train, recipe.num_valid, recipe.num_test)


def build(out: Path, seed: int, recipe: Recipe, device: str, console: Console) -> None:
    """Writes `out/model` and `out/adapters/*`, replacing what was there."""
    for part in ("model", "adapters"):
        shutil.rmtree(out / part, ignore_errors=True)
    _build_base(out, seed, recipe, device, console)
    for name in TASKS:
        _build_adapter(name, out, seed, recipe, device, console)
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        console.print(f"wrote {path} ({path.stat().st_size:,} bytes)", soft_wrap=True)


def _build_base(out: Path, seed: int, recipe: Recipe, device: str, console: Console) -> None:
    torch.manual_seed(seed)
    tokenizer = _build_tokenizer(seed, recipe)
    with _progress(console, "base model", recipe.num_steps) as on_step:
        model = pretrain(documents(seed), tokenizer, recipe, device, on_step)
    tokenizer.save_pretrained(model_path(out))
    model.save_pretrained(model_path(out))


def _build_tokenizer(seed: int, recipe: Recipe) -> PreTrainedTokenizerFast:
    # A chat is rendered by a tokenizer, and that is what is being made: its messages are read as
    # bare texts.
    read = itertools.islice(documents(seed), recipe.num_tokenizer_documents)
    texts = (
        text
        for document in read
        for text in ([document] if isinstance(document, str) else [m["content"] for m in document])
    )
    return train_tokenizer(texts, recipe.vocab_size, recipe.block_size)


def _build_adapter(
    name: str, out: Path, seed: int, recipe: Recipe, device: str, console: Console
) -> None:
    # From the saved base, so that the adapter learns against the rounded weights that it will be
    # served with.
    base, tokenizer = load_base(out)
    base.to(torch.device(device))  # type: ignore[arg-type]
    split = task_split(name, seed, recipe)
    with _progress(console, f"adapter {name}", num_finetune_steps(recipe)) as on_step:
        adapter = finetune(base, tokenizer, split.train, recipe, seed, on_step)
    folder = valid_path(name, out).parent
    _save_adapter(adapter, folder)
    write_samples(valid_path(name, out), split.valid)
    write_samples(held_out_path(name, out), split.test)


def _save_adapter(adapter: PeftModel, folder: Path) -> None:
    config = adapter.peft_config["default"]
    config.base_model_name_or_path = BASE_NAME
    assert isinstance(config, LoraConfig)
    # PEFT keeps a set, whose order differs from run to run; the same build writes the same bytes.
    config.target_modules = sorted(config.target_modules or ())
    adapter.save_pretrained(str(folder), save_embedding_layers=False)
    # PEFT's empty model card says nothing; the demo's README speaks for all.
    (folder / "README.md").unlink(missing_ok=True)


@contextmanager
def _progress(console: Console, title: str, num_steps: int) -> Iterator[Callable[[float], None]]:
    """A bar with the running loss; prints the last one when done."""
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    ]
    smoothed = float("nan")
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=num_steps, loss=smoothed)

        def on_step(loss: float) -> None:
            nonlocal smoothed
            smoothed = loss if smoothed != smoothed else 0.95 * smoothed + 0.05 * loss
            progress.update(task, advance=1, loss=smoothed)

        yield on_step
    console.print(f"{title}: {num_steps} steps, final training loss {smoothed:.3f}")


def main(*, out: Path = DATA, seed: int = 0, quick: bool = False, device: str = "cpu") -> None:
    """Builds the demo.

    Parameters
    ----------
    out
        Directory to write; the default replaces the shipped files.
    seed
        Seed of the data, the initial weights and the order of the samples.
    quick
        A few steps of a smaller model: tries the build, makes no use of it.
    device
        Torch device that trains.
    """
    # How sums are split over threads changes their last bits, and training magnifies that: with one
    # thread a build comes out the same on machines with any number of cores.
    torch.set_num_threads(1)
    # Its bars for loading some small files would break into ours.
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    build(out, seed, QUICK if quick else FULL, device, Console())


if __name__ == "__main__":
    cyclopts.run(main)
