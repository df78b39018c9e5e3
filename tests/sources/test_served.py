"""A server whose adapters lie on a hub and in S3: one process, told of both by its environment alone."""

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest

from server.cli import main
from tests.live.process import ADMIN_KEY, LLAMA, LiveServer, Site, save_readable_model, serve
from tests.parity.adapters import save_adapter
from tests.sources.conftest import BUCKET, aws_variables, upload
from tests.sources.hub_site import HubSite, Repository, files_of

TOKEN = "hf_the-token-of-a-test"
NAMES = ("a", "b", "c")


@dataclass(frozen=True)
class Served:
    """A server, where its adapters are from, and whoever holds its admin key."""

    server: LiveServer
    hub: HubSite
    http: httpx.Client
    folders: dict[str, Path]
    home: Path

    def load(self, name: str, path: str, **more: object) -> httpx.Response:
        body = {"lora_name": name, "lora_path": path} | more
        return self.http.post("/v1/load_lora_adapter", json=body)

    def text(self, model: str) -> str:
        body = {"model": model, "prompt": "Once", "max_tokens": 12, "temperature": 0}
        response = self.http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["text"]
        return text

    def adapters(self) -> dict[str, dict[str, Any]]:
        found = self.http.get("/admin/adapters").json()["adapters"]
        return {adapter["name"]: adapter for adapter in found}


@pytest.fixture(scope="module")
def served(s3_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("served")
    folders = {
        name: save_adapter(LLAMA, "plain", root / name, seed=seed)
        for seed, name in enumerate(NAMES)
    }
    site = Site(save_readable_model(root / "tiny"), {"local": folders["a"]}, root, root)
    variables = aws_variables(s3_url)
    with pytest.MonkeyPatch.context() as patch, HubSite().served() as hub:
        for key, value in variables.items():
            patch.setenv(key, value)
        s3 = boto3.client("s3")
        s3.create_bucket(Bucket=BUCKET)
        upload(s3, folders["b"], "team/b")
        upload(s3, folders["c"], "private/c")
        s3.close()
        for name, folder in folders.items():
            hub.repositories[f"org/{name}"] = Repository(token=TOKEN)
            hub.repositories[f"org/{name}"].commit(files_of(folder), "main", "v1")
        hub.repositories["other/c"] = hub.repositories["org/c"]
        variables |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(root / "hf"), "HF_TOKEN": TOKEN}
        arguments = ["--admin-key", ADMIN_KEY, "--database", f"sqlite:///{root / 'fathom.db'}"]
        arguments += [
            "--adapter",
            "hubbed=hf://org/a@v1",
            "--adapter",
            f"stored=s3://{BUCKET}/team/b",
        ]
        arguments += ["--adapter-source", "hf://org", "--adapter-source", f"s3://{BUCKET}/team"]
        arguments += ["--adapter-cache", str(root / "kept"), "--max-cpu-loras", "2"]
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        with (
            serve(site, root / "log", *arguments, variables=variables) as server,
            httpx.Client(base_url=server.url, headers=headers, timeout=60) as http,
        ):
            yield Served(server, hub, http, folders, root)
            assert TOKEN not in server.stderr
            assert "Traceback" not in server.stderr, server.stderr


def test_content_is_what_identifies_an_adapter_wherever_it_lies(served: Served) -> None:
    texts = {name: served.text(name) for name in ("local", "hubbed", "stored", "tiny", "hubbed@0")}
    assert texts["hubbed"] == texts["local"]
    assert texts["hubbed@0"] == texts["tiny"]
    assert len({texts["local"], texts["stored"], texts["tiny"]}) == 3
    found = served.adapters()
    assert found["hubbed"]["digest"] == found["local"]["digest"] != found["stored"]["digest"]
    commit = served.hub.repositories["org/a"].revisions["v1"]
    assert found["hubbed"]["path"] == f"hf://org/a@{commit}"
    assert found["stored"]["path"] == f"s3://{BUCKET}/team/b"


def test_an_administrator_loads_from_what_the_settings_allow(served: Served) -> None:
    assert served.load("from-hub", "hf://org/b@main").status_code == 200
    assert served.load("from-s3", f"s3://{BUCKET}/team/b").status_code == 200
    assert served.text("from-hub") == served.text("from-s3") == served.text("stored")


@pytest.mark.parametrize(
    "path",
    [
        "hf://other/c",
        "hf://organisation/c",
        f"s3://{BUCKET}/private/c",
        f"s3://{BUCKET}/teams/b",
        "hf://org/../other/c",
        f"s3://{BUCKET}/team/../private/c",
        f"s3://{BUCKET}/team//b",
        "s3://key:secret@adapters/team/b",
        "memory://org/c",
        "http://127.0.0.1/x",
        "file:///etc",
    ],
)
def test_nobody_is_asked_for_anything_else(served: Served, path: str) -> None:
    served.hub.requests.clear()
    response = served.load("x", path)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "bad_adapter_path")
    assert "secret" not in response.text
    assert served.hub.requests == []
    assert served.http.put("/admin/adapters/x", json={"path": path}).status_code == 400
    assert "x" not in served.adapters()


def test_a_refusal_of_the_hubs_names_the_place_and_no_token(served: Served) -> None:
    repository = served.hub.repositories["org/c"]
    for status, expected in ((403, 400), (500, 503)):
        repository.status = status  # the hub's words hold the token
        response = served.load("x", "hf://org/c")
        assert response.status_code == expected
        assert "hf://org/c" in response.json()["error"]["message"]
        assert TOKEN not in response.text
    repository.status = None
    missing = served.load("x", "hf://org/nothing")
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "lora_path")


def test_requests_go_on_while_an_adapter_is_fetched(served: Served) -> None:
    repository = served.hub.repositories["org/c"]
    repository.held = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(served.load, "slow", "hf://org/c")
        while "/blob/" not in "".join(served.hub.paths("GET")[-1:]):
            assert not loading.done(), loading.result().text
            served.text("tiny")
        assert served.text("stored") == served.text("stored")
        assert not loading.done()
        repository.held.set()
        assert loading.result().status_code == 200
    repository.held = None
    assert served.text("slow") not in (served.text("local"), served.text("stored"))


def test_what_left_host_memory_is_read_from_here_and_fetched_again_if_it_is_gone(
    served: Served,
) -> None:
    """Two adapters fit host memory. A branch that moved since does not matter: the commit is known."""
    expected = served.text("hubbed"), served.text("stored")

    def forget() -> None:
        for folder in "a", "b":
            assert served.load("other", str(served.folders[folder]), load_inplace=True).status_code
        served.text("local")
        served.text("tiny")

    forget()
    served.hub.requests.clear()
    assert (served.text("hubbed"), served.text("stored")) == expected
    assert served.hub.requests == []
    forget()
    shutil.rmtree(served.home / "hf" / "hub")
    shutil.rmtree(served.home / "kept")
    served.hub.repositories["org/a"].commit(files_of(served.folders["c"]), "v1")
    assert (served.text("hubbed"), served.text("stored")) == expected
    assert served.hub.paths("GET")


def test_the_commands_take_the_same_names(
    served: Served,
    hub: HubSite,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FATHOM_ADAPTER_CACHE", str(tmp_path / "kept"))
    hub.repositories["org/b"] = Repository()
    hub.repositories["org/b"].commit(files_of(served.folders["b"]), "main")
    out = tmp_path / "cut"
    with pytest.raises(SystemExit) as ended:
        main(["export", "hf://org/b@main", "--depth", "1", "--out", str(out)])
    assert (ended.value.code, (out / "adapter_model.safetensors").exists()) == (0, True)
    model = str(served.home / "tiny")
    with pytest.raises(SystemExit) as ended:
        main(
            ["adapters", model, "--adapter", "x=hf://org/b", "--adapter", "y=hf://org/z", "--json"]
        )
    assert ended.value.code == 1
    shown = capsys.readouterr().out
    assert served.adapters()["stored"]["digest"] in shown
    assert "hf://org/z: does not exist" in shown
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", model, "hf://org/b", "--data", "x.jsonl", "--write"])
    assert (ended.value.code, hub.paths("GET")[-1:]) == (2, hub.paths("GET")[-1:])
    assert "--write: 'b' lies at hf://org/b" in capsys.readouterr().err
