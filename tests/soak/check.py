"""What must hold of a soak, each rule by itself. Knows no server: it is given what was seen.

Every rule says what breaks it, one line a finding; no findings, no fault.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from tests.soak.record import Record, References, Timelines, answer_of
from tests.soak.served import Metrics, total
from tests.soak.site import BASE, BASE_CONTENT

OVERLOADED = {
    503: {"queue_full", "queue_timeout"},
    504: {"timeout"},
}
"""The server errors that are documented answers to load, by status."""
BY_THEMSELVES = ("length", "stop")
NEVER_CAME = "queue_full"
"""How a request ends of which the engine had not every prompt."""
MAX_GROWTH = 0.02


def ended_once(records: Iterable[Record]) -> Iterator[str]:
    """Each request has one end, unless its client left before; nothing comes after it."""
    for record in records:
        if record.broke is not None:
            yield f"{record.id}: the connection failed: {record.broke}"
        elif record.num_ends == 0 and not record.has_left:
            yield f"{record.id}: never ended"
        elif record.num_ends > 1:
            yield f"{record.id}: ended {record.num_ends} times"
        if record.num_late:
            yield f"{record.id}: {record.num_late} events came after the end"
        if record.is_whole and not all(r in BY_THEMSELVES for r in record.reasons):
            yield f"{record.id}: a sequence of a whole answer ended by {record.reasons}"
        if record.is_whole and len(record.texts) != record.wish.num_sequences:
            yield f"{record.id}: {len(record.texts)} of {record.wish.num_sequences} sequences"


def answered_as_documented(records: Iterable[Record]) -> Iterator[str]:
    """No status but 200, what this key and model may be refused with, and what a full server says."""
    for record in records:
        status, code = record.status, record.code
        if status is None or status in record.wish.allowed:
            pass
        elif status == 200 and code is not None:
            if code not in OVERLOADED[503] | OVERLOADED[504]:
                yield f"{record.id}: a stream ended with {code}"
        elif status != 200 and code not in OVERLOADED.get(status, ()):
            yield f"{record.id}: status {status} {code} for {record.wish}"
        if status in (429, 503) and not record.retry_after:
            yield f"{record.id}: status {status} without Retry-After"


def answers_are_right(
    records: Iterable[Record], references: References, timelines: Timelines
) -> tuple[int, list[str]]:
    """How many sequences were compared, and which differ from every content that its name had then."""
    num_compared, wrong = 0, []
    for record in records:
        wish = record.wish
        if not wish.is_greedy or record.depth is None:
            continue
        if wish.name == BASE or record.depth == 0:
            contents: Sequence[Any] = [BASE_CONTENT]
        else:
            contents = timelines[wish.name].possible(record.began_s, record.ended_s)
            if not any(contents):
                wrong.append(f"{record.id}: an answer of {wish.name}, which was not loaded then")
                continue
        for prompt, text in zip(wish.prompts, record.texts, strict=True):
            right = answer_of(references, contents, record.depth, prompt)
            if not right:
                continue  # a near tie: no reference was kept
            num_compared += 1
            # Characters are tokens; one that left has the beginning of what it asked for.
            length = wish.max_tokens if record.is_whole else len(text)
            if text not in [each[:length] for each in right]:
                wrong.append(
                    f"{record.id}: {text!r}, not {right} at depth {record.depth} of {wish}"
                )
    return num_compared, wrong


def logged_once(records: Iterable[Record], lines: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The server, too, ended each exchange once; the client's word is the same as the server's."""
    logged: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        if line.get("message") == "request":
            logged.setdefault(line["request_id"], []).append(line)
    for record in records:
        found = logged.get(record.id, [])
        if len(found) > 1 or (not found and not record.has_left):
            yield f"{record.id}: {len(found)} lines in the server's log"
        for line in found:
            if record.status is not None and line["status"] != record.status:
                yield f"{record.id}: status {record.status}, logged as {line['status']}"


def log_is_clean(lines: Iterable[Mapping[str, Any]], others: Sequence[str]) -> Iterator[str]:
    """No traceback, no error, nothing that is not a line of the server's."""
    for line in lines:
        if line.get("level") in ("error", "critical") or "exception" in line:
            yield f"logged: {str(dict(line))[:600]}"
    for text in others:
        yield f"not a line of the server's log: {text[:300]}"


def metrics_add_up(
    records: Iterable[Record],
    lines: Iterable[Mapping[str, Any]],
    before: Metrics,
    after: Metrics,
    usage: Mapping[str, Any],
) -> Iterator[str]:
    """Sequences that began are sequences that ended; usage is what the log says of each request."""
    wishes = {record.id: record.wish for record in records}
    accepted = [
        line
        for line in lines
        if line.get("message") == "request"
        and line["request_id"] in wishes
        and "response_id" in line
    ]
    name = "vllm:request_success_total"
    num_ended = total(after, name) - total(before, name)
    least = most = 0
    for line in accepted:
        num_sequences = wishes[line["request_id"]].num_sequences
        most += num_sequences
        if line["finish"] != NEVER_CAME:
            least += num_sequences
        else:
            most -= 1  # the prompt for which there was no room
    if not least <= num_ended <= most:
        begun = str(least) if least == most else f"{least} to {most}"
        yield f"{begun} sequences began, {num_ended:.0f} ended"
    num_told = sum(line["completion_tokens"] for line in accepted)
    if usage["completion_tokens"] != num_told:
        yield f"usage has {usage['completion_tokens']} completion tokens, the log {num_told}"


def all_is_back(metrics: Metrics) -> Iterator[str]:
    """Nothing runs, waits or holds a block, and no adapter is in use."""
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
        if total(metrics, name):
            yield f"{name} is {total(metrics, name):.0f} when nobody asks"
    lost = total(metrics, "fathom_kv_blocks") - total(metrics, "fathom_kv_blocks_free")
    if lost:
        yield f"{lost:.0f} blocks are not free when nobody asks"
    for labels, _ in metrics["vllm:lora_requests_info"]:
        for label in ("running_lora_adapters", "waiting_lora_adapters"):
            if labels[label]:
                yield f"{label} are {labels[label]} when nobody asks"


@dataclass(frozen=True, slots=True)
class Growth:
    """Resident memory at both ends of the time after the warm-up."""

    first_bytes: float
    last_bytes: float

    @property
    def share(self) -> float:
        return self.last_bytes / self.first_bytes - 1

    def findings(self) -> Iterator[str]:
        if self.share >= MAX_GROWTH:
            yield (
                f"resident memory grew by {self.share:.1%} after warm-up, from "
                f"{self.first_bytes / 2**20:.1f} to {self.last_bytes / 2**20:.1f} MiB"
            )


def growth_of(samples: Sequence[tuple[float, int]], warm_s: float) -> Growth:
    """samples: seconds since the load began, and bytes.

    The medians of the first and the last tenth of what comes after `warm_s`.
    """
    warm = [num_bytes for at_s, num_bytes in samples if at_s >= warm_s]
    tenth = max(1, len(warm) // 10)
    return Growth(median(warm[:tenth]), median(warm[-tenth:]))
