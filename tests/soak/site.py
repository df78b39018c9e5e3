"""What a soak's server has on its disk: a tiny Llama, and adapters in two contents each.

The model writes printable ASCII, one character a token, so a shorter answer is the beginning of a
longer one. Adapters are drawn by the seed from a few that PEFT wrote, strong enough that another
content or another depth says something else.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.live.process import LLAMA, save_readable_model
from tests.parity.adapters import save_adapter
from tests.parity.zoo import NUM_LAYERS as NUM_LAYERS

VARIANTS = ("plain", "dora", "rslora", "lm_head")
BASE = "tiny"
SECOND = "second"
"""Folder of the contents that a reload brings; it is no adapter itself."""

Content = tuple[str, int]
"""An adapter's name and which of its two contents; the base model is `(BASE, 0)`."""
BASE_CONTENT: Content = (BASE, 0)


@dataclass(frozen=True, slots=True)
class SoakSite:
    """Directories below one."""

    model: Path
    root: Path
    names: tuple[str, ...]
    """Every adapter below the root."""
    moving: tuple[str, ...]
    """Those of them that are loaded, unloaded and replaced meanwhile; they have two contents."""

    def path(self, content: Content) -> str:
        """Relative to the root, as a client names it."""
        name, version = content
        return f"{SECOND}/{name}" if version else name

    @property
    def contents(self) -> list[Content]:
        """All that can be asked, the base model first."""
        seconds = [(name, 1) for name in self.moving]
        return [BASE_CONTENT, *((name, 0) for name in self.names), *seconds]


def make_site(directory: Path, *, num_adapters: int, num_moving: int, seed: int) -> SoakSite:
    """Write all of it below `directory`."""
    root = directory / "adapters"
    patterns = {
        variant: save_adapter(LLAMA, variant, directory / "patterns" / variant, seed=seed)
        for variant in VARIANTS
    }
    names = tuple(f"a{number:03}" for number in range(num_adapters))
    site = SoakSite(save_readable_model(directory / BASE), root, names, names[-num_moving:])
    generator = torch.Generator().manual_seed(seed)
    for number, content in enumerate(site.contents[1:]):
        pattern = patterns[VARIANTS[number % len(VARIANTS)]]
        _draw_like(pattern, root / site.path(content), generator)
    return site


def _draw_like(pattern: Path, directory: Path, generator: torch.Generator) -> None:
    shutil.copytree(pattern, directory)
    file = directory / "adapter_model.safetensors"
    tensors = {
        name: tensor
        if "magnitude" in name
        else torch.randn(tensor.shape, generator=generator) * tensor.std()
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file)
