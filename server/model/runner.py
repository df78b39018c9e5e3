"""Sequences of one step -> packed tensors -> logits.

The only caller of the transformers model once it is loaded. Knows rows, not requests.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.model import context, faults, grouped_mm
from server.model.adapters import AdapterSlots
from server.model.attention import StepLayout
from server.model.batch import BatchedSequence, PackedRows
from server.model.decode import DecodeInputs, Fed
from server.model.decode_attention import DecodeAttention, GatheredDecode
from server.model.foreign_hooks import ForeignHooks
from server.model.gathered import GatheredSlots
from server.model.graphs import DecodeGraphs, row_bucket
from server.model.grouped_mm import GroupedProducts
from server.model.hooks import LoraHooks
from server.model.kv_cache import KVCache
from server.model.lora import LoraStep
from server.model.native.library import Library
from server.model.native.step import NativeStep
from server.model.packed import PackedLinear
from server.model.recorder import Recorder
from server.model.replay.lowered import BindChain
from server.model.replay.step_replay import StepReplay
from server.model.sdpa import AttentionStep
from server.model.targets import Targets
from server.model.wanted_rows import WantedRows

_MIN_ROWS_A_WANTED = 2
"""Where there are fewer rows to one whose logits are wanted, the last layer is computed whole."""

Logits = Tensor
"""`[num_logits, vocab_size]` on the model's device; what the engine hands on to its sampler."""


class ModelRunner:
    """Runs packed steps `[1, num_tokens]` over an unmodified transformers model."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: KVCache,
        targets: Targets,
        max_loras: int,
        layout: type[StepLayout] = AttentionStep,
        gathered: GatheredSlots | None = None,
        max_lora_bytes: int | None = None,
    ) -> None:
        """gathered: where slots lie for `record_steps`."""
        self.model = model
        self._gathered = gathered
        self._layout = layout
        self.cache = cache
        self.targets = targets
        products = None
        if gathered is not None and grouped_mm.is_available(model.device, model.dtype):
            products = GroupedProducts(gathered, model.device)
        self.hooks = LoraHooks(targets.num_layers, gathered, products)
        self._foreign_hooks = ForeignHooks(model, self.hooks)
        self._is_packed = any(isinstance(module, PackedLinear) for module in model.modules())
        self.slots = AdapterSlots(
            self.hooks, targets, max_loras, model.dtype, model.device, max_lora_bytes
        )
        self.graphs: DecodeGraphs | None = None
        self.replay: StepReplay | None = None
        self.before_forward: Callable[[], None] = lambda: None
        """Called in each `run` on a CPU when it begins to compute, or when a program's kernels do."""

    @property
    def attention_name(self) -> str:
        """Which attention serves."""
        return self._layout.name

    @property
    def kernel_name(self) -> str:
        """Which LoRA kernel decode steps use."""
        return "grouped" if self._gathered is None else self._gathered.kernel.name

    @property
    def num_kernel_calls(self) -> int:
        """Calls of compiled kernels so far, which torch's dispatcher does not see: LoRA and chains."""
        num_chains = 0 if self.replay is None else self.replay.num_chains_run
        return self.hooks.num_kernel_calls + num_chains

    def record_steps(
        self,
        recorder: Recorder,
        max_num_seqs: int,
        max_model_len: int,
        attention: type[DecodeAttention] = GatheredDecode,
        bind: BindChain | None = None,
    ) -> None:
        """From now on run decode steps of up to so many sequences, so long, as recordings.

        bind: see `DecodeGraphs`.
        """
        assert self._gathered is not None
        max_blocks = self.cache.num_blocks_for(max_model_len)
        max_rows = row_bucket(max_num_seqs)
        inputs = DecodeInputs(self.cache, max_rows, max_blocks, self.model.device, attention)
        self.graphs = DecodeGraphs(
            self.model,
            self.hooks,
            self._gathered,
            inputs,
            recorder,
            self.targets.num_layers,
            bind,
        )

    @torch.inference_mode()
    def run(self, batch: Sequence[BatchedSequence]) -> tuple[Logits, list[int]]:
        """One forward pass.

        Returns logits in the model's dtype and the order in which the batch was packed: logits
        begin with the `num_logits` rows of `batch[order[0]]`, and so on. Raises ModelError for a row
        whose slot does not hold its adapter as deep as the row reaches.
        """
        order = sorted(range(len(batch)), key=lambda index: _packing_key(batch[index]))
        packed = [batch[index] for index in order]
        recorded = None if self.graphs is None else self.graphs.run(packed)
        if recorded is not None:
            return recorded, order
        device = self.model.device
        for sequence in packed:
            self.slots.check(sequence.slot, sequence.depth)
        rows = PackedRows.of(packed)
        lora = LoraStep.build(packed, self.targets.num_layers)
        self.hooks.install(0 if lora is None else lora.max_depth)
        attention = self._layout.build(self.cache, packed, device)
        if self.replay is not None and isinstance(attention, NativeStep):
            replayed = self.replay.run(rows, attention, lora, self.before_forward)
            if replayed is not None:
                return replayed, order
        self.before_forward()
        kept = torch.tensor(rows.wanted, dtype=torch.int64, device=device)
        wanted = self._wanted(kept, len(rows.token_ids))
        with context.step(context.StepContext(attention, lora, wanted)):
            output = self.model(
                input_ids=torch.tensor([rows.token_ids], device=device),
                position_ids=torch.tensor([rows.positions], device=device),
                use_cache=False,
                logits_to_keep=kept,
            )
        logits: Logits = output.logits[0]
        return logits, order

    def _wanted(self, rows: Tensor, num_rows: int) -> WantedRows | None:
        """What the last layer is computed for; None for all of it."""
        if not self._is_packed or len(rows) * _MIN_ROWS_A_WANTED > num_rows:
            return None
        if self._foreign_hooks.exist():
            return None
        return WantedRows(rows, num_rows, len(self.cache.keys))

    def replay_steps(self, library: Library, max_num_seqs: int, max_step_tokens: int) -> None:
        """From now on run steps as programs, where the model is packed for a CPU."""
        self.replay = StepReplay(
            self.model,
            self.hooks,
            self._foreign_hooks,
            self.cache,
            library,
            max_num_seqs,
            max_step_tokens,
        )

    @property
    def lets_go_of_python(self) -> bool:
        """Whether steps compute without the GIL, from the call of `before_forward` on."""
        return self.replay is not None and self.replay.why_off is None

    @property
    def runs_ahead(self) -> bool:
        """Whether `run_ahead` may do anything: where steps are recorded."""
        return self.graphs is not None and self.graphs.why_off is None

    @torch.inference_mode()
    def run_ahead(
        self, batch: Sequence[BatchedSequence], token_ids: Tensor, rows: Sequence[int]
    ) -> tuple[Logits, list[int]] | None:
        """`run` for one-token sequences whose tokens only the device knows.

        token_ids: int64, on the device; `batch[i]`'s token is `token_ids[rows[i]]`, whatever it says
        itself. Returns None, and computes nothing that counts, for a step that is not recorded.
        """
        if self.graphs is None:
            return None
        order = sorted(range(len(batch)), key=lambda index: _packing_key(batch[index]))
        packed = [batch[index] for index in order]
        logits = self.graphs.run(packed, Fed(token_ids, [rows[index] for index in order]))
        return None if logits is None else (logits, order)

    def is_device_lost(self) -> bool:
        """Whether the device answers no more; asked after something has raised."""
        return faults.is_device_lost(self.model.device)

    def free_memory(self) -> None:
        """Make room on the device, as far as nobody needs it."""
        faults.free_memory(self.model.device)

    def close(self) -> None:
        """Take every hook off the model."""
        if self.graphs is not None:
            self.graphs.clear()
        self.slots.clear()
        self.hooks.install(0)


def _packing_key(sequence: BatchedSequence) -> tuple[bool, int, int]:
    # One-token rows first, because attention batches them; within each part the rows of an adapter
    # together and the deepest first, so that the rows that reach a layer are one slice.
    return (len(sequence.token_ids) > 1, sequence.slot, -sequence.depth)
