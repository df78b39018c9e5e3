"""`fathom adapters`: what each adapter is, or why it is refused.

Loads the base model, since an adapter is only right or wrong for a base, but starts no engine.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from server.config import Settings
from server.engine.record_beside import record_beside
from server.errors import AdapterError, NotFound, SourceUnavailable
from server.loading import progress_on_stderr, with_demo
from server.logs import configure_logs
from server.model import loader
from server.model.checkpoint import MAX_RANK, module_kinds, read_checkpoint
from server.model.loader import LoadedModel
from server.model.residency import modules_between, slot_bytes
from server.model.targets import Targets
from server.sources.fetcher import local_path
from server.sources.location import RemoteAdapter


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """One adapter's facts; `refusal` stands alone where it cannot be served."""

    name: str
    path: str
    rank: int | None = None
    modules: tuple[str, ...] = ()
    """The kinds of module it targets: `q_proj` for every layer's."""
    max_depth: int | None = None
    num_bytes: int | None = None
    digest: str | None = None
    calibrated_depth: int | None = None
    """Where `boundary.json` beside it ends it, if it was made for this content and base."""
    slot_bytes: int | None = None
    """On the device, in the model's dtype; whole."""
    calibrated_slot_bytes: int | None = None
    """The same of the layers below the calibrated depth: what `--resident-depth auto` keeps."""
    refusal: str | None = None


def adapters(settings: Settings, *, as_json: bool) -> int:
    """Print a table; 1 where an adapter is refused."""
    configure_logs("warning")
    settings = with_demo(settings)
    assert settings.model is not None
    with progress_on_stderr() as report:
        base = loader.load(
            settings.model,
            settings.revision,
            settings.device,
            settings.dtype,
            report,
            settings.quantization,
        )
    targets = Targets(base.model)
    found = [
        examine(name, place, base, targets, settings)
        for name, place in configured(settings).items()
    ]
    if as_json:
        sys.stdout.write(json.dumps([asdict(adapter) for adapter in found]) + "\n")
    else:
        show(found, targets.num_layers)
    return 1 if any(adapter.refusal for adapter in found) else 0


def configured(settings: Settings) -> dict[str, Path | RemoteAdapter]:
    """Named adapters, and those under the adapter root that no name hides."""
    root = settings.adapter_root
    under_root = sorted(root.glob("*/adapter_config.json")) if root is not None else []
    return {config.parent.name: config.parent for config in under_root} | settings.adapter


def examine(
    name: str,
    place: Path | RemoteAdapter,
    base: LoadedModel,
    targets: Targets,
    settings: Settings,
) -> AdapterReport:
    """Read one checkpoint as the server would."""
    try:
        path = local_path(place, settings)
        checkpoint = read_checkpoint(path, targets, max_rank=min(settings.max_lora_rank, MAX_RANK))
    except (AdapterError, NotFound, SourceUnavailable) as error:
        return AdapterReport(name, str(place), refusal=error.message)
    beside, _ = record_beside(path, checkpoint, base.revision, targets.num_layers)

    def in_slot(depth: int) -> int:
        names = modules_between(checkpoint, 0, depth, targets.num_layers)
        return slot_bytes(checkpoint, names, base.model.dtype)

    return AdapterReport(
        name=name,
        path=str(place),
        rank=checkpoint.rank,
        modules=module_kinds(checkpoint.modules),
        max_depth=checkpoint.max_depth,
        num_bytes=checkpoint.num_bytes,
        digest=checkpoint.digest,
        calibrated_depth=None if beside is None else beside.depth,
        slot_bytes=in_slot(targets.num_layers),
        calibrated_slot_bytes=None if beside is None else in_slot(beside.depth),
    )


def show(found: list[AdapterReport], num_layers: int) -> None:
    """A table of what is served, then a line for each refusal."""
    console = Console()
    table = Table("adapter", "rank", "modules", "reaches", "size", "slots a GiB", "digest")
    for adapter in found:
        if adapter.refusal is None:
            table.add_row(
                escape(adapter.name),
                str(adapter.rank),
                " ".join(adapter.modules),
                f"{adapter.max_depth} of {num_layers} layers",
                decimal(adapter.num_bytes or 0),
                slots_a_gib(adapter),
                (adapter.digest or "").removeprefix("sha256:")[:12],
            )
    if table.row_count:
        console.print(table)
    for adapter in found:
        if adapter.refusal is not None:
            console.print(f"[bold]{escape(adapter.name)}[/] refused: {escape(adapter.refusal)}")
    if not found:
        console.print("no adapters: name one with --adapter NAME=PATH or --adapter-root DIR")


def slots_a_gib(adapter: AdapterReport) -> str:
    """How many like it a GiB of the device holds: whole, and below the calibrated depth."""
    whole, below = adapter.slot_bytes, adapter.calibrated_slot_bytes
    text = f"{(1 << 30) // whole}" if whole else "-"
    if below is not None:
        number = f"{(1 << 30) // below}" if below else "any number"
        text += f", {number} below depth {adapter.calibrated_depth}"
    return text
