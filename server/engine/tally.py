"""What the engine has done since it started, in numbers: tokens, steps, and layers with and without LoRA."""

from server.engine.distribution import Distribution
from server.engine.protocol import LayerCount, StepCounts
from server.engine.request import LoraSelection

STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
STEP_SEQS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Tally:
    """The engine's thread counts, any may read."""

    def __init__(self) -> None:
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self.num_steps = 0
        self.steps = StepCounts(
            *(Distribution(bounds) for bounds in (STEP_SECONDS, STEP_SEQS, STEP_TOKENS))
        )
        self.layers = LayerCount()
        """Token-layers of all adapters."""
        self._by_adapter: dict[str, LayerCount] = {}

    def count_step(self, num_seqs: int, num_tokens: int) -> None:
        """A step over this many sequences and tokens."""
        self.num_steps += 1
        self.steps.num_seqs.observe(num_seqs)
        self.steps.num_tokens.observe(num_tokens)

    def count_layers(self, lora: LoraSelection, num_tokens: int) -> None:
        """Tokens that went through all layers, of which the adapter was applied in some."""
        if lora.adapter is None:
            return
        num_applied = lora.effective_depth
        more = LayerCount(num_tokens * num_applied, num_tokens * (lora.num_layers - num_applied))
        name = lora.adapter.name
        self._by_adapter[name] = self._by_adapter.get(name, LayerCount()) + more
        self.layers += more

    def layers_by_adapter(self) -> dict[str, LayerCount]:
        """Token-layers by name: a copy, which of a dict of strings is one operation."""
        return self._by_adapter.copy()
