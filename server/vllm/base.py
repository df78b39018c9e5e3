"""What the plugin must know of vLLM's base model: its layers, and its name in calibrations' records.

Told by the model's files, which vLLM has loaded in its own way. Read when first needed, then kept.
"""

from threading import Lock

from transformers import AutoConfig

from server.errors import ModelError
from server.model.base_revision import revision_of_files


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
                self._num_layers = _num_layers(self._model)
            return self._num_layers

    @property
    def revision(self) -> str:
        """Its content's name; see `base_revision`. Raises ModelError."""
        with self._lock:
            if self._revision is None:
                self._revision = revision_of_files(self._model)
            return self._revision


def _num_layers(model: str) -> int:
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"no model could be read at {model!r}: {error}", param="model") from error
    found = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if type(found) is not int or found < 1:
        raise ModelError(f"the config at {model!r} does not say how many layers there are")
    return found
