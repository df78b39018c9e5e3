"""The command line: help, precedence, one-line errors, and what each command prints."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from boundary.record import FILE_NAME, BoundaryRecord, write
from server import __version__, demo, doctor, generate, loading, serve
from server.config import ConfigError, Settings, flag, variable
from server.engine.protocol import ModelInfo
from server.engine.request import (
    AdapterRef,
    LoraSelection,
    Request,
    RequestOutput,
    SamplingParams,
    SequenceDelta,
)
from server.environment import load_settings
from server.errors import GenerationError, ModelError, NotFound
from server.model import quantization
from server.model.loader import load
from tests.conftest import Run
from tests.parity.adapters import save_adapter
from tests.parity.zoo import BY_NAME, save_model

ROOT = Path(__file__).parents[1]
NUM_LAYERS = 12


class WordTokenizer:
    """One token a word; a chat template that shouts."""

    chat_template: str | None = "shout"

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        return " ".join(message["content"] for message in messages) + " now"


class FakeEngine:
    """Says the depth after as many words as the depth, so that texts part where they should."""

    info = ModelInfo("base", "base", NUM_LAYERS, 100, 128, 0)

    def __init__(self, *names: str, fails: bool = False) -> None:
        self.tokenizer = WordTokenizer()
        self.requests: list[Request] = []
        self.fails = fails
        self.is_shut_down = False
        self._adapters = {
            name: AdapterRef(name, uid, "sha256:0", 8, NUM_LAYERS, 1, name)
            for uid, name in enumerate(names)
        }

    def adapters(self) -> list[AdapterRef]:
        return list(self._adapters.values())

    async def select(self, model: str, depth: int | str | None) -> LoraSelection:
        if model == self.info.name:
            return LoraSelection(None, 0, NUM_LAYERS, "base")
        if model not in self._adapters:
            raise NotFound(f"the model {model!r} does not exist")
        if depth in ("full", "auto"):
            return LoraSelection(self._adapters[model], NUM_LAYERS, NUM_LAYERS, "full")
        return LoraSelection(self._adapters[model], int(str(depth)), NUM_LAYERS, "request")

    async def generate(self, request: Request) -> AsyncIterator[RequestOutput]:
        self.requests.append(request)
        if self.fails:
            yield RequestOutput(request.id, finished=True, error=GenerationError("it broke"))
            return
        depth = request.lora.depth
        ids = (*[7] * min(depth, 3), 50 + depth)
        yield RequestOutput(request.id, (SequenceDelta(0, "same " * min(depth, 3), ids[:-1]),))
        last = SequenceDelta(0, f"[{depth}]", ids[-1:], finish_reason="length")
        yield RequestOutput(request.id, (last,), finished=True)

    def shutdown(self) -> None:
        self.is_shut_down = True


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeEngine]:
    """Put a fake engine where `fathom generate` loads the real one."""

    def use(*names: str, fails: bool = False) -> FakeEngine:
        fake = FakeEngine(*names, fails=fails)
        monkeypatch.setattr(generate, "load_engine", lambda settings: fake)
        monkeypatch.setattr(generate, "with_demo", lambda settings: settings)
        return fake

    return use


def test_version(fathom: Run) -> None:
    assert fathom("--version") == (0, f"{__version__}\n", "")


def test_help_of_serve_names_every_setting_and_its_variable(fathom: Run) -> None:
    status, text, _ = fathom("serve", "--help")
    assert status == 0
    for name, field in Settings.model_fields.items():
        assert flag(name) in text
        assert variable(name) in text
        assert (field.description or "").split(";")[0].replace("`", "")[:40] in text


def test_the_page_of_settings_lists_every_one() -> None:
    rows = re.findall(
        r"^\| `(MODEL|--[\w-]+)` \| `(FATHOM_\w+)` \| (?:`(.*?)`)? ?\| (.*) \|$",
        (ROOT / "server/docs/settings.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    found = {name: (key, default, text) for name, key, default, text in rows}
    expected = {}
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = "" if default is None or default in ({}, ()) else str(default)
        shown = shown.lower() if isinstance(default, bool) else shown
        expected[flag(name)] = (variable(name), shown, field.description)
    assert found == expected


def test_flags_beat_the_environment(monkeypatch: pytest.MonkeyPatch, fathom: Run) -> None:
    seen: list[Settings] = []
    monkeypatch.setattr(doctor, "doctor", lambda settings, as_json: seen.append(settings) or 0)
    assert fathom("doctor", "--dtype", "bfloat16", FATHOM_DTYPE="float16", FATHOM_PORT="9")[0] == 0
    (settings,) = seen
    assert (settings.dtype, settings.port, settings.model) == ("bfloat16", 9, None)


def test_every_setting_arrives_from_its_flag(
    monkeypatch: pytest.MonkeyPatch, fathom: Run, tmp_path: Path
) -> None:
    seen: list[Settings] = []
    monkeypatch.setattr(serve, "serve", lambda settings: seen.append(settings) or 0)
    config = tmp_path / "fathom.toml"
    config.write_text("max_n = 3\nmax_logprobs = 3\n")
    flags = "--adapter a=x --adapter b=y --kv-cache-bytes 2GiB --no-prefix-caching --port 0"
    arguments = ["some/model", *flags.split(), "--max-n", "4", "--config", str(config)]
    assert fathom("serve", *arguments)[0] == 0
    assert seen == [
        Settings(
            model="some/model",
            adapter={"a": Path("x"), "b": Path("y")},
            kv_cache_bytes=2 << 30,
            prefix_caching=False,
            port=0,
            max_n=4,
            max_logprobs=3,
        )
    ]


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["serve", "--port", "70000"], "--port"),
        (["serve", "--port"], "--port"),
        (["serve", "--prot", "1"], "--prot"),
        (["serve", "--device", "tpu"], "--device"),
        (["serve", "--kv-cache-bytes", "lots"], "--kv-cache-bytes"),
        (["serve", "--adapter", "nameless"], "--adapter"),
        (["serve", "./missing"], "MODEL"),
        (["serve", "--config", "missing.toml"], "missing.toml"),
        (["serve", "a", "b"], "b"),
        (["server"], "server"),
        (["generate"], "--prompt"),
        (["generate", "--prompt", "x", "--depth", "deep"], "--depth"),
        (["generate", "--prompt", "x", "--depth", "-1"], "--depth"),
        (["generate", "--prompt", "x", "--max-tokens", "0"], "--max-tokens"),
        (["generate", "--prompt", "x", "--temperature", "-1"], "--temperature"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(
    fathom: Run, arguments: list[str], culprit: str
) -> None:
    status, out, err = fathom(*arguments)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("fathom: ")
    assert culprit in err


def test_a_bad_variable_stops_every_command(fathom: Run) -> None:
    status, _, err = fathom("doctor", FATHOM_MAX_LORAS="none")
    assert status == 2
    assert err.startswith("fathom: FATHOM_MAX_LORAS: ")


def test_a_refused_model_is_one_line_and_status_1(
    fathom: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(settings: Settings) -> FakeEngine:
        raise ModelError("it is a toaster")

    monkeypatch.setattr(generate, "load_engine", refuse)
    assert fathom("generate", "m", "--prompt", "x") == (1, "", "fathom: it is a toaster\n")


@pytest.mark.usefixtures("process_as_it_was")
def test_a_database_that_cannot_be_opened_is_one_line_before_any_model_loads(
    fathom: Run, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'nowhere' / 'fathom.db'}"
    status, out, err = fathom("serve", "no/such-model", "--port", "0", "--database", url)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("fathom: the database cannot be opened: ")
    assert "nowhere" in err


def test_without_a_model_the_demo_stands_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(demo, "model_path", lambda: tmp_path)
    monkeypatch.setattr(demo, "adapters", lambda: {"a": tmp_path / "a", "b": tmp_path / "b"})
    settings = loading.with_demo(Settings(adapter={"a": tmp_path / "mine"}))
    assert settings.model == str(tmp_path)
    assert settings.served_model_name == "fathom-demo"
    assert settings.adapter == {"a": tmp_path / "mine", "b": tmp_path / "b"}
    named = Settings(model="other")
    assert loading.with_demo(named) is named


def test_a_missing_demo_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "model_path", lambda: tmp_path)
    with pytest.raises(ModelError, match="embedded demo is missing"):
        loading.with_demo(Settings())


def test_progress_off_a_terminal_is_a_line_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with loading.progress_on_stderr() as report:
        for done in range(3):
            report("weights", done, 2)
        report("warm-up", 1, 1)
    assert capsys.readouterr().err == "weights ...\nwarm-up ...\n"


def test_generate_asks_three_depths_of_the_first_adapter(
    fathom: Run, engine: Callable[..., FakeEngine]
) -> None:
    fake = engine("one", "two")
    status, out, err = fathom("generate", "m", "--prompt", "go on", "--seed", "5")
    assert status == 0
    assert [request.lora.depth for request in fake.requests] == [0, 6, 12]
    assert {request.lora.adapter.name for request in fake.requests if request.lora.adapter} == {
        "one"
    }
    assert {request.sampling for request in fake.requests} == {
        SamplingParams(max_tokens=64, temperature=0.0, seed=5)
    }
    assert len({request.id for request in fake.requests}) == 3
    for text in ("depth 0 of 12", "depth 6 of 12", "parts from depth 0 after 0 tokens", "[12]"):
        assert text in out
    assert "parts from depth 6 after 3 tokens" in out
    assert "two" in err
    assert fake.is_shut_down


def test_generate_prints_json(fathom: Run, engine: Callable[..., FakeEngine]) -> None:
    engine("one", "two")
    arguments = ["--prompt", "x", "--name", "two", "--depth", "1,2", "--depth", "full", "--json"]
    status, out, _ = fathom("generate", "m", *arguments)
    assert status == 0
    found = json.loads(out)
    assert [(item["adapter"], item["depth"]) for item in found] == [
        ("two", 1),
        ("two", 2),
        ("two", 12),
    ]
    assert [item["num_shared_tokens"] for item in found] == [None, 1, 2]
    assert found[1]["text"] == "same same [2]"
    assert found[1]["token_ids"] == [7, 7, 52]


def test_generate_asks_equal_selections_once(
    fathom: Run, engine: Callable[..., FakeEngine]
) -> None:
    fake = engine("one")
    assert fathom("generate", "m", "--prompt", "x", "--depth", "12,full,auto,12")[0] == 0
    assert len(fake.requests) == 1


def test_generate_without_adapters_asks_the_base(
    fathom: Run, engine: Callable[..., FakeEngine]
) -> None:
    fake = engine()
    status, out, _ = fathom("generate", "m", "--prompt", "x")
    assert status == 0
    assert "base model" in out
    assert [request.lora.adapter for request in fake.requests] == [None]


def test_generate_sends_chats_through_the_template(
    fathom: Run, engine: Callable[..., FakeEngine]
) -> None:
    fake = engine("one")
    assert fathom("generate", "m", "--prompt", "a bb", "--chat", "--depth", "0")[0] == 0
    assert fake.requests[0].prompt_token_ids == (1, 2, 3)
    fake.tokenizer.chat_template = None
    status, _, err = fathom("generate", "m", "--prompt", "a bb", "--chat")
    assert (status, err) == (1, "fathom: base has no chat template; leave out --chat\n")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--prompt", ""], 1, "the prompt has no tokens"),
        (["--prompt", "x", "--name", "three"], 1, "'three' does not exist; adapters loaded: one"),
        (["--prompt", "x", "--max-tokens", "128"], 2, "over the model's 128"),
    ],
)
def test_generate_refuses_what_cannot_be_asked(
    fathom: Run,
    engine: Callable[..., FakeEngine],
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    fake = engine("one")
    found, out, err = fathom("generate", "m", *arguments)
    assert (found, out) == (status, "")
    assert message in err
    assert err.count("\n") == 1
    assert fake.is_shut_down


def test_generate_reports_a_failed_request(fathom: Run, engine: Callable[..., FakeEngine]) -> None:
    engine("one", fails=True)
    assert fathom("generate", "m", "--prompt", "x") == (1, "", "fathom: it broke\n")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny random model and a folder of one good adapter and one broken."""
    root = tmp_path_factory.mktemp("llama")
    architecture = BY_NAME["llama"]
    save_model(architecture, root / "model")
    good = root / "adapters" / "good"
    save_adapter(architecture, "plain", good)
    broken = root / "adapters" / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    return root / "model", root / "adapters"


def test_adapters_shows_what_is_served_and_why_not(fathom: Run, llama: tuple[Path, Path]) -> None:
    model, root = llama
    status, out, _ = fathom("adapters", str(model), "--adapter-root", str(root), "--json")
    assert status == 1
    by_name = {report["name"]: report for report in json.loads(out)}
    assert "peft_type" in by_name["broken"]["refusal"]
    good = by_name["good"]
    assert (good["rank"], good["max_depth"], good["refusal"]) == (4, 4, None)
    assert "q_proj" in good["modules"]
    assert good["digest"].startswith("sha256:")

    status, out, _ = fathom("adapters", str(model), "--adapter", f"mine={root / 'good'}")
    assert status == 0
    assert "4 of 4 layers" in out
    assert good["digest"].removeprefix("sha256:")[:12] in out


def test_adapters_tells_how_many_fit_the_device(
    fathom: Run, llama: tuple[Path, Path], tmp_path: Path
) -> None:
    """Whole, and below the depth of a record that was made for this content and base."""
    model, root = llama
    arguments = ["adapters", str(model), "--device", "cpu", "--json", "--adapter"]
    (plain,) = json.loads(fathom(*arguments, f"a={root / 'good'}")[1])
    assert (plain["calibrated_depth"], plain["calibrated_slot_bytes"]) == (None, None)
    assert plain["slot_bytes"] == plain["num_bytes"]  # float32 in the file and on the device

    shutil.copytree(root / "good", tmp_path / "a")
    revision = load(str(model), None, "cpu", "float32").revision
    for adapter, depth in (("sha256:another", None), (plain["digest"], 3)):
        record = BoundaryRecord.pinned(3, 4, "tried", base=revision, adapter=adapter)
        write(record, tmp_path / "a" / FILE_NAME)
        (found,) = json.loads(fathom(*arguments, f"a={tmp_path / 'a'}")[1])
        assert found["calibrated_depth"] == depth
    assert found["calibrated_slot_bytes"] * 4 == plain["slot_bytes"] * 3
    _, out, _ = fathom(*arguments[:-2], "--adapter", f"a={tmp_path / 'a'}")
    whole, below = (1 << 30) // plain["slot_bytes"], (1 << 30) // found["calibrated_slot_bytes"]
    words = " ".join(out.replace("│", " ").split())
    assert f"{whole}," in words
    assert str(below) in words


def test_adapters_refuses_a_rank_over_the_limit(fathom: Run, llama: tuple[Path, Path]) -> None:
    model, root = llama
    arguments = [str(model), "--adapter", f"a={root / 'good'}", "--max-lora-rank", "2"]
    status, out, _ = fathom("adapters", *arguments)
    assert status == 1
    assert "a refused: " in out
    assert "max_lora_rank is 2" in out


def test_doctor_reports_and_judges(fathom: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "check_demo", lambda: doctor.Check("demo", "there"))
    monkeypatch.setattr(doctor, "requires", lambda name: ["torch>=2.11", "transformers>=5.17,<6"])
    status, out, _ = fathom("doctor", "--device", "cpu", "--json")
    report = json.loads(out)
    checks = {check["name"]: check for check in report["checks"]}
    for name in ("python", "torch", "transformers", "torch build", "device", "dtype", "attention"):
        assert checks[name]["is_ok"], checks[name]
    assert checks["dtype"]["found"] == "float32"
    assert "free of" in checks["memory"]["found"]
    assert "quantization" not in checks
    assert (status, report["ok"]) == (0, True)

    status, out, _ = fathom("doctor", "--device", "cpu", "--quantization", "int8", "--json")
    assert {"name": "quantization", "found": "int8", "is_ok": True} in json.loads(out)["checks"]
    monkeypatch.setattr(quantization, "why_not", lambda: "needs x[int8]")
    status, out, _ = fathom("doctor", "--device", "cpu", "--quantization", "int8")
    assert status == 1
    assert re.search(r"no +quantization +int8 needs x\[int8\]", out)

    monkeypatch.setattr(doctor, "check_demo", lambda: doctor.Check("demo", "gone", is_ok=False))
    status, out, _ = fathom("doctor", "--device", "cpu")
    assert status == 1
    assert re.search(r"no +demo +gone", out)


def test_doctor_finds_a_library_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy>=999", "no-such-thing>=1", "pytest>=999; extra == 'dev'", "pydantic>=2"]
    monkeypatch.setattr(doctor, "requires", lambda name: wanted)
    found = {check.name: check for check in doctor.check_libraries()}
    assert [name for name, check in found.items() if not check.is_ok] == ["numpy", "no-such-thing"]
    assert "needs >=999" in found["numpy"].found


def test_a_port_in_use_is_known_before_anything_loads(fathom: Run) -> None:
    with serve.bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        status, out, err = fathom("serve", "--port", str(port))
    assert (status, out) == (2, "")
    assert f"--port: 127.0.0.1:{port}: Address already in use" in err


@pytest.mark.parametrize(
    ("arguments", "is_refused", "is_warned"),
    [
        (["--host", "0.0.0.0"], True, False),
        (["--host", "0.0.0.0", "--admin-key", "hush"], True, False),  # /v1 is open still
        (["--host", "0.0.0.0", "--insecure"], False, True),
        (["--host", "0.0.0.0", "--api-key", "hush"], False, False),
        (["--host", "0.0.0.0", "--keys-file", "KEYS"], False, False),
        (["--host", "0.0.0.0", "--database", "KEYED"], False, False),
        (["--host", "0.0.0.0", "--database", "EMPTY"], True, False),
        (["--host", "127.0.0.1"], False, False),
        (["--host", "::1"], False, False),
        (["--host", "::"], True, False),
    ],
)
def test_a_server_open_to_other_machines_has_keys_or_is_told_to_be(
    fathom: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    is_refused: bool,
    is_warned: bool,
) -> None:
    def refuse(settings: Settings) -> FakeEngine:
        raise ModelError("enough")

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(serve, "load_engine", refuse)
    places = {
        "KEYS": str(tmp_path / "keys.json"),
        "KEYED": f"sqlite:///{tmp_path / 'keyed.db'}",
        "EMPTY": f"sqlite:///{tmp_path / 'empty.db'}",
    }
    arguments = [places.get(each, each) for each in arguments]
    for place in ("--keys-file", "--database"):
        if place in arguments and places["EMPTY"] not in arguments:
            assert fathom("keys", "add", "ada", *arguments[-2:])[0] == 0
    status, _, err = fathom("serve", "m", "--port", "0", *arguments)
    assert (status, "--insecure to let anybody ask" in err) == (
        (2, True) if is_refused else (1, False)
    )
    assert ("enough" in err) == (not is_refused)  # it got as far as the model
    assert ("other machines can ask" in err) == is_warned
    assert "hush" not in err


def test_an_address_that_is_not_here_is_refused() -> None:
    with pytest.raises(ConfigError, match="--host"):
        serve.bind("no such host", 0)


def test_the_announcement_can_be_pasted() -> None:
    text = serve.announcement(Settings(), FakeEngine("one"), "http://127.0.0.1:1")
    assert text.startswith("ready http://127.0.0.1:1\n")
    body = json.loads(text[text.index("'{") + 1 : text.rindex("}'") + 1])
    assert (body["model"], body["lora_depth"]) == ("one", 12)
    base = serve.announcement(Settings(), FakeEngine(), "http://127.0.0.1:1")
    assert '"model": "base"' in base
    assert "lora_depth" not in base
    keyed = load_settings({"api_key": "hush"}, environ={})
    assert "$FATHOM_API_KEY" in serve.announcement(keyed, FakeEngine(), "http://x")
    assert "hush" not in serve.announcement(keyed, FakeEngine(), "http://x")
    by_database = serve.announcement(Settings(), FakeEngine(), "http://x", asks_for_keys=True)
    assert "$FATHOM_API_KEY" in by_database


def test_a_demo_adapter_is_announced_with_a_prompt_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "valid.jsonl").write_text('{"prompt": "It\'s\\nnew:", "completion": " no"}\n')
    monkeypatch.setattr(demo, "adapters", lambda: {"one": tmp_path})
    monkeypatch.setattr(demo, "valid_path", lambda name: tmp_path / "valid.jsonl")
    text = serve.announcement(Settings(adapter={"one": tmp_path}), FakeEngine("one"), "http://x")
    words = shlex.split(text[text.index("curl") :])
    assert json.loads(words[words.index("-d") + 1])["prompt"] == "It's\nnew:"
    mine = serve.announcement(
        Settings(adapter={"one": Path("mine")}), FakeEngine("one"), "http://x"
    )
    assert "Once upon a time" in mine


@pytest.mark.parametrize(
    ("host", "expected"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]")]
)
def test_the_url_is_one_that_a_client_here_can_use(host: str, expected: str) -> None:
    with serve.bind(host, 0) as listener:
        assert re.fullmatch(rf"http://{re.escape(expected)}:\d+", serve.base_url(listener))


@contextmanager
def running_server(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A `fathom serve` process and its URL."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("FATHOM_")}
    with subprocess.Popen(
        [sys.executable, "-m", "server", "serve", "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
    ) as process:
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            if not ready.startswith("ready "):
                process.kill()
                pytest.fail(f"{ready}{process.communicate()[1]}")
            yield process, ready.split()[1]
        finally:
            process.kill()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_serve_answers_and_stops_cleanly(llama: tuple[Path, Path], stop: signal.Signals) -> None:
    model, root = llama
    arguments = [str(model), "--adapter", f"good={root / 'good'}", "--max-model-len", "64"]
    with running_server(*arguments, "--kv-cache-bytes", "8MiB") as (process, url):
        body = {"model": "good@2", "prompt": "x", "max_tokens": 3, "temperature": 0}
        question = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(question) as answer:
            assert json.load(answer)["lora"]["depth"] == 2
        process.send_signal(stop)
        assert process.stdout is not None
        assert process.stderr is not None
        out, err = process.stdout.read(), process.stderr.read()
        assert process.wait() == 0, err
    assert "curl" in out
    assert "Traceback" not in err


def test_serve_stops_when_an_adapter_is_refused(llama: tuple[Path, Path]) -> None:
    model, root = llama
    command = [sys.executable, "-m", "server", "serve", str(model), "--port", "0"]
    command += ["--adapter", f"bad={root / 'broken'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("fathom: ")
    assert "'bad'" in last
    assert "peft_type" in last
