"""`python -m server.bench.gpu`: first whether the decode path is right on this device, then how fast.

Prints a table and, with `--json`, writes all of it. The status is 1 where something differs by more
than its tolerance; how fast anything was is never a failure. `--parts` splits it where one command
must not take long: 8 billion parameters are drawn, written and loaded anew for each.
"""

import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from cyclopts import App, Parameter
from cyclopts.validators import Number

from server import command_line
from server.bench.baseline import load_baselines
from server.bench.check import check, sample
from server.bench.findings import command
from server.bench.gpu.agreement import graph_agreement, kernel_agreements
from server.bench.gpu.decode_rate import copy_bandwidth, decode_rate, decoding, weight_bytes
from server.bench.gpu.kernel_times import kernel_times
from server.bench.gpu.peers import ContinuousBatching, static_rate
from server.bench.gpu.report import BASE, CONTINUOUS, MIXED, ONE, PEFT, GpuReport, show, write
from server.bench.in_process import EngineClient
from server.bench.mix import Choice
from server.bench.options import BenchOptions
from server.bench.plan import Plan, plan_local
from server.bench.shape import parse_shape
from server.config import Settings
from server.engine.async_engine import AsyncEngine
from server.engine.core import EngineCore
from server.engine.request import LoraSelection
from server.loading import progress_on_stderr
from server.logs import configure_logs
from server.model.checkpoint import LoraCheckpoint

Part = Literal["check", "speed", "plain", "peft", "continuous", "kernels"]
Count = Annotated[int, Parameter(validator=Number(gte=1))]
_DEPTH_PARTS = 4
_NUM_CHECKED = 9

app = App(name="gpu", help="Is the decode path of a GPU right, and how far is it from its limits?")


@app.default
def run(
    *,
    shape: str = "llama-3.1-8b",
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    device: Literal["cuda", "cpu"] = "cuda",
    parts: Annotated[tuple[Part, ...], Parameter(consume_multiple=True, negative=())] = (
        "check", "speed", "plain", "peft", "continuous",
    ),
    num_adapters: Count = 8,
    rank: Count = 16,
    streams: Count = 64,
    prompt_len: Count = 128,
    steps: Count = 64,
    rounds: Count = 5,
    copy_bytes: Count = 1 << 30,
    seed: Annotated[int, Parameter(validator=Number(gte=0))] = 0,
    json: Path | None = None,
) -> int:  # fmt: skip
    """Compare, then time.

    Parameters
    ----------
    shape
        A random Llama as of `fathom bench --random-model`.
    dtype
        Of weights and activations.
    device
        A CPU has no recorded steps; it shows that the command runs.
    parts
        check (kernels, recorded steps, PEFT); speed (the engine's sides), and in turn with them plain (its
        mixed side without recordings), peft (PEFT's mixed batch), continuous (transformers' continuous
        batching); kernels (of a step: each one's launches and time).
    num_adapters
        Random adapters. The first reaches a quarter of the layers, the next a half, three quarters, all.
    rank
        Of theirs, on every linear module.
    streams
        Sequences that decode at once.
    prompt_len
        Tokens of each prompt.
    steps
        Decode steps that are timed in a round.
    rounds
        How often each side is timed, in turn.
    copy_bytes
        Size of the copy that measures bandwidth.
    seed
        Of weights and prompts.
    json
        Write everything to this file, and after each round what there is so far.
    """
    configure_logs("warning")
    layers = parse_shape(shape).num_layers
    depths = sorted({-(-layers * part // _DEPTH_PARTS) for part in range(1, _DEPTH_PARTS + 1)})
    options = BenchOptions(
        random_model=shape,
        num_adapters=num_adapters,
        rank=rank,
        concurrency=streams,
        num_requests=streams,
        prompt_len=str(prompt_len),
        # The first to decode waits for the prompts of all others.
        output_len=str(2 * steps + streams + 16),
        mix=",".join(f"a{index}@{depths[index % len(depths)]}=1" for index in range(num_adapters)),
        seed=seed,
    )
    settings = Settings.model_validate(
        {
            "device": device, "dtype": dtype, "max_num_seqs": streams, "max_loras": num_adapters,
            "max_num_batched_tokens": max(512, 2 * streams), "max_lora_rank": max(rank, 256),
            "max_cpu_loras": max(num_adapters, 256),
        }
    )  # fmt: skip
    report = GpuReport(
        {"model": shape, "dtype": dtype, "adapters": f"{num_adapters} of rank {rank}",
         "depths": "/".join(map(str, depths)), "streams": streams, "prompt": prompt_len,
         "steps": steps, "seed": seed}
    )  # fmt: skip

    def save() -> None:
        """What there is so far, in case the command is ended before it ends."""
        if json is not None:
            write(report, command(), json)

    with tempfile.TemporaryDirectory(prefix="fathom-bench-") as directory:
        with progress_on_stderr() as progress:
            plan = plan_local(settings, options, Path(directory), progress)
        if "check" in parts:
            _check(plan, report)
            save()
        timed = set(parts) - {"check", "kernels"}
        if timed or "kernels" in parts:
            with _core(plan) as core:
                if timed:
                    _time(core, plan, report, rounds, steps, copy_bytes, timed, save)
                if "kernels" in parts:
                    _profile(core, plan, report, steps)
            _free()
    show(report)
    save()
    return int(not report.is_right)


def _check(plan: Plan, report: GpuReport) -> None:
    device = torch.device(plan.settings.device)
    with _core(plan) as core:
        config = core.runner.model.config.get_text_config()
        widths = (config.hidden_size, config.intermediate_size)
        report.agreements.extend(kernel_agreements(device, widths))
        _note(core, report)
        if core.runner.graphs is not None:
            report.agreements.append(graph_agreement(core.runner, _occupied(core, plan)))
            if core.runner.graphs.why_off is not None:
                report.notes.append(f"graphs are off: {core.runner.graphs.why_off}")
    _free()
    items = sample(plan.workload.run(-1), _NUM_CHECKED)[:_NUM_CHECKED]
    items[0] = replace(items[0], choice=Choice())
    engine = AsyncEngine.from_settings(plan.settings, lambda *_: None)
    try:
        choices = [item.choice for item in items]
        (reference,) = load_baselines(["peft"], plan.settings, choices, "dynamic")
        report.check = check(EngineClient(engine), reference, items, plan.settings.dtype)
    finally:
        engine.shutdown()
    del engine, reference
    _free()


def _time(
    core: EngineCore,
    plan: Plan,
    report: GpuReport,
    rounds: int,
    steps: int,
    copy_bytes: int,
    parts: set[Part],
    save: Callable[[], None],
) -> None:
    settings = plan.settings
    sides = {ONE: 1, BASE: 0, MIXED: 0, "streams, mixed, no graphs": 0}
    graphs, model = core.runner.graphs, core.runner.model
    if graphs is None or "plain" not in parts:
        del sides["streams, mixed, no graphs"]
    bandwidth = copy_bandwidth(model.device, copy_bytes)
    report.facts["copy, GB/s"] = round(bandwidth / 1e9, 1)
    report.limit = bandwidth / weight_bytes(model)
    _note(core, report)
    peft, continuous = None, None
    if "peft" in parts:
        (peft,) = load_baselines(["peft"], settings, plan.workload.choices, "dynamic")
    if "continuous" in parts:
        continuous = _continuous(plan, report)
    for number in range(-1, rounds):  # the first is not kept: it compiles and records
        items = plan.workload.run(number)
        base = [replace(item, choice=Choice()) for item in items]
        for side, num_streams in sides.items():
            own = items if "mixed" in side else base
            core.runner.graphs = None if "no graphs" in side else graphs
            rate = decode_rate(core, own[: num_streams or None], steps)
            core.runner.graphs = graphs
            if number >= 0:
                report.add(side, rate)
        if peft is not None:
            _add(report, PEFT, static_rate(peft, items, steps), number)
        if continuous is not None:
            _add(report, CONTINUOUS, continuous.rate(base, steps), number)
        save()
    if continuous is not None:
        report.facts["continuous batching's attention"] = continuous.attention
    if graphs is not None:
        report.facts["recordings"] = len(graphs.buckets)
        if graphs.why_off or graphs.why_plain:
            report.notes.append(f"graphs: {graphs.why_off or graphs.why_plain}")


def _profile(core: EngineCore, plan: Plan, report: GpuReport, steps: int) -> None:
    items = plan.workload.run(0)
    base = [replace(item, choice=Choice()) for item in items]
    for side, own in ((ONE, base[:1]), (BASE, base), (MIXED, items)):
        with decoding(core, own) as step:
            report.kernels[side] = kernel_times(step, steps)


def _add(report: GpuReport, side: str, rate: float, number: int) -> None:
    if number >= 0:
        report.add(side, rate)


def _continuous(plan: Plan, report: GpuReport) -> ContinuousBatching | None:
    """None, and a note of why, where this transformers or this device cannot run it."""
    settings = plan.settings
    try:
        made = ContinuousBatching.load(str(settings.model), settings.dtype, settings.device)
        made.rate([replace(item, choice=Choice()) for item in plan.workload.run(-2)[:2]], 4)
    except Exception as error:  # noqa: BLE001 -- a peer that cannot run ends no measurement
        report.notes.append(f"continuous batching does not run here: {error!r}")
        return None
    return made


@contextmanager
def _core(plan: Plan) -> Iterator[EngineCore]:
    core = EngineCore.from_settings(plan.settings)
    for name, path in plan.settings.adapter_paths().items():
        core.registry.load(name, path)
    try:
        yield core
    finally:
        core.close()


def _occupied(core: EngineCore, plan: Plan) -> list[tuple[int, int]]:
    """Slot and depth of the base and of some of the mix, now on the device."""
    chosen: list[tuple[int, int]] = [(-1, 0)]
    for item in sample(plan.workload.run(0), _NUM_CHECKED)[: _NUM_CHECKED - 2]:
        lora: LoraSelection = core.registry.select(str(item.choice.adapter), item.choice.depth)
        assert lora.adapter is not None
        content = lora.adapter.content
        assert isinstance(content, LoraCheckpoint)
        slot = core.runner.slots.acquire(lora.adapter.uid, content)
        assert slot is not None
        core.runner.slots.release(lora.adapter.uid)
        chosen.append((slot, lora.effective_depth))
    return chosen


def _note(core: EngineCore, report: GpuReport) -> None:
    report.facts["LoRA kernel"] = core.runner.kernel_name
    report.facts["attention"] = core.runner.attention_name
    report.facts["recorded"] = "no" if core.runner.graphs is None else "as CUDA graphs"


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> None:
    """Run one command. See `command_line.run`."""
    command_line.run(app, arguments)


if __name__ == "__main__":
    main()
