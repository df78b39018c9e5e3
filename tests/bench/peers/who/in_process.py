"""transformers' `generate` and PEFT without any server: static batches, as many rows as streams.

Nothing of HTTP is timed here, which is to their advantage. They run in a child of Fathom's own
interpreter, by the baselines that `fathom bench` uses. PEFT's base row would be that of `generate`.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench.peers.cases import Case
from tests.bench.peers.peer import Place
from tests.bench.peers.process import StartFailed, Tree, last_words
from tests.bench.peers.side import PipeSide, Side, read_line
from tests.bench.peers.who.openvino import NOT_16_BIT

NO_ADAPTERS = "none"
_GENERATE = "see `generate`"


class InProcess:
    """See `peer.Peer`. Either without adapters, or with adapters alone."""

    notes: dict[str, str]
    packages = ("torch", "transformers", "peft")

    def __init__(self, name: str, title: str, *, has_adapters: bool) -> None:
        self.name = name
        self.title = title
        self._has_adapters = has_adapters
        self.notes = {"16-four": "`adapter_names`"} if has_adapters else {}
        self.cannot = {"16-bit": NOT_16_BIT}
        if has_adapters:
            self.cannot |= {"1-base": _GENERATE, "16-base": _GENERATE}
        else:
            self.cannot |= dict.fromkeys(("1-adapter", "16-one", "16-four"), NO_ADAPTERS)

    def prepare(self, place: Place) -> Path:
        """See `Peer.prepare`: nothing is made."""
        return place.fathom_python

    def variant(self, case: Case) -> str:
        """See `Peer.variant`."""
        return "float32"

    @contextmanager
    def serve(self, variant: str, place: Place) -> Iterator[Side]:
        """See `Peer.serve`."""
        script = place.checkout / "tests/bench/peers/served/static_child.py"
        command: list[Any] = [place.fathom_python, script, "--model", place.models.base(variant)]
        for name, path in place.models.adapters.items() if self._has_adapters else ():
            command += ["--adapter", f"{name}={path}"]
        log = place.log(self.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as errors:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {"PYTHONPATH": str(place.checkout)},
            )
        tree = Tree(process.pid)
        try:
            assert process.stdout is not None
            try:
                read_line(process.stdout)
            except RuntimeError as error:
                raise StartFailed(last_words(log)) from error
            yield PipeSide(tree, process)
        finally:
            tree.end()
            process.wait()
