"""What crosses between the event loop and the engine thread: requests in, outputs out.

Plain frozen dataclasses of Python values: no tensors, no sockets. `api` makes a `Request`,
`scheduler` turns it into sequences, and steps yield `RequestOutput`s until one says `finished`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from boundary.record import BoundaryRecord
from server.errors import FathomError

DepthSource = Literal["request", "calibrated", "full", "base"]
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class CalibratedDepth:
    """The depth that `auto` means for one adapter's content."""

    depth: int
    version: int | None
    """Of its boundary record, where a store keeps one."""
    calibrated_s: float
    """Unix time at which the record was made."""


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One content of an adapter. A reload under the same name makes a new `uid`."""

    name: str
    uid: int
    digest: str | None
    """None until its weights are read for the first time, of one that is registered only."""
    rank: int
    max_depth: int
    """1 + the highest layer this adapter targets: depths above it are the same model."""
    num_bytes: int
    path: str
    modules: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """The kinds of module it targets: `q_proj` for every layer's."""
    layers: tuple[int, ...] = field(default=(), repr=False, compare=False)
    """The decoder layers that have any of its LoRA, ascending."""
    boundary: BoundaryRecord | None = field(default=None, repr=False, compare=False)
    """The record that lies beside the adapter's weights, if it was made for this content and base."""
    boundary_error: str | None = field(default=None, compare=False)
    """Why a record that lies there is not applied."""
    content: object = field(default=None, repr=False, compare=False)
    """The weights in host memory, opaque here. Whoever holds the reference keeps them alive, so an
    adapter that is unloaded or evicted stays usable for the requests that began with it."""


@dataclass(frozen=True, slots=True)
class LoraSelection:
    """The adapter and depth of one request, fixed when it is accepted."""

    adapter: AdapterRef | None
    depth: int
    num_layers: int
    source: DepthSource
    boundary_version: int | None = None

    @property
    def effective_depth(self) -> int:
        """Depth up to which this selection differs from the base model; 0 is the base model."""
        return 0 if self.adapter is None else min(self.depth, self.adapter.max_depth)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn and when a sequence ends. Validated at the door, trusted here."""

    max_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    """How many alternatives to report beside each sampled token; None reports nothing."""
    prompt_logprobs: int | None = None
    """The same for every prompt token after the first; such a request skips the prefix cache."""
    skip_special_tokens: bool = True
    grammar: str | None = None
    """An llguidance grammar that was compiled once at the door and so is known to be valid."""


@dataclass(frozen=True, slots=True)
class Request:
    """One accepted request: a prompt, how to continue it, with which adapter and how deep."""

    id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    lora: LoraSelection
    priority: int = 0
    """Lower is served first; equal ones as `waiting_line` says."""
    arrival_s: float = 0.0
    """`time.monotonic()` when it was accepted."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one position, before penalties and temperature."""

    token_id: int
    logprob: float
    rank: int
    """1 is the most likely token."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely `(token_id, logprob)` pairs, best first."""


@dataclass(frozen=True, slots=True)
class SequenceDelta:
    """What one of a request's `n` sequences gained since its last delta.

    `text` may lag behind `token_ids` (a partial character or a possible stop string is held back)
    and catches up at the latest with the delta that carries `finish_reason`.
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended it, if one did (None for the model's own end)."""


def joined(deltas: Sequence[SequenceDelta]) -> SequenceDelta:
    """All that one sequence gained, as one delta."""
    last = deltas[-1]
    return SequenceDelta(
        index=last.index,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=tuple(position for delta in deltas for position in delta.logprobs),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One message from the engine to a request's owner. Exactly one per request has `finished`."""

    request_id: str
    deltas: tuple[SequenceDelta, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """One entry a prompt token (None for the first), sent once."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    """Totals so far, over all `n` sequences."""
    scheduled_s: float = field(default=0.0, compare=False)
    """`time.monotonic()` when its first step was chosen; 0 until then."""
    first_step: int = field(default=0, compare=False)
    """The number of that step among the engine's."""
    step: int = field(default=0, compare=False)
    """The number of the step that this came of."""
    finished: bool = False
    error: FathomError | None = field(default=None, compare=False)
    """Set only on a finished output; the deltas that came before stay valid."""
