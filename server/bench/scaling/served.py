"""A random model with random adapters of any ranks on the disk, and settings that serve them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from server.bench.memory import kv_bytes_per_token
from server.bench.random_model import llama_config, save_random_adapter, save_random_model
from server.bench.scaling.options import ScalingOptions
from server.bench.shape import ModelShape, parse_shape
from server.config import Settings
from server.loading import ReportProgress
from server.model.loader import pick_device, pick_dtype
from server.model.prepare import default_block_size

_MIN_CACHE_BYTES = 1 << 16
"""As `kv_cache_bytes` demands."""


class Served:
    """One model and its adapters; `settings` names them, with a cache for a load."""

    def __init__(
        self,
        options: ScalingOptions,
        ranks: Mapping[str, int],
        directory: Path,
        progress: ReportProgress,
    ) -> None:
        """Write everything below `directory`. ranks: of each adapter by name."""
        self.shape: ModelShape = parse_shape(options.random_model)
        self.device = pick_device(options.device)
        self.dtype = pick_dtype(options.dtype, self.device, self.config)
        self.model = directory / "model"
        self.adapters = {name: directory / name for name in ranks}
        self._options = options
        self._max_rank = max(ranks.values(), default=1)
        total = 1 + len(ranks)
        progress("random weights", 0, total)
        save_random_model(
            self.shape, self.model, dtype=self.dtype, device=self.device, seed=options.seed
        )
        for done, (name, rank) in enumerate(ranks.items(), start=1):
            progress("random weights", done, total)
            save_random_adapter(
                self.shape,
                self.adapters[name],
                rank=rank,
                seed=options.seed + done,
                base=self.model,
            )
        progress("random weights", total, total)

    @property
    def config(self) -> PreTrainedConfig:
        """The model's."""
        return llama_config(self.shape)

    @property
    def block_size(self) -> int:
        """Tokens in a block, as the engine will choose."""
        return default_block_size(self.device)

    def cache_bytes(self, num_blocks: int) -> int:
        """Of so many blocks."""
        per_block = self.block_size * kv_bytes_per_token(self.config, self.dtype)
        return max(_MIN_CACHE_BYTES, num_blocks * per_block)

    def settings(self, *, max_len: int, concurrency: int, **more: Any) -> Settings:
        """An engine for so many requests at once of at most `max_len` tokens; nobody waits for a block."""
        given = {
            "model": str(self.model),
            "served_model_name": self._options.random_model,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "adapter": self.adapters,
            "max_loras": max(1, len(self.adapters)),
            "max_lora_rank": max(self._max_rank, Settings.model_fields["max_lora_rank"].default),
            "max_num_seqs": max(concurrency, Settings.model_fields["max_num_seqs"].default),
            "kv_cache_bytes": self.cache_bytes(-(-max_len // self.block_size) * concurrency),
        }
        return Settings.model_validate(given | more)
