"""The one random model and its adapters, on disk, as every peer's converter reads them.

Written once for a seed: a directory that is there was made by this module from the same seed. The
16-bit model is the same draw rounded, and the adapters are float32 for both, as PEFT saves them.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from server.bench.random_model import save_random_adapter, save_random_model
from server.bench.shape import ModelShape, parse_shape
from tests.bench.peers.cases import ADAPTERS

SHAPE_TEXT = "12x768:intermediate=2048:heads=12:vocab=8000"
RANK = 16


@dataclass(frozen=True, slots=True)
class Models:
    """Where they are. `root` may hold what a peer converts them to, under the peer's name."""

    root: Path
    seed: int

    @property
    def shape(self) -> ModelShape:
        """The model's dimensions."""
        return parse_shape(SHAPE_TEXT)

    def base(self, dtype: str) -> Path:
        """The model in `float32` or `bfloat16`."""
        return self.root / dtype

    @property
    def adapters(self) -> dict[str, Path]:
        """PEFT checkpoints by name."""
        return {name: self.root / name for name in ADAPTERS}

    def converted(self, name: str) -> Path:
        """A peer's own form of them; made by the peer where it is missing."""
        return self.root / "converted" / name


def make_models(root: Path, seed: int) -> Models:
    """Write what is missing of the models of `seed` under `root`."""
    models = Models(root / f"seed-{seed}", seed)
    done = models.root / "done"
    if done.exists():
        return models
    shutil.rmtree(models.root, ignore_errors=True)
    for dtype in ("float32", "bfloat16"):
        save_random_model(
            models.shape,
            models.base(dtype),
            dtype=getattr(torch, dtype),
            device=torch.device("cpu"),
            seed=seed,
        )
    for index, path in enumerate(models.adapters.values()):
        base = models.base("float32")
        save_random_adapter(models.shape, path, rank=RANK, seed=seed + 1 + index, base=base)
    done.touch()
    return models


def with_end_token(model: Path, directory: Path) -> int:
    """A copy of `model` whose last token is named as the end of a text; gives the vocabulary's size.

    For formats that cannot say that no token ends one. Told to ignore it, their engines make that token
    impossible; where PEFT's answers have it, the check before timing fails.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for path in model.iterdir():
        if path.name != "config.json":
            (directory / path.name).symlink_to(path)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    vocab_size: int = config["vocab_size"]
    config["eos_token_id"] = vocab_size - 1
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return vocab_size
