"""`/admin/keys`: keys in the database made, listed and revoked.

The secret of a key is in the answer that made it, and never again anywhere.
"""

from datetime import datetime
from typing import Annotated, Self

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field, ValidationError
from starlette.responses import Response

from server.access import secret
from server.access.hashed_key import HashedKey, NoSuchKey
from server.access.key import Grant, Key, NewKey, Scope, Source, problem
from server.access.service import Access
from server.api import query
from server.api.admin.audit import AuditLog
from server.api.admin.request import actor
from server.api.body import json_body
from server.api.openapi import body_of
from server.api.strict import StrictModel
from server.config import Settings
from server.errors import BadRequest, Conflict, NotFound


class CreateKey(StrictModel):
    """Body of `POST /admin/keys`."""

    name: str
    scope: Scope = "api"
    adapters: Annotated[list[str], Field(max_length=1000)] | None = None
    """Names and shell patterns; without it, every model."""
    max_depth: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def new_key(self) -> NewKey:
        """Raises BadRequest, which names the field."""
        limits = self.model_dump(exclude={"name", "scope"}, exclude_none=True)
        try:
            return NewKey(name=self.name, scope=self.scope, grant=Grant(**limits))
        except ValidationError as error:
            field, words = problem(error)
            param = field.partition(".")[0] or "scope"
            raise BadRequest(f"'{param}' is wrong: {words}", param=param) from error


class KeyView(BaseModel):
    """One key, without its secret."""

    id: str
    name: str
    scope: Scope
    source: Source | None
    adapters: list[str] | None
    max_depth: int | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    created_at: datetime | None
    """None for the keys of the flags."""
    revoked_at: datetime | None

    @classmethod
    def of(cls, each: Key | HashedKey) -> Self:
        """What is known of a key."""
        held, key = (each, each.key) if isinstance(each, HashedKey) else (None, each)
        return cls(
            id=key.id,
            name=key.name,
            scope=key.scope,
            source=key.source,
            adapters=None if key.grant.adapters is None else list(key.grant.adapters),
            max_depth=key.grant.max_depth,
            requests_per_minute=key.grant.requests_per_minute,
            tokens_per_minute=key.grant.tokens_per_minute,
            created_at=None if held is None else held.created_at,
            revoked_at=None if held is None else held.revoked_at,
        )


class CreatedKey(KeyView):
    """A new key with its secret, for the only time."""

    key: str


class KeyList(BaseModel):
    """Those of the flags, then all that were made, the oldest first."""

    keys: list[KeyView]


def keys_router(settings: Settings, access: Access, audit: AuditLog) -> APIRouter:
    """Part of `admin_router`."""
    router = APIRouter(prefix="/keys")

    @router.get("")
    async def list_keys(http: Request) -> KeyList:
        """Every key of flags, file and database, also those that were revoked."""
        query.check_names(http)
        await access.keyring.refresh()
        return KeyList(keys=[KeyView.of(each) for each in access.keyring.listed()])

    @router.post("", status_code=201, openapi_extra=body_of(CreateKey))
    async def create_key(
        http: Request,
        response: Response,
        body: Annotated[CreateKey, Depends(json_body(CreateKey, settings.max_body_bytes))],
    ) -> CreatedKey:
        """Make a key; it counts at once here, and within two seconds wherever the database is used."""
        query.check_names(http)
        async with audit.attempt(http, "key.create", f"key:{body.name}", is_noted=True):
            made, text = await access.key_store.create(body.new_key(), actor(http))
        await access.keyring.refresh()
        response.headers["cache-control"] = "no-store"
        return CreatedKey(key=text, **KeyView.of(made).model_dump())

    @router.delete("/{id}")
    async def revoke_key(http: Request, id: str) -> KeyView:
        """Let a key open nothing any more; requests that run with it finish."""
        query.check_names(http)
        async with audit.attempt(http, "key.revoke", f"key:{id}", is_noted=True):
            if access.keyring.is_elsewhere(id):
                raise Conflict(
                    f"key {id!r} is not the database's: take it out of the flags, or revoke it with "
                    "`fathom keys revoke --keys-file`",
                    code="key_elsewhere",
                )
            unknown = NotFound(f"there is no key {id!r}", param="id", code="key_not_found")
            if not secret.is_id(id):
                raise unknown
            try:
                revoked = await access.key_store.revoke(id, actor(http))
            except NoSuchKey as error:
                raise unknown from error
        await access.keyring.refresh()
        return KeyView.of(revoked)

    return router
