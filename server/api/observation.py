"""What one engine request did and when, as the event loop saw it.

`generation` tells it of every output; metrics, traces and the access log read it once it has ended.
All times are `time.monotonic()`.
"""

import time
from typing import Literal

from server.engine.distribution import Distribution
from server.engine.request import FinishReason, Request, RequestOutput

End = Literal["success", "abort", "error"]
GAVE_UP = ("disconnect", "timeout")
"""Causes that say nothing of the engine."""


class Observation:
    """One engine request from its arrival to its end."""

    __slots__ = (
        "_first_token_latency",
        "_inter_token_latency",
        "cause",
        "ended_s",
        "finish_reasons",
        "first_token_s",
        "first_token_step",
        "last",
        "last_token_s",
        "request",
        "texts",
    )

    def __init__(
        self,
        request: Request,
        first_token_latency: Distribution,
        inter_token_latency: Distribution,
        *,
        keeps_text: bool = False,
    ) -> None:
        self.request = request
        self.last: RequestOutput | None = None
        """The latest that says how far it came."""
        self.first_token_s = 0.0
        """0 before it, like the others."""
        self.first_token_step = 0
        self.last_token_s = 0.0
        self.ended_s = 0.0
        self.finish_reasons: list[FinishReason] = []
        """Of the sequences that have ended."""
        self.cause = ""
        """Why it ended early; no word if it did not."""
        self.texts: dict[int, str] | None = {} if keeps_text else None
        """What each sequence says, only where the operator wants it in the log."""
        self._first_token_latency = first_token_latency
        self._inter_token_latency = inter_token_latency

    def output(self, output: RequestOutput) -> None:
        """One output came. Called for every token: what is added here costs that often."""
        # Of a failure that the engine tells without the sequence, as when it stops, all counts are zero.
        if output.error is None or self.last is None:
            self.last = output
        has_tokens = False
        for delta in output.deltas:
            if delta.token_ids:
                has_tokens = True
            if delta.finish_reason is not None:
                self.finish_reasons.append(delta.finish_reason)
            if self.texts is not None:
                self.texts[delta.index] = self.texts.get(delta.index, "") + delta.text
        if not has_tokens:
            return
        now = time.monotonic()
        if self.last_token_s:
            self._inter_token_latency.observe(now - self.last_token_s)
        else:
            self._first_token_latency.observe(now - self.request.arrival_s)
            self.first_token_s, self.first_token_step = now, output.step
        self.last_token_s = now

    def end(self, cause: str) -> None:
        """Nothing more comes; `cause` counts unless every sequence ended by itself."""
        self.ended_s = time.monotonic()
        last = self.last
        is_whole = last is not None and last.finished and last.error is None
        if not is_whole or "abort" in self.finish_reasons:
            self.cause = cause

    @property
    def how(self) -> End:
        """How it ended."""
        if not self.cause:
            return "success"
        return "abort" if self.cause in GAVE_UP else "error"

    @property
    def scheduled_s(self) -> float:
        """When its first step was chosen; 0 if none was, as far as outputs tell."""
        return 0.0 if self.last is None else self.last.scheduled_s

    @property
    def num_steps(self) -> int:
        """Steps of the engine from its first to its last, both included."""
        last = self.last
        return 0 if last is None or not last.first_step else last.step - last.first_step + 1
