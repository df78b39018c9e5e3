"""Validation samples: JSON lines or records in memory -> token ids, each failure by its line.

A data set is of one kind: prompts with their completions, chats whose last message is the
completion, or prompts alone for scores that need no labels. Nothing is dropped or repaired: what
cannot be used is an error with its line, and prompts that had to be cut are counted. Knows no
model and no scores. Called by calibration, with a file or with samples that a client sent.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from boundary import strict_json
from boundary.strict_json import shown

MAX_FILE_BYTES = 64 << 20
MAX_SAMPLES = 100_000

Kind = Literal["completion", "chat", "prompt"]

_FIELDS: dict[Kind, tuple[str, ...]] = {
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "prompt": ("prompt",),
}
_MESSAGE_FIELDS = ("role", "content", "name")


class DatasetError(ValueError):
    """A data set that cannot be used.

    line: counted from 1, of the file or of the records; None if it is about all of them.
    field: the JSON field at fault, such as `messages[2].content`, or None.
    """

    def __init__(self, what: str, line: int | None = None, field: str | None = None) -> None:
        about = [] if line is None else [f"line {line}" if field is None else f"line {line}:"]
        super().__init__(" ".join([*about, *([] if field is None else [f"'{field}'"]), what]))
        self.line = line
        self.field = field


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample as a model sees it: the prompt, then what it should be followed by.

    The completion is empty, in both forms, in a data set of prompts alone.
    """

    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]
    completion: str
    """The completion's own text, for metrics of generated text; in a chat without its markup."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """Samples of one kind, in the order they were given.

    fingerprint: "sha256:<hex>" of the samples and their order, whatever the spelling of the JSON.
    truncated_lines: lines whose prompt was cut to fit the context; see `from_records`.
    num_given: records there were; more than samples only if no more were wanted.
    """

    kind: Kind
    samples: tuple[Sample, ...]
    fingerprint: str
    truncated_lines: tuple[int, ...]
    num_given: int


def load(
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    max_len: int,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    max_samples: int = MAX_SAMPLES,
    first: int | None = None,
) -> Dataset:
    """Read a JSONL file, one record a line, as `from_records` does.

    Raises DatasetError also if the file is missing, no regular file, or over a limit, and for a
    line that is blank or not strict JSON in UTF-8.
    """
    try:
        content = strict_json.read_file(Path(path), max_file_bytes)
    except ValueError as error:
        raise DatasetError(str(error)) from error
    return from_jsonl(content, tokenizer, max_len, max_samples=max_samples, first=first)


def from_jsonl(
    content: bytes,
    tokenizer: PreTrainedTokenizerBase,
    max_len: int,
    *,
    max_samples: int = MAX_SAMPLES,
    first: int | None = None,
) -> Dataset:
    """The content of a JSONL file, as `load` reads it."""
    lines = content.split(b"\n")
    if lines[-1] == b"":  # the last line's own end, or an empty file
        lines.pop()
    if len(lines) > max_samples:
        raise DatasetError(f"{len(lines)} lines are over the limit of {max_samples}")
    return _dataset(islice(_parsed(lines), first), tokenizer, max_len, num_given=len(lines))


def from_records(
    records: Sequence[object],
    tokenizer: PreTrainedTokenizerBase,
    max_len: int,
    *,
    max_samples: int = MAX_SAMPLES,
    first: int | None = None,
) -> Dataset:
    """Samples from parsed JSON objects, which all have the fields of the first.

    `{"prompt", "completion"}`: the completion's tokens are those that follow the prompt's own, as
    a server sees them, not what the tokenizer would make of both if they were one text.
    `{"messages"}`: the tokenizer's chat template up to the last message, which is the assistant's,
    is the prompt; what the template makes of that message, up to the end of its turn, is the
    completion. `{"prompt"}`: no completion.

    A sample longer than `max_len` tokens loses the start of its prompt, but not the token that
    begins every text (bos), and its line is in `truncated_lines`. A completion is never cut.

    first: take only so many from the beginning; what comes after is counted, but neither looked at
        nor part of the fingerprint.

    Raises DatasetError, with line and field, for no records or too many, a record that is no
    object, unknown, missing or wrongly typed fields, a second kind, a chat that the template
    refuses, a prompt or completion of no tokens, and a completion that leaves the context no room
    for a prompt.
    """
    if len(records) > max_samples:
        raise DatasetError(f"{len(records)} samples are over the limit of {max_samples}")
    taken = islice(enumerate(records, start=1), first)
    return _dataset(taken, tokenizer, max_len, num_given=len(records))


def _parsed(lines: Sequence[bytes]) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise DatasetError("is blank", number)
        try:
            yield number, strict_json.parse(line)
        except ValueError as error:
            raise DatasetError(str(error), number) from None


def _dataset(
    numbered: Iterable[tuple[int, object]],
    tokenizer: PreTrainedTokenizerBase,
    max_len: int,
    num_given: int,
) -> Dataset:
    if max_len < 2:
        raise ValueError(f"max_len must be at least 2, got {max_len}")
    kind: Kind | None = None
    samples: list[Sample] = []
    truncated: list[int] = []
    digest = hashlib.sha256(b"boundary data set 1\n")
    for line, record in numbered:
        fields, found = _fields(record, line)
        if kind is None:
            kind = found
        elif found != kind:
            given, before = " and ".join(fields), " and ".join(_FIELDS[kind])
            raise DatasetError(f"has {given}, but the lines before have {before}", line)
        text = _chat_text(fields, tokenizer, line) if kind == "chat" else _plain_text(fields, line)
        digest.update(strict_json.canonical(fields) + b"\n")
        sample = _encoded(text, tokenizer, line)
        room = max_len - len(sample.completion_token_ids)
        if room < 1:
            raise DatasetError(
                f"is {len(sample.completion_token_ids)} tokens, which leaves a prompt no room in "
                f"the context of {max_len}",
                line,
                text.completion_field,
            )
        if len(sample.prompt_token_ids) > room:
            truncated.append(line)
        samples.append(_with_prompt_cut(sample, room, tokenizer.bos_token_id))
    if kind is None:
        raise DatasetError("there are no samples")
    fingerprint = f"sha256:{digest.hexdigest()}"
    return Dataset(kind, tuple(samples), fingerprint, tuple(truncated), num_given)


def _fields(record: object, line: int) -> tuple[dict[str, Any], Kind]:
    if not isinstance(record, dict):
        raise DatasetError(f"is not a JSON object: {shown(record)}", line)
    known = {name for names in _FIELDS.values() for name in names}
    for name in record:
        if name not in known:
            raise DatasetError("is no field of a sample", line, str(name)[: strict_json.MAX_SHOWN])
    for kind, names in _FIELDS.items():
        if record.keys() == set(names):
            return record, kind
    if "messages" in record:
        raise DatasetError(
            "stands alone: give messages, or prompt and completion", line, "messages"
        )
    raise DatasetError("is missing", line, "prompt")


@dataclass(frozen=True, slots=True)
class _Text:
    """One sample before it is tokenised.

    rendered: what follows the prompt, the completion with its markup; None without a completion.
    """

    prompt: str
    prompt_field: str
    rendered: str | None
    completion: str
    completion_field: str
    add_special_tokens: bool


def _plain_text(fields: dict[str, Any], line: int) -> _Text:
    for name, value in fields.items():
        _check_text(value, line, name)
    completion = fields.get("completion")
    return _Text(
        fields["prompt"], "prompt", completion, completion or "", "completion",
        add_special_tokens=True,
    )  # fmt: skip


def _chat_text(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase, line: int) -> _Text:
    messages = fields["messages"]
    _check_messages(messages, line)
    if tokenizer.chat_template is None:
        raise DatasetError("needs a chat template, which this tokenizer lacks", line, "messages")
    try:
        prompt = tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True
        )
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise DatasetError(f"is refused by the chat template: {error}", line, "messages") from None
    assert isinstance(prompt, str)
    assert isinstance(whole, str)
    if not whole.startswith(prompt):
        raise DatasetError(
            "cannot be split: this chat template renders a reply otherwise than it prompts for "
            "one; give prompt and completion as text",
            line,
            "messages",
        )
    return _Text(
        prompt,
        "messages",
        whole.removeprefix(prompt),
        messages[-1]["content"],
        f"messages[{len(messages) - 1}].content",
        add_special_tokens=False,  # the template wrote them
    )


def _check_messages(messages: object, line: int) -> None:
    if not isinstance(messages, list):
        raise DatasetError(f"must be a list, got {shown(messages)}", line, "messages")
    if len(messages) < 2:
        raise DatasetError(
            f"must hold a message and its reply, got {len(messages)}", line, "messages"
        )
    for position, message in enumerate(messages):
        path = f"messages[{position}]"
        if not isinstance(message, dict):
            raise DatasetError(f"must be an object, got {shown(message)}", line, path)
        for name in message:
            if name not in _MESSAGE_FIELDS:
                raise DatasetError(f"has an unknown field {shown(name)}", line, path)
        for name in ("role", "content"):
            if name not in message:
                raise DatasetError("is missing", line, f"{path}.{name}")
        for name, value in message.items():
            _check_text(value, line, f"{path}.{name}")
    if messages[-1]["role"] != "assistant":
        raise DatasetError(
            f"must be 'assistant' in the last message, got {shown(messages[-1]['role'])}",
            line,
            f"messages[{len(messages) - 1}].role",
        )


def _check_text(value: object, line: int, field: str) -> None:
    if not isinstance(value, str):
        raise DatasetError(f"must be a string, got {shown(value)}", line, field)
    try:
        strict_json.canonical(value)
    except ValueError as error:
        raise DatasetError(str(error), line, field) from None


def _encoded(text: _Text, tokenizer: PreTrainedTokenizerBase, line: int) -> Sample:
    def encode(part: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = tokenizer.encode(part, add_special_tokens=add_special_tokens)
        return ids

    prompt_ids = encode(text.prompt, add_special_tokens=text.add_special_tokens)
    if not prompt_ids:
        raise DatasetError("encodes to no token", line, text.prompt_field)
    if text.rendered is None:
        return Sample(tuple(prompt_ids), (), "")
    if not encode(text.completion, add_special_tokens=False):
        raise DatasetError("encodes to no token", line, text.completion_field)
    # In the context of its prompt, where that leaves the prompt's tokens alone: many tokenizers
    # put a space before a text that they see on its own.
    together = encode(text.prompt + text.rendered, add_special_tokens=text.add_special_tokens)
    if together[: len(prompt_ids)] == prompt_ids and len(together) > len(prompt_ids):
        completion_ids = together[len(prompt_ids) :]
    else:
        completion_ids = encode(text.rendered, add_special_tokens=False)
    if text.prompt_field == "messages" and tokenizer.eos_token_id in completion_ids:
        # What a template writes after the end of a turn is never generated.
        after = completion_ids[::-1].index(tokenizer.eos_token_id)
        completion_ids = completion_ids[: len(completion_ids) - after]
    return Sample(tuple(prompt_ids), tuple(completion_ids), text.completion)


def _with_prompt_cut(sample: Sample, room: int, bos_token_id: int | None) -> Sample:
    """The sample with the last of its prompt's tokens that fit, after its first if that is bos."""
    prompt_ids = sample.prompt_token_ids
    if len(prompt_ids) <= room:
        return sample
    begins = prompt_ids[:1] if prompt_ids[0] == bos_token_id else ()
    kept = (*begins, *prompt_ids[len(prompt_ids) - room + len(begins) :])
    return replace(sample, prompt_token_ids=kept)
