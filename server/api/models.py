"""Model cards: the base model and each known adapter, in vLLM's shape with the depth facts."""

from typing import Literal

from pydantic import BaseModel

from server.access.key import Grant
from server.engine.protocol import Engine
from server.engine.request import AdapterRef
from server.errors import NotFound


class ModelPermission(BaseModel):
    """A relic of OpenAI's old API that clients of vLLM may read."""

    id: str
    object: Literal["model_permission"] = "model_permission"
    created: int
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: str | None = None
    is_blocking: bool = False


class LoraCard(BaseModel):
    """What an adapter is, and how deep it reaches by default."""

    rank: int
    num_layers: int
    effective_max_depth: int
    calibrated_depth: int | None
    boundary_version: int | None
    allowed_max_depth: int
    """The deepest `lora_depth` that the asking key may use."""


class ModelCard(BaseModel):
    """One model that a request may name."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "fathom"
    root: str
    parent: str | None
    max_model_len: int
    permission: list[ModelPermission]
    lora: LoraCard | None


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def list_cards(engine: Engine, grant: Grant) -> list[ModelCard]:
    """The base model's card, then one an adapter, of those that a key may use."""
    base = [_base_card(engine)] if grant.allows(engine.info.name) else []
    adapters = (each for each in engine.adapters() if grant.allows(each.name))
    return [*base, *(_adapter_card(engine, each, grant) for each in adapters)]


def find_card(engine: Engine, model_id: str, grant: Grant) -> ModelCard:
    """One card; raises Forbidden and NotFound."""
    grant.check_model(model_id)
    if model_id == engine.info.name:
        return _base_card(engine)
    adapter = engine.adapter(model_id)
    if adapter is not None:
        return _adapter_card(engine, adapter, grant)
    raise NotFound(f"the model '{model_id}' does not exist", param="model", code="model_not_found")


def _base_card(engine: Engine) -> ModelCard:
    return _card(engine, engine.info.name, root=engine.info.path, parent=None, lora=None)


def _adapter_card(engine: Engine, adapter: AdapterRef, grant: Grant) -> ModelCard:
    calibrated = engine.calibrated_depth(adapter)
    lora = LoraCard(
        rank=adapter.rank,
        num_layers=engine.info.num_layers,
        effective_max_depth=adapter.max_depth,
        calibrated_depth=None if calibrated is None else calibrated.depth,
        boundary_version=None if calibrated is None else calibrated.version,
        allowed_max_depth=engine.info.num_layers
        if grant.max_depth is None
        else min(grant.max_depth, engine.info.num_layers),
    )
    return _card(engine, adapter.name, root=adapter.path, parent=engine.info.name, lora=lora)


def _card(
    engine: Engine, name: str, *, root: str, parent: str | None, lora: LoraCard | None
) -> ModelCard:
    created = engine.info.created
    return ModelCard(
        id=name,
        created=created,
        root=root,
        parent=parent,
        max_model_len=engine.info.max_model_len,
        permission=[ModelPermission(id=f"modelperm-{name}", created=created)],
        lora=lora,
    )
