"""`/admin/usage`: what each key used, by model and effective depth, in hours, days or in all."""

from datetime import UTC, datetime
from typing import Literal, Self, cast

from fastapi import APIRouter, Request
from pydantic import BaseModel

from server.access.counts import HOUR_S, Account, Counts
from server.access.service import Access
from server.access.usage_store import Bucket, Filter
from server.api import query
from server.api.json_text import shown
from server.api.openapi import query_of
from server.engine.protocol import Engine
from server.errors import BadRequest

HOURS = {"hour": 1, "day": 24}
MAX_OFFSET = 10**9
_WHOLE_HOUR = {
    "type": "string",
    "format": "date-time",
    "description": "A whole hour with its zone, such as 2026-11-25T13:00:00Z.",
}


class AbortedView(BaseModel):
    """The part of requests that did not finish."""

    requests: int
    prompt_tokens: int
    completion_tokens: int


class CountsView(BaseModel):
    """Requests and tokens."""

    requests: int
    prompt_tokens: int
    cached_tokens: int
    """Of the prompts', those found in the prefix cache."""
    completion_tokens: int
    aborted: AbortedView

    @classmethod
    def fields_of(cls, counts: Counts) -> dict[str, object]:
        """The same as fields of a view."""
        return {
            "requests": counts.requests,
            "prompt_tokens": counts.prompt_tokens,
            "cached_tokens": counts.cached_tokens,
            "completion_tokens": counts.completion_tokens,
            "aborted": AbortedView(
                requests=counts.aborted_requests,
                prompt_tokens=counts.aborted_prompt_tokens,
                completion_tokens=counts.aborted_completion_tokens,
            ),
        }


class UsageView(CountsView):
    """What one key used of one model at one effective depth in one bucket."""

    since: datetime | None
    until: datetime | None
    """Left out; None where the bucket is all time."""
    key: str
    base: str
    adapter: str | None
    depth: int

    @classmethod
    def of(cls, account: Account, counts: Counts, bucket: Bucket) -> Self:
        """A sum as the store has it."""
        num_hours = HOURS.get(bucket)
        return cls.model_validate(
            {
                "since": num_hours and _time(account.hour),
                "until": num_hours and _time(account.hour + num_hours),
                "key": account.key,
                "base": account.base,
                "adapter": account.adapter,
                "depth": account.depth,
                **cls.fields_of(counts),
            }
        )


class UsageAnswer(BaseModel):
    """The newest buckets first; `total` is of everything that was asked for, on every page."""

    bucket: Literal["hour", "day", "all"]
    usage: list[UsageView]
    has_more: bool
    """Whether `?offset=` gives more."""
    total: CountsView


def usage_router(engine: Engine, access: Access) -> APIRouter:
    """Part of `admin_router`."""
    router = APIRouter(prefix="/usage")

    @router.get(
        "",
        openapi_extra=query_of(
            key={"type": "string"},
            adapter={"type": "string"},
            since=_WHOLE_HOUR,
            until=_WHOLE_HOUR,
            bucket={"enum": ["hour", "day", "all"], "default": "hour"},
            limit=query.LIMIT,
            offset={"type": "integer", "minimum": 0, "maximum": MAX_OFFSET, "default": 0},
        ),
    )
    async def show_usage(http: Request) -> UsageAnswer:
        """Sums of what every server that shares the database counted, this one's up to now."""
        query.check_names(http, "key", "adapter", "since", "until", "bucket", "limit", "offset")
        store = access.usage_store
        bucket = _bucket(http.query_params.get("bucket", "hour"))
        limit = query.limit(http)
        offset = query.integer(http.query_params.get("offset", "0"), "offset", 0, MAX_OFFSET)
        filter = _filter(http, engine.info.name)
        await access.ledger.flush()
        rows = await store.sums(filter, bucket, limit + 1, offset)
        total = await store.total(filter)
        return UsageAnswer(
            bucket=bucket,
            usage=[UsageView.of(account, counts, bucket) for account, counts in rows[:limit]],
            has_more=len(rows) > limit,
            total=CountsView.model_validate(CountsView.fields_of(total)),
        )

    return router


def _filter(http: Request, base: str) -> Filter:
    given = http.query_params
    adapter = query.text(http, "adapter")
    is_base = adapter == base
    return Filter(
        key=query.text(http, "key"),
        base=base if is_base else None,
        adapter="" if is_base else adapter,
        since=_hour(given.get("since"), "since"),
        until=_hour(given.get("until"), "until"),
    )


def _bucket(text: str) -> Bucket:
    if text not in ("hour", "day", "all"):
        raise BadRequest(f"'bucket' must be hour, day or all (got {shown(text)})", param="bucket")
    return cast(Bucket, text)


def _hour(text: str | None, name: str) -> int | None:
    """A whole hour, because that is how usage is kept."""
    if text is None:
        return None
    try:
        # In a query a plus sign is a space.
        time = datetime.fromisoformat(text.replace(" ", "+"))
        seconds = time.timestamp() if time.tzinfo is not None else 1.0
    except (ValueError, OverflowError):
        seconds = 1.0
    if seconds % HOUR_S:
        raise BadRequest(
            f"'{name}' must be a whole hour with its zone, such as 2026-11-25T13:00:00Z "
            f"(got {shown(text)})",
            param=name,
        )
    return int(seconds) // HOUR_S


def _time(hour: int) -> datetime:
    return datetime.fromtimestamp(hour * HOUR_S, UTC)
