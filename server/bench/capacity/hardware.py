"""What a replica is made of: its step costs, where they are from, and what it is asked to do.

One is measured by `measure`. The other is a GPU that no test machine has: its figures are those that were
published of it, and assumptions that are named as such, each with the number it stands on.
"""

from dataclasses import dataclass

from server.bench.capacity.cost import Costs, LoadCosts, StepCosts
from server.bench.capacity.measurement import Measured
from server.bench.capacity.replica import ReplicaSettings
from server.bench.shape import NAMED, ModelShape
from server.bench.workload import Lengths

RANK = 16


@dataclass(frozen=True, slots=True)
class Target:
    """95 of 100 requests have their first token, and 95 of 100 tokens follow the one before, within these."""

    first_s: float
    gap_s: float


@dataclass(frozen=True, slots=True)
class Hardware:
    """One kind of replica and what it serves."""

    name: str
    costs: Costs
    replica: ReplicaSettings
    prompt: Lengths
    output: Lengths
    target: Target
    adapter_bytes: int


@dataclass(frozen=True, slots=True)
class Assumption:
    """One number of the GPU's. source: `measured` or `assumed`, and by what."""

    what: str
    value: str
    source: str


def core_of(measured: Measured) -> Hardware:
    """One core of the machine that was measured, with nothing else to do."""
    return Hardware(
        f"one core, {measured.model.partition(':')[0]}",
        measured.costs,
        ReplicaSettings(
            num_layers=measured.num_layers,
            max_loras=64,
            max_cpu_loras=1024,
            max_num_batched_tokens=128,
            kv_tokens=65_536,
        ),
        Lengths(16, 112),
        Lengths(16, 112),
        Target(first_s=1.0, gap_s=0.25),
        measured.adapter_bytes,
    )


def lora_parameters(shape: ModelShape, rank: int) -> int:
    """Of an adapter on every Linear of every layer."""
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden, wide = shape.hidden_size, shape.intermediate_size
    widths = 2 * (hidden + q) + 2 * (hidden + kv) + 3 * (hidden + wide)
    return shape.num_layers * rank * widths


_SHAPE = NAMED["llama-3.1-8b"]

# Published in the README's chapter on GPUs: tokens a second of one H200.
_ONE_STREAM, _STREAMS_64, _STREAMS_64_LORA, _STREAMS_64_PLAIN = 209.7, 11_769.0, 10_583.0, 1_254.0
_COPY_BYTES_PER_S = 4.17e12
_MEAN_KEYS = 128 + 16
"""Of a row in those runs: prompts of 128 tokens and half of 32 steps."""
_MEAN_DEPTH, _NUM_ADAPTERS = 0.625, 8

# Assumed.
_FLOPS = 0.5 * 989e12
_HOST_TO_DEVICE_BYTES_PER_S = 10e9
_DISK_BYTES_PER_S = 1e9
_KV_TOKENS = 600_000


def h200() -> tuple[Hardware, list[Assumption]]:
    """Llama 3.1 8B's shape in bfloat16 on one H200, and what stands behind each number."""
    shape = _SHAPE
    adapter_bytes = 2 * lora_parameters(shape, RANK)
    kv_bytes = 2 * 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    decode_pair = kv_bytes / _COPY_BYTES_PER_S
    one, many, many_lora = 1 / _ONE_STREAM, 64 / _STREAMS_64, 64 / _STREAMS_64_LORA
    decode_row = (many - one) / 63 - decode_pair * _MEAN_KEYS
    base = one - decode_row - decode_pair * _MEAN_KEYS
    lora_adapter = adapter_bytes / _COPY_BYTES_PER_S
    lora_token = (many_lora - many - _NUM_ADAPTERS * lora_adapter) / (64 * _MEAN_DEPTH)
    plain = 64 / _STREAMS_64_PLAIN
    linears = (
        2 * shape.hidden_size * shape.num_heads * shape.head_dim
        + 2 * shape.hidden_size * shape.num_kv_heads * shape.head_dim
        + 3 * shape.hidden_size * shape.intermediate_size
    ) * shape.num_layers
    prefill_token = 2 * linears / _FLOPS
    prefill_pair = 4 * shape.num_layers * shape.num_heads * shape.head_dim / _FLOPS
    step = StepCosts(
        base=base,
        decode_row=decode_row,
        decode_pair=decode_pair,
        prefill=plain - many_lora,
        prefill_token=prefill_token,
        prefill_pair=prefill_pair,
        lora_token=lora_token,
        lora_adapter=lora_adapter,
    )
    load = LoadCosts(
        disk_s=adapter_bytes / _DISK_BYTES_PER_S,
        slot_s=adapter_bytes / _HOST_TO_DEVICE_BYTES_PER_S,
    )
    hardware = Hardware(
        "one H200, Llama 3.1 8B",
        Costs(step, load),
        ReplicaSettings(
            num_layers=shape.num_layers,
            max_loras=64,
            max_cpu_loras=1024,
            max_num_batched_tokens=1024,
            kv_tokens=_KV_TOKENS,
            block_size=256,
        ),
        Lengths(64, 960),
        Lengths(16, 240),
        Target(first_s=1.0, gap_s=0.15),
        adapter_bytes,
    )
    return hardware, [
        Assumption("a step of one row, base", f"{1e3 * one:.2f} ms", "measured"),
        Assumption("a step of 64 rows, base", f"{1e3 * many:.2f} ms", "measured"),
        Assumption(
            "the same, 8 adapters, mean depth 0.625", f"{1e3 * many_lora:.2f} ms", "measured"
        ),
        Assumption(
            "a key read by a decoding row",
            f"{1e9 * decode_pair:.0f} ns",
            f"assumed: {kv_bytes} bytes at the measured speed of a copy, 4.17 TB/s",
        ),
        Assumption(
            "a distinct adapter in a step, whole",
            f"{1e6 * lora_adapter:.0f} µs",
            "assumed: its weights read once at that speed; the rest of what LoRA was measured to"
            " cost goes to its tokens",
        ),
        Assumption(
            "a step with a prompt in it, beside its arithmetic",
            f"{1e3 * (plain - many_lora):.0f} ms",
            "assumed: as a step without recordings was measured to take longer, which is the host's time",
        ),
        Assumption(
            "a prompt token",
            f"{1e6 * prefill_token:.0f} µs",
            f"assumed: {2 * linears / 1e9:.1f} GFLOP at half of 989 TFLOP/s, added to the host's time",
        ),
        Assumption(
            "an adapter into a slot",
            f"{1e3 * load.slot_s:.0f} ms",
            f"assumed: {adapter_bytes / 1e6:.0f} MB at 10 GB/s, and all rows wait",
        ),
        Assumption(
            "an adapter read from shared storage",
            f"{1e3 * load.disk_s:.0f} ms",
            "assumed: at 1 GB/s, and its request waits",
        ),
        Assumption("room for keys and values", f"{_KV_TOKENS} tokens", "assumed: 79 of 141 GB"),
    ]
