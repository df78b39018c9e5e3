"""`fathom doctor`: what this machine offers and what Fathom would make of it.

Each check is one line with a verdict; a check that fails says what to do. Loads no model.
"""

import json
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedConfig

from server import __version__, demo
from server.config import Settings
from server.errors import ModelError
from server.model import quantization, varlen
from server.model.loader import pick_device, pick_dtype
from server.model.native import step as native

# What oneDNN and PyTorch pick kernels by; the bf16 ones decide whether bfloat16 pays on a CPU.
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


@dataclass(frozen=True, slots=True)
class Check:
    """One fact about this machine, and whether Fathom can live with it."""

    name: str
    found: str
    is_ok: bool = True


def doctor(settings: Settings, *, as_json: bool) -> int:
    """Print every check; 1 where one failed."""
    checks = list(examine(settings))
    is_ok = all(check.is_ok for check in checks)
    if as_json:
        report = {"ok": is_ok, "checks": [asdict(check) for check in checks]}
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        table = Table(show_header=False, box=None)
        for check in checks:
            verdict = "[green]ok[/]" if check.is_ok else "[red]no[/]"
            table.add_row(verdict, check.name, escape(check.found))
        Console().print(table)
    return 0 if is_ok else 1


def examine(settings: Settings) -> Iterator[Check]:
    """Every check in the order in which a load would meet it."""
    yield Check("fathom", __version__)
    yield Check("python", f"{platform.python_version()} on {platform.platform()}")
    yield from check_libraries()
    yield torch_build()
    yield from check_device(settings)
    yield Check("cpu", cpu())
    memory = psutil.virtual_memory()
    yield Check("memory", f"{decimal(memory.available)} free of {decimal(memory.total)}")
    yield check_demo()


def check_libraries() -> Iterator[Check]:
    """Each library Fathom depends on, against the range that it was built for."""
    try:
        requirements = requires("fathom-lora") or []
    except PackageNotFoundError:
        yield Check("libraries", "unknown: fathom-lora is not installed", is_ok=False)
        return
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield Check(requirement.name, f"missing, needs {requirement.specifier}", is_ok=False)
            continue
        is_ok = requirement.specifier.contains(found, prereleases=True)
        wanted = "" if is_ok else f", needs {requirement.specifier}"
        yield Check(requirement.name, found + wanted, is_ok)


def torch_build() -> Check:
    """Whether torch was built for this machine's devices."""
    if torch.version.cuda is None:
        return Check("torch build", "CPU only")
    driver = "a device" if torch.cuda.is_available() else "no usable device"
    return Check("torch build", f"CUDA {torch.version.cuda}, {driver}")


def check_device(settings: Settings) -> Iterator[Check]:
    """Where the model would run, tried with one small product in the dtype it would run in."""
    try:
        device = pick_device(settings.device)
    except ModelError as error:
        yield Check("device", error.message, is_ok=False)
        return
    dtype = pick_dtype(settings.dtype, device, PreTrainedConfig())
    name = device.type
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = f"{torch.cuda.get_device_name(device)}, {decimal(free)} free of {decimal(total)}"
    try:
        ones = torch.ones(64, 64, device=device, dtype=dtype)
        is_right = bool(((ones @ ones) == 64).all())
    except RuntimeError as error:
        yield Check("device", f"{name}: {error}", is_ok=False)
        return
    yield Check("device", name if is_right else f"{name}: a product is wrong", is_right)
    yield Check("dtype", f"{dtype}".removeprefix("torch."))
    if settings.quantization != "none":
        reason = quantization.why_not()
        found = settings.quantization if reason is None else f"{settings.quantization} {reason}"
        yield Check("quantization", found, is_ok=reason is None)
    if device.type == "cuda":
        reason = varlen.why_not(device, dtype, [], [], settings.block_size)
        kernel = "flash (varlen_attn)"
    else:
        reason = native.why_not(device, dtype, [])
        kernel = "compiled, in place"
    yield Check(
        "attention", f"gather and SDPA ({reason})" if reason else f"{kernel}, model permitting"
    )


def cpu() -> str:
    """Cores, the flags that kernels are picked by, and torch's threads."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpuinfo = Path("/proc/cpuinfo")
    words: set[str] = set()
    if cpuinfo.is_file():
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
        words = set(found[1].split()) if found else set()
    flags = [flag for flag in CPU_FLAGS if flag in words]
    return (
        f"{usable} cores; {' '.join(flags) or 'no known flags'}; torch uses"
        f" {torch.get_num_threads()} threads, kernels for {torch.backends.cpu.get_cpu_capability()}"
    )


def check_demo() -> Check:
    """Whether `fathom serve` without a model has something to serve."""
    if not (demo.model_path() / "config.json").is_file():
        return Check("demo", f"missing at {demo.model_path()}", is_ok=False)
    return Check("demo", f"adapters {', '.join(demo.adapters())}")
