"""The boundary record that lies beside an adapter's weights, and whether it may be applied."""

import os
from pathlib import Path

from boundary import record
from boundary.record import BoundaryRecord
from server import confined
from server.model.checkpoint import LoraCheckpoint


def record_beside(
    path: Path,
    checkpoint: LoraCheckpoint,
    base_revision: str,
    num_layers: int,
    root: Path | None = None,
) -> tuple[BoundaryRecord | None, str | None]:
    """The record beside an adapter, and why it is not applied, of which at least one is None.

    With a `root`, a record outside of it is not read, whatever links say.
    """
    file = path / record.FILE_NAME
    if not os.path.lexists(file):
        return None, None
    try:
        if root is None:
            found = record.read(file)
        else:
            found = record.parse(confined.read_file(root, file, record.MAX_FILE_BYTES), file.name)
    except record.RecordError as error:
        return None, str(error)
    except (confined.PathRefused, FileNotFoundError) as error:
        return None, f"{file.name!r} {error}"
    reason = found.mismatch(base=base_revision, adapter=checkpoint.digest, num_layers=num_layers)
    return (found, None) if reason is None else (None, f"{record.FILE_NAME!r} was {reason}")
