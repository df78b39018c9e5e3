"""Loading and unloading adapters at run time, by the routes and words that vLLM's clients know.

Off unless the server has an admin key. A name that exists is a 400 here, as in vLLM, though it is a
conflict everywhere else.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import PlainTextResponse

from server.access.service import Access
from server.api.admin.audit import AuditLog
from server.api.admin.request import adapter_location
from server.api.auth import admin_guard
from server.api.body import json_body
from server.api.openapi import body_of
from server.api.strict import StrictModel
from server.calibration.service import CalibrationService
from server.config import Settings
from server.engine.protocol import Engine
from server.errors import AdapterError, BadRequest, Conflict, NotFound


class LoadRequest(StrictModel):
    """Body of `POST /v1/load_lora_adapter`."""

    unsupported: ClassVar[Mapping[str, str]] = {
        "base_model_name": "there is one base model",
        "is_3d_lora_weight": "adapters of fused experts are not served",
    }

    lora_name: Annotated[str, Field(min_length=1, max_length=256)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
    load_inplace: bool | None = None


class UnloadRequest(StrictModel):
    """Body of `POST /v1/unload_lora_adapter`."""

    unsupported: ClassVar[Mapping[str, str]] = {"lora_int_id": "adapters are known by name"}

    lora_name: Annotated[str, Field(min_length=1)]


def lora_router(
    settings: Settings, engine: Engine, calibration: CalibrationService, access: Access
) -> APIRouter:
    """Routes that need the admin key."""
    audit = AuditLog(calibration)
    router = APIRouter(prefix="/v1", dependencies=[Depends(admin_guard(access))])

    @router.post(
        "/load_lora_adapter",
        response_class=PlainTextResponse,
        openapi_extra=body_of(LoadRequest),
    )
    async def load_lora_adapter(
        http: Request,
        body: Annotated[LoadRequest, Depends(json_body(LoadRequest, settings.max_body_bytes))],
    ) -> str:
        """Read a PEFT checkpoint and serve it under a name."""
        async with audit.attempt(http, "adapter.load", f"adapter:{body.lora_name}") as detail:
            place = adapter_location(body.lora_path, "lora_path")
            detail["path"] = body.lora_path
            if body.lora_name == engine.info.name:
                raise BadRequest(
                    f"'lora_name' is the base model's name ({body.lora_name})", param="lora_name"
                )
            try:
                adapter = await engine.load_adapter(
                    body.lora_name, place, replace=bool(body.load_inplace)
                )
            except AdapterError as error:
                error.param = "lora_path"
                raise
            except Conflict:
                raise BadRequest(
                    f"The lora adapter '{body.lora_name}' has already been loaded. If you want to "
                    "load the adapter in place, set 'load_inplace' to True.",
                    param="lora_name",
                    code="adapter_exists",
                ) from None
            detail["digest"] = adapter.digest
        await calibration.adapter_came()
        return f"Success: LoRA adapter '{body.lora_name}' added successfully."

    @router.post(
        "/unload_lora_adapter",
        response_class=PlainTextResponse,
        openapi_extra=body_of(UnloadRequest),
    )
    async def unload_lora_adapter(
        http: Request,
        body: Annotated[UnloadRequest, Depends(json_body(UnloadRequest, settings.max_body_bytes))],
    ) -> str:
        """Forget a name; requests that run with it finish."""
        async with audit.attempt(http, "adapter.unload", f"adapter:{body.lora_name}"):
            try:
                await engine.unload_adapter(body.lora_name)
            except NotFound:
                raise NotFound(
                    f"The lora adapter '{body.lora_name}' cannot be found.", param="lora_name"
                ) from None
        return f"Success: LoRA adapter '{body.lora_name}' removed successfully."

    return router
