"""Static batches of transformers and PEFT in a process of their own, asked by pipe.

`generate` is the base model alone. `peft` gives a batch of one adapter or of none its fastest path
(that adapter active, or all disabled) and a mixed batch `adapter_names`. One line of JSON in, `{"items":
[[prompt, output_len, adapter], ...], "batch": n}`, one line out, with the seconds that the batches took.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from server.bench.baseline import PeftBaseline, StaticModel, load_baselines, own_thread, run_batches
from server.bench.load import LoadResult
from server.bench.mix import Choice
from server.bench.workload import WorkItem
from server.config import Settings


class FastestPeft:
    """A `StaticModel` that mixes only what has to be mixed."""

    name = "peft"

    def __init__(self, mixed: PeftBaseline) -> None:
        self._mixed = mixed
        self._model: Any = mixed._model
        self.log_probabilities = mixed.log_probabilities

    def complete(self, batch: Sequence[WorkItem]) -> list[list[int]]:
        """See `StaticModel.complete`."""
        choices = {item.choice for item in batch}
        if len(choices) > 1:
            return self._mixed.complete(batch)
        (choice,) = choices
        if choice.adapter is not None:
            self._model.set_adapter(self._mixed._names[choice], inference_mode=True)
        disabled = self._model.disable_adapter() if choice.adapter is None else nullcontext()
        with disabled:
            return super(PeftBaseline, self._mixed).complete(batch)
