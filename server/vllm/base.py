"""What the plugin must know of vLLM's base model: its layers, and its name in calibrations' records.

Told by the model's files, which vLLM has loaded in its own way. Read when first needed, then kept.
"""

from threading import Lock

from server.model.base_files import layers_of_files, revision_of_files


class Base:
    """One base model, by the path or hub id that vLLM was given. Any thread."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._lock = Lock()
        self._num_layers: int | None = None
        self._revision: str | None = None

    @property
    def num_layers(self) -> int:
        """How many decoder layers there are. Raises ModelError."""
        with self._lock:
            if self._num_layers is None:
                self._num_layers = layers_of_files(self._model)
            return self._num_layers

    @property
    def revision(self) -> str:
        """Its content's name; see `base_files`. Raises ModelError."""
        with self._lock:
            if self._revision is None:
                self._revision = revision_of_files(self._model)
            return self._revision
