"""What one HTTP request costs its sender: tokens reserved before it is queued, and usage at its end.

Wraps the engine's outputs, so that however they end (finished, failed, timed out, or the client
gone) the reservation is settled and the usage counted, once.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from server.access.counts import Counts
from server.access.key import Key
from server.access.ledger import Ledger
from server.access.rate_limits import KeyRates
from server.api.generation import IndexedOutput
from server.engine.request import Request, RequestOutput

_NOTHING = RequestOutput("")


async def metered(
    outputs: AsyncGenerator[IndexedOutput, None],
    requests: Sequence[Request],
    *,
    key: Key,
    rates: KeyRates,
    ledger: Ledger,
    is_stated: bool,
) -> AsyncGenerator[IndexedOutput, None]:
    """The same outputs. Raises RateLimited or BadRequest before the first one is asked for.

    is_stated: whether the client said how long the answer may be.
    """
    num_prompt = sum(len(request.prompt_token_ids) for request in requests)
    num_answer = sum(request.sampling.n * request.sampling.max_tokens for request in requests)
    reservation = rates.reserve(num_prompt, num_answer, is_stated=is_stated)
    latest = [_NOTHING] * len(requests)
    num_used, num_running = 0, len(requests)
    ledger.num_open += 1
    try:
        async with aclosing(outputs):
            async for index, output in outputs:
                num_used += _num_tokens(output) - _num_tokens(latest[index])
                latest[index] = output
                reservation.used(num_used)
                num_running -= output.finished
                yield index, output
    finally:
        ledger.num_open -= 1
        reservation.end(num_used)
        # A client that hangs up after the last token has had it all.
        if num_used:  # else it was refused, or left before anything was computed
            ledger.add(key, requests[0].lora, _counts(latest, is_finished=not num_running))


def _num_tokens(output: RequestOutput) -> int:
    return output.num_prompt_tokens + output.num_output_tokens


def _counts(latest: Sequence[RequestOutput], *, is_finished: bool) -> Counts:
    num_prompt = sum(each.num_prompt_tokens for each in latest)
    num_output = sum(each.num_output_tokens for each in latest)
    return Counts(
        requests=1,
        prompt_tokens=num_prompt,
        cached_tokens=sum(each.num_cached_tokens for each in latest),
        completion_tokens=num_output,
        aborted_requests=0 if is_finished else 1,
        aborted_prompt_tokens=0 if is_finished else num_prompt,
        aborted_completion_tokens=0 if is_finished else num_output,
    )
