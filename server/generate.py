"""`fathom generate`: one prompt at several depths in one batch, side by side.

Every depth gets the same seed, so that depth alone makes the texts differ; with temperature 0, the
default, nothing is random at all.
"""

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.config import ConfigError, Settings
from server.engine.protocol import Engine
from server.engine.request import LoraSelection, Request, SamplingParams
from server.errors import BadRequest, NotFound
from server.loading import load_engine, with_demo
from server.logs import configure_logs

Depth = int | Literal["auto", "full"]


@dataclass(frozen=True, slots=True)
class Continuation:
    """What one adapter at one depth made of the prompt."""

    adapter: str | None
    depth: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    num_shared_tokens: int | None
    """Leading tokens in common with the depth before it; None for an adapter's first depth."""


def generate(
    settings: Settings,
    *,
    prompt: str,
    names: Sequence[str],
    depths: Sequence[str],
    sampling: SamplingParams,
    chat: bool,
    as_json: bool,
) -> int:
    """Print the continuations by `names` (default: the first adapter) at `depths`."""
    configure_logs("warning")
    wanted = parse_depths(depths)
    engine = load_engine(with_demo(settings))
    try:
        token_ids = prompt_token_ids(engine, prompt, chat=chat)
        room = engine.info.max_model_len - len(token_ids)
        if sampling.max_tokens > room:
            raise ConfigError(
                f"--max-tokens: {sampling.max_tokens} and a prompt of {len(token_ids)} tokens"
                f" are over the model's {engine.info.max_model_len}"
            )
        found = asyncio.run(continue_prompt(engine, token_ids, names, wanted, sampling))
    finally:
        engine.shutdown()
    if as_json:
        sys.stdout.write(json.dumps([asdict(continuation) for continuation in found]) + "\n")
    else:
        show(found, engine.info.num_layers)
    return 0


def parse_depths(texts: Sequence[str]) -> list[Depth]:
    """`["0,4", "full"]` as `[0, 4, "full"]`. Raises ConfigError."""
    named: dict[str, Depth] = {"auto": "auto", "full": "full"}
    depths: list[Depth] = []
    for word in ",".join(texts).split(",") if texts else ():
        word = word.strip()
        if word in named:
            depths.append(named[word])
        elif word.isascii() and word.isdigit():
            depths.append(int(word))
        else:
            raise ConfigError(f"--depth: should be a number, auto or full (given {word!r})")
    return depths


def prompt_token_ids(engine: Engine, prompt: str, *, chat: bool) -> tuple[int, ...]:
    """The prompt as the model reads it, through its chat template where `chat` is set."""
    tokenizer = engine.tokenizer
    if not chat:
        ids = tokenizer(prompt)["input_ids"]
    elif tokenizer.chat_template is None:
        raise BadRequest(f"{engine.info.name} has no chat template; leave out --chat")
    else:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise BadRequest("the prompt has no tokens", param="prompt")
    return tuple(ids)


async def continue_prompt(
    engine: Engine,
    token_ids: tuple[int, ...],
    names: Sequence[str],
    depths: Sequence[Depth],
    sampling: SamplingParams,
) -> list[Continuation]:
    """Ask for every adapter and depth at once; the engine batches what it can."""
    known = [adapter.name for adapter in engine.adapters()]
    if not names and known:
        names = known[:1]
        if len(known) > 1:
            sys.stderr.write(f"asking {known[0]}; --name also knows: {', '.join(known[1:])}\n")
    middle = (engine.info.num_layers + 1) // 2
    selections: dict[tuple[str, int], LoraSelection] = {}
    for name in names or [engine.info.name]:
        for depth in depths or ([0, middle, "full"] if names else [0]):
            try:
                selection = await engine.select(name, depth)
            except NotFound as error:
                loaded = ", ".join(known) or "none"
                raise NotFound(f"{error.message}; adapters loaded: {loaded}") from error
            selections.setdefault((name, selection.depth), selection)
    outputs = await asyncio.gather(
        *(
            _continue(engine, Request(f"generate-{index}", token_ids, sampling, selection))
            for index, selection in enumerate(selections.values())
        )
    )
    found: list[Continuation] = []
    for selection, (text, ids, finish_reason) in zip(selections.values(), outputs, strict=True):
        adapter = None if selection.adapter is None else selection.adapter.name
        before = found[-1] if found and found[-1].adapter == adapter else None
        shared = None if before is None else num_shared(before.token_ids, ids)
        found.append(Continuation(adapter, selection.depth, text, ids, finish_reason, shared))
    return found


async def _continue(engine: Engine, request: Request) -> tuple[str, tuple[int, ...], str | None]:
    text, token_ids, finish_reason = "", list[int](), None
    async for output in engine.generate(request):
        if output.error is not None:
            raise output.error
        for delta in output.deltas:
            text += delta.text
            token_ids.extend(delta.token_ids)
            finish_reason = delta.finish_reason or finish_reason
    return text, tuple(token_ids), finish_reason


def num_shared(first: Sequence[object], second: Sequence[object]) -> int:
    """How many leading items two sequences have in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def show(found: Sequence[Continuation], num_layers: int) -> None:
    """One table an adapter and one column a depth; what a column repeats of the last is dim."""
    console = Console()
    for adapter in dict.fromkeys(continuation.adapter for continuation in found):
        columns = [continuation for continuation in found if continuation.adapter == adapter]
        table = Table(title=adapter or "base model", expand=True)
        cells = []
        for position, column in enumerate(columns):
            before = columns[position - 1] if position else None
            table.add_column(heading(column, before, num_layers), ratio=1, overflow="fold")
            same = 0 if before is None else num_shared(before.text, column.text)
            cells.append(f"[dim]{escape(column.text[:same])}[/]{escape(column.text[same:])}")
        table.add_row(*cells)
        console.print(table)


def heading(column: Continuation, before: Continuation | None, num_layers: int) -> str:
    """The depth, and after how many tokens the text parts from the column on its left."""
    depth = f"depth {column.depth} of {num_layers}"
    if before is None:
        return depth
    if column.token_ids == before.token_ids:
        return f"{depth}\nequal to depth {before.depth}"
    return f"{depth}\nparts from depth {before.depth} after {column.num_shared_tokens} tokens"
