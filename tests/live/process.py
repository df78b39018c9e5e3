"""A real `fathom serve` process over a tiny random Llama, and what its clients need to know of it.

The Llama is the zoo's, with the output rows of everything but printable ASCII set to zero, so that
what it writes can be read and one character is one token; special tokens appear only where a test
asks for them. Its tokenizer begins every text with `<bos>` and has a chat template.
"""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PretrainedConfig

from tests.parity.adapters import save_adapter
from tests.parity.zoo import BOS, BY_NAME, NUM_BYTES, Architecture, build_model, byte_tokenizer

API_KEY = "key-of-a-client"
ADMIN_KEY = "key-of-an-operator"
BASE = "tiny"
ADAPTERS = {"plain": "plain", "head": "lm_head", "dora": "dora"}
"""Name on the wire -> variant of the zoo's adapters."""

MAX_MODEL_LEN = 1024
BLOCK_SIZE = 4
MAX_NUM_SEQS = 8
MAX_NUM_BATCHED_TOKENS = 16
MAX_N = 4
MAX_LOGPROBS = 20
MAX_BODY_BYTES = 64 << 10

PRINTABLE = range(32, 127)

CHAT_TEMPLATE = r"""
{%- if tools %}{{ 'tools: ' ~ tools | tojson ~ '\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
{{- raise_exception('Unknown role ' ~ message.role) }}
{%- endif %}
{{- message.role ~ ': ' ~ message.content ~ '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""

STOP_TIMEOUT_S = 60
MAX_SCRAPES = 5000
"""A server that is not where a test waits for it by then is stuck: each scrape takes milliseconds."""


def _long_llama() -> PretrainedConfig:
    config = BY_NAME["llama"].make_config()
    config.max_position_embeddings = MAX_MODEL_LEN
    return config


LLAMA: Architecture = dataclasses.replace(BY_NAME["llama"], make_config=_long_llama)


def save_readable_model(directory: Path) -> Path:
    """Write the model and its tokenizer into `directory` and return it."""
    model = build_model(LLAMA)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        unreadable = torch.ones(len(head), dtype=torch.bool)
        unreadable[PRINTABLE.start : PRINTABLE.stop] = False
        head[unreadable] = 0.0
    model.save_pretrained(directory)
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@dataclass(frozen=True, slots=True)
class Site:
    """What lies on the disk: the base model, its adapters, and a folder of lazily loaded ones."""

    model: Path
    adapters: dict[str, Path]
    root: Path
    data: Path
    """Where files of samples may lie."""


def make_site(directory: Path) -> Site:
    """Write all of it below `directory`."""
    root = directory / "root"
    data = directory / "data"
    for folder in (root, data):
        folder.mkdir()
    return Site(
        model=save_readable_model(directory / BASE),
        adapters={
            name: save_adapter(LLAMA, variant, directory / name, seed=seed)
            for seed, (name, variant) in enumerate(ADAPTERS.items())
        },
        root=root,
        data=data,
    )


@dataclass(frozen=True, slots=True)
class LiveServer:
    """A server that has said it is ready."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    @property
    def stderr(self) -> str:
        """What it has logged so far."""
        return self.log.read_text(encoding="utf-8")


@contextmanager
def serve(
    site: Site,
    log: Path,
    *arguments: str,
    program: tuple[str, ...] = ("-m", "server"),
    status: int = 0,
    variables: Mapping[str, str] | None = None,
) -> Iterator[LiveServer]:
    """Start, wait for the ready line, and stop by the process's own id on the way out.

    program: what Python runs, and what goes before `serve`. status: what the process ends with.
    variables: of its environment, beside our own.
    """
    command = [sys.executable, *program, "serve", str(site.model), "--port", "0"]
    command += ["--device", "cpu", "--dtype", "float32", "--kv-cache-bytes", "8MiB"]
    command += ["--block-size", str(BLOCK_SIZE), *arguments]
    if "--log-level" not in arguments:
        command += ["--log-level", "warning"]
    for name, path in site.adapters.items():
        command += ["--adapter", f"{name}={path}"]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("FATHOM_")}
    environ["OMP_NUM_THREADS"] = "1"  # tiny matrices only lose time on a second thread
    environ |= variables or {}
    with (
        log.open("w", encoding="utf-8") as stderr,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environ
        ) as process,
    ):
        try:
            assert process.stdout is not None
            ready, _, url = process.stdout.readline().strip().partition(" ")
            assert ready == "ready", log.read_text(encoding="utf-8")
            yield LiveServer(url, process, log)
            process.terminate()
            assert process.wait(STOP_TIMEOUT_S) == status, log.read_text(encoding="utf-8")
        finally:
            process.kill()


def text_of(token_ids: tuple[int, ...]) -> str:
    """Tokens of this model are single bytes."""
    assert all(token_id < NUM_BYTES for token_id in token_ids)
    return bytes(token_ids).decode("utf-8")


def metric(http: httpx.Client, name: str) -> float:
    """One sample of /metrics, summed over its labels."""
    lines = http.get("/metrics").text.splitlines()
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.partition("{")[0].partition(" ")[0] == name
    )
