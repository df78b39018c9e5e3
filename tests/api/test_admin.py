"""The admin routes over a fake engine and a real store: keys, bodies, errors and what they change."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from boundary.store.store import StoreError
from server.api.app import create_app
from server.config import Settings
from tests.api.conftest import ADMIN_KEY, API_KEY
from tests.api.fake_engine import NUM_LAYERS, FakeEngine
from tests.calibration.findings import DEPTH, Work, found

pytestmark = pytest.mark.anyio

SAMPLES = [{"prompt": f"prompt {n}", "completion": f"reply {n}"} for n in range(40)]
JSON = {"content-type": "application/json"}
LIMIT_S = 60


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    root.mkdir()
    lines = [json.dumps(sample) for sample in SAMPLES]
    (root / "valid.jsonl").write_text("\n".join(lines) + "\n")
    (root / "empty.jsonl").write_text("")
    (root / "one.jsonl").write_text(lines[0] + "\n")
    (root / "mixed.jsonl").write_text("\n".join([*lines[:5], '{"prompt": "alone"}']) + "\n")
    (root / "torn.jsonl").write_text("\n".join([*lines[:5], "{"]) + "\n")
    (root / "long.jsonl").write_text(
        "\n".join([*lines[:2], json.dumps({"prompt": "p", "completion": "x" * 600})]) + "\n"
    )
    (root / "huge.jsonl").write_text(lines[0] + "\n" + " " * (65 << 20))
    (tmp_path / "secret.jsonl").write_text(lines[0] + "\n")
    (root / "out.jsonl").symlink_to(tmp_path / "secret.jsonl")
    return root


@pytest.fixture
def settings(tmp_path: Path, data_root: Path) -> Settings:
    return Settings(
        admin_key=ADMIN_KEY,
        api_key=API_KEY,
        database=f"sqlite:///{tmp_path / 'fathom.db'}",
        data_root=data_root,
        max_body_bytes=1 << 20,
    )


@pytest.fixture
async def admin(engine: FakeEngine, settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    engine.calibrations = {}
    app = create_app(settings, engine)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False),
            base_url="http://fathom",
            headers={"authorization": f"Bearer {ADMIN_KEY}"},
            timeout=LIMIT_S,
        ) as client,
    ):
        yield client


def refusal(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


async def recalibrate(
    admin: httpx.AsyncClient, name: str = "tuned", **fields: Any
) -> httpx.Response:
    body = {"dataset": {"samples": SAMPLES}} | fields
    return await admin.post(f"/admin/adapters/{name}/recalibrate", json=body)


async def finished(admin: httpx.AsyncClient, id: str) -> dict[str, Any]:
    """The job at its end, as its events tell it."""
    response = await admin.get(f"/admin/jobs/{id}/events")
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [block.split("\n") for block in response.text.strip().split("\n\n")]
    assert [name for name, _ in events] == ["event: progress"] * (len(events) - 1) + ["event: done"]
    job: dict[str, Any] = json.loads(events[-1][1].removeprefix("data: "))
    return job


async def untouched(admin: httpx.AsyncClient) -> bool:
    jobs = (await admin.get("/admin/jobs")).json()["jobs"]
    history = (await admin.get("/admin/adapters/tuned/boundaries")).json()["boundaries"]
    audit = (await admin.get("/admin/audit?outcome=ok")).json()["entries"]
    return [jobs, history, audit] == [[], [], []]


ROUTES = [
    ("GET", "/admin/adapters"),
    ("PUT", "/admin/adapters/x"),
    ("DELETE", "/admin/adapters/tuned"),
    ("POST", "/admin/adapters/tuned/recalibrate"),
    ("GET", "/admin/jobs"),
    ("GET", "/admin/jobs/x"),
    ("GET", "/admin/jobs/x/events"),
    ("DELETE", "/admin/jobs/x"),
    ("GET", "/admin/adapters/tuned/boundaries"),
    ("POST", "/admin/adapters/tuned/boundaries/1/activate"),
    ("PUT", "/admin/adapters/tuned/boundary"),
    ("GET", "/admin/boundaries/x/curve.svg"),
    ("GET", "/admin/audit"),
    ("GET", "/admin/keys"),
    ("POST", "/admin/keys"),
    ("DELETE", "/admin/keys/x"),
    ("GET", "/admin/usage"),
]


async def test_only_the_admin_key_opens_these_routes(
    admin: httpx.AsyncClient, engine: FakeEngine, settings: Settings
) -> None:
    del admin.headers["authorization"]
    off = create_app(settings.model_copy(update={"admin_key": None}), engine)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(off), base_url="http://fathom"
    ) as client:
        for method, path in ROUTES:
            for key, status in ((None, 401), ("wrong", 401), (API_KEY, 403)):
                headers = {} if key is None else {"authorization": f"Bearer {key}"}
                refusal(await admin.request(method, path, headers=headers), status)
            assert "--admin-key" in refusal(await client.request(method, path), 403)["message"]
    assert len(engine.adapters()) == 2


async def test_every_route_and_body_is_documented(admin: httpx.AsyncClient) -> None:
    document = (await admin.get("/openapi.json")).json()
    documented = {
        (method.upper(), path)
        for path, operations in document["paths"].items()
        for method in operations
        if path.startswith("/admin")
    }
    assert len(documented) == len(ROUTES)
    schemas = document["components"]["schemas"]
    for name in ("RecalibrateRequest", "DatasetSource", "PinRequest", "LoadAdapter", "JobView"):
        assert name in schemas


async def test_a_recalibration_is_started_watched_and_in_force(
    admin: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.slices = Work()
    headers = {"x-request-id": "number-7"}
    response = await admin.post(
        "/admin/adapters/tuned/recalibrate",
        json={"dataset": {"samples": SAMPLES}, "seed": 3, "tolerance": {"share_of_gain": 0.1}},
        headers=headers,
    )
    assert response.status_code == 202
    job = response.json()["job"]
    assert (job["state"], job["adapter"], job["actor"]) == ("queued", "tuned", "admin:number-7")
    assert job["request"]["dataset"]["num_samples"] == 40
    assert "samples" not in job["request"]["dataset"], "what was sent is known by its fingerprint"
    assert job["request"]["tolerance"] == {"share_of_gain": 0.1}
    end = await finished(admin, job["id"])
    assert (end["state"], end["result"]["verdict"]) == ("succeeded", "improves")
    assert (await admin.get(f"/admin/jobs/{job['id']}")).json() == end
    assert (await admin.get("/admin/jobs")).json() == {"jobs": [end]}
    assert await finished(admin, job["id"]) == end, "a job that has ended is told at once"

    (view,) = [
        view
        for view in (await admin.get("/admin/adapters")).json()["adapters"]
        if view["name"] == "tuned"
    ]
    assert (view["calibrated"]["depth"], view["calibrated"]["version"]) == (DEPTH, 1)
    assert (view["residency"], view["refused_record"]) == ("host", None)
    assert view["resident_depth"] is None
    history = (await admin.get("/admin/adapters/tuned/boundaries")).json()
    assert history["active_version"] == 1
    (kept,) = history["boundaries"]
    assert (kept["id"], kept["is_active"]) == (end["boundary_id"], True)
    assert len(kept["record"]["curve"]) == NUM_LAYERS + 1
    assert kept["record"]["verdict"] == kept["evidence"]["verdict"] == "improves"
    svg = await admin.get(f"/admin/boundaries/{kept['id']}/curve.svg")
    assert svg.headers["content-type"] == "image/svg+xml"
    assert svg.text.lstrip().startswith(("<?xml", "<svg"))
    assert "tuned" in svg.text
    actions = [entry["action"] for entry in (await admin.get("/admin/audit")).json()["entries"]]
    assert actions == [
        "job.succeeded", "boundary.activate", "boundary.add", "job.start", "job.create",
    ]  # fmt: skip


async def test_a_file_below_the_data_root_is_as_good(
    admin: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.slices = Work()
    response = await recalibrate(admin, dataset={"file": "valid.jsonl"}, max_samples=36)
    job = response.json()["job"]
    asked = job["request"]["dataset"]
    assert (asked["file"], asked["num_samples"], asked["num_given"]) == ("valid.jsonl", 36, 40)
    assert (await finished(admin, job["id"]))["result"]["num_samples_given"] == 40


async def test_the_text_of_a_file_is_as_good(
    admin: httpx.AsyncClient, engine: FakeEngine, data_root: Path
) -> None:
    engine.slices = Work()
    text = (data_root / "valid.jsonl").read_text()
    told = []
    for dataset in ({"jsonl": text}, {"file": "valid.jsonl"}):
        job = (await recalibrate(admin, dataset=dataset, dry_run=True)).json()["job"]
        assert (await finished(admin, job["id"]))["state"] == "succeeded"
        told.append(job["request"]["dataset"])
    assert told[0]["fingerprint"] == told[1]["fingerprint"]
    assert (told[0]["file"], told[0]["num_samples"]) == (None, 40)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["", "{}"], "line 1 is blank"),
        ([json.dumps(SAMPLES[0]), "{"], "line 2"),
        ([json.dumps(SAMPLES[0]), '{"prompt": "p", "prompt": "q"}'], "line 2"),
        ([json.dumps(SAMPLES[0]), '{"prompt": "alone"}'], "line 2"),
        (['{"prompt": "p", "completion": 3}'], "line 1: 'completion' must be a string"),
    ],
)
async def test_what_is_wrong_with_a_text_is_told_by_its_line(
    admin: httpx.AsyncClient, lines: list[str], words: str
) -> None:
    error = refusal(await recalibrate(admin, dataset={"jsonl": "\n".join(lines)}), 400)
    assert (error["param"], error["code"]) == ("dataset.jsonl", "bad_dataset")
    assert words in error["message"]
    assert await untouched(admin)


async def test_samples_come_from_one_place(admin: httpx.AsyncClient) -> None:
    for dataset in ({}, {"samples": SAMPLES, "jsonl": "{}"}, {"jsonl": "{}", "file": "one.jsonl"}):
        error = refusal(await recalibrate(admin, dataset=dataset), 400)
        assert "either 'samples', 'jsonl' or 'file'" in error["message"]


async def test_a_second_job_is_a_conflict_that_names_the_first(
    admin: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.slices = work = Work(is_held=True)
    first = (await recalibrate(admin)).json()["job"]
    error = refusal(await recalibrate(admin), 409)
    assert first["id"] in error["message"]
    assert error["code"] == "job_running"
    response = await admin.delete(f"/admin/jobs/{first['id']}")
    assert response.status_code == 202
    assert response.json()["job"]["is_cancel_requested"]
    assert (await finished(admin, first["id"]))["state"] == "cancelled"
    assert work.num_cancelled == 1
    response = await admin.delete(f"/admin/jobs/{first['id']}")
    assert (response.status_code, response.json()["job"]["state"]) == (202, "cancelled")


async def test_a_dry_run_and_an_inactive_one_change_no_depth(
    admin: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.slices = Work()
    for fields, num_kept in (({"dry_run": True}, 0), ({"activate": False}, 1)):
        end = await finished(admin, (await recalibrate(admin, **fields)).json()["job"]["id"])
        assert (end["state"], end["result"]["is_activated"]) == ("succeeded", False)
        history = (await admin.get("/admin/adapters/tuned/boundaries")).json()
        assert (len(history["boundaries"]), history["active_version"]) == (num_kept, None)
    assert engine.calibrations == {}


async def test_a_dry_run_with_few_samples_says_how_many_are_needed(
    admin: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.slices = Work(found(num_samples=2))
    response = await recalibrate(admin, dataset={"samples": SAMPLES[:2]}, dry_run=True)
    result = (await finished(admin, response.json()["job"]["id"]))["result"]
    assert (result["verdict"], result["num_samples_needed"] >= 32) == ("too_few", True)


BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({"dataset": {"file": "empty.jsonl"}}, "dataset.file", "no samples"),
    ({"dataset": {"file": "one.jsonl"}}, "dataset", "1 samples are too few"),
    ({"dataset": {"file": "mixed.jsonl"}}, "dataset.file", "line 6"),
    ({"dataset": {"file": "torn.jsonl"}}, "dataset.file", "line 6"),
    ({"dataset": {"file": "long.jsonl"}}, "dataset.file", "line 3: 'completion'"),
    ({"dataset": {"file": "huge.jsonl"}}, "dataset.file", "limit"),
    ({"dataset": {"file": "out.jsonl"}}, "dataset.file", "leads out"),
    ({"dataset": {"file": "../secret.jsonl"}}, "dataset.file", "relative path"),
    ({"dataset": {"file": "/etc/passwd"}}, "dataset.file", "relative path"),
    ({"dataset": {"file": "none.jsonl"}}, "dataset.file", "no file"),
    ({"dataset": {"file": "valid.jsonl", "samples": []}}, "dataset", "either"),
    ({"dataset": {}}, "dataset", "either"),
    ({"dataset": {"path": "valid.jsonl"}}, "dataset.path", "unknown field"),
    ({"dataset": {"samples": []}}, "dataset.samples", "no samples"),
    ({"dataset": {"samples": [*SAMPLES, 7]}}, "dataset.samples[40]", "line 41"),
    (
        {"dataset": {"samples": [{"prompt": "x", "completion": 1}]}},
        "dataset.samples[0].completion",
        "must be a string",
    ),
    ({"dataset": "valid.jsonl"}, "dataset", ""),
    ({"dataset": None}, "dataset", ""),
    ({"max_samples": 31}, "max_samples", "31 samples are too few"),
    ({"max_samples": 0}, "max_samples", "greater than or equal to 1"),
    ({"max_samples": "all"}, "max_samples", "integer"),
    ({"metric": "vibes"}, "metric", "log_likelihood"),
    ({"metric": "kl_to_full"}, "tolerance", "kl_to_full needs a tolerance"),
    ({"metric": "regex_answer"}, "dataset", "sample 0"),
    ({"metric": "exact_match", "pattern": "(x)"}, "pattern", "takes no pattern"),
    ({"metric": "regex_answer", "pattern": "(("}, "pattern", "pattern"),
    ({"method": "guess"}, "method", "sweep"),
    ({"tolerance": -0.1}, "tolerance", "greater than or equal to 0"),
    ({"tolerance": "much"}, "tolerance", "number"),
    ({"tolerance": {"share_of_gain": 1.5}}, "tolerance.share_of_gain", "less than or equal to 1"),
    ({"tolerance": {"share": 0.5}}, "tolerance.share", "unknown field"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"seed": 1.5}, "seed", "integer"),
    ({"activate": "yes"}, "activate", "boolean"),
    ({"dry_run": True, "activate": True}, "activate", "dry_run"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 511}, "max_tokens", "line 1"),
    ({"depth": 3}, "depth", "not supported"),
    ({"adapter": "tuned"}, "adapter", "unknown field"),
]


async def test_what_is_wrong_is_named_and_changes_nothing(
    admin: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.slices = Work()
    for fields, param, why in BAD:
        if fields.get("metric") == "regex_answer" and "pattern" not in fields:
            fields = fields | {"dataset": {"samples": [{"prompt": "p", "completion": "none"}] * 40}}
        error = refusal(await recalibrate(admin, **fields), 400)
        assert (error["param"], why in error["message"]) == (param, True), (fields, error)
    prompts = [{"prompt": f"p {n}"} for n in range(40)]
    error = refusal(await recalibrate(admin, dataset={"samples": prompts}), 400)
    assert (error["param"], "needs completions" in error["message"]) == ("metric", True)
    assert await untouched(admin)


async def test_a_body_that_is_too_large_or_no_json_is_refused(admin: httpx.AsyncClient) -> None:
    path = "/admin/adapters/tuned/recalibrate"
    refusal(await admin.post(path, content=b" " * (2 << 20), headers=JSON), 413)
    refusal(await admin.post(path, content=b"{", headers=JSON), 400)
    refusal(await admin.post(path, content=b"{}", headers={"content-type": "text/plain"}), 400)
    assert refusal(await admin.post(path, content=b"{}", headers=JSON), 400)["param"] == "dataset"
    assert await untouched(admin)


async def test_without_a_data_root_files_cannot_be_named(
    engine: FakeEngine, settings: Settings
) -> None:
    app = create_app(settings.model_copy(update={"data_root": None}), engine)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app),
            base_url="http://fathom",
            headers={"authorization": f"Bearer {ADMIN_KEY}"},
        ) as client,
    ):
        error = refusal(await recalibrate(client, dataset={"file": "valid.jsonl"}), 400)
        assert "--data-root" in error["message"]


WRONG: list[tuple[str, str, Any, int, str]] = [
    (
        "POST",
        "/admin/adapters/none/recalibrate",
        {"dataset": {"samples": SAMPLES}},
        404,
        "name",
    ),
    (
        "POST",
        "/admin/adapters/base/recalibrate",
        {"dataset": {"samples": SAMPLES}},
        404,
        "name",
    ),
    ("DELETE", "/admin/adapters/none", None, 404, "name"),
    ("DELETE", "/admin/adapters/tuned?force=perhaps", None, 400, "force"),
    ("GET", "/admin/adapters/none/boundaries", None, 404, "name"),
    ("GET", "/admin/adapters/tuned/boundaries?limit=0", None, 400, "limit"),
    ("GET", "/admin/adapters?limit=1", None, 400, "limit"),
    ("POST", "/admin/adapters/tuned/boundaries/1/activate", None, 404, "version"),
    ("POST", "/admin/adapters/tuned/boundaries/one/activate", None, 400, "version"),
    ("POST", "/admin/adapters/tuned/boundaries/0/activate", None, 400, "version"),
    ("POST", "/admin/adapters/tuned/boundaries/1/activate", {"why": "x"}, 400, "why"),
    ("PUT", "/admin/adapters/tuned/boundary", {"depth": 13, "reason": "x"}, 400, "depth"),
    ("PUT", "/admin/adapters/tuned/boundary", {"depth": -1, "reason": "x"}, 400, "depth"),
    ("PUT", "/admin/adapters/tuned/boundary", {"depth": "3", "reason": "x"}, 400, "depth"),
    ("PUT", "/admin/adapters/tuned/boundary", {"depth": 3}, 400, "reason"),
    ("PUT", "/admin/adapters/tuned/boundary", {"depth": 3, "reason": " "}, 400, "reason"),
    ("PUT", "/admin/adapters/tuned/boundary", {"depth": 3, "reason": "\x00"}, 400, "reason"),
    ("PUT", "/admin/adapters/none/boundary", {"depth": 3, "reason": "x"}, 404, "name"),
    ("PUT", "/admin/adapters/tuned", {"path": "/adapters/tuned"}, 409, "name"),
    ("PUT", "/admin/adapters/new", {"path": "/adapters/missing"}, 404, "path"),
    ("PUT", "/admin/adapters/new", {"path": "/adapters/corrupt"}, 400, "path"),
    ("PUT", "/admin/adapters/new", {}, 400, "path"),
    ("GET", "/admin/jobs/none", None, 404, "id"),
    ("GET", "/admin/jobs/none/events", None, 404, "id"),
    ("DELETE", f"/admin/jobs/{'0' * 32}", None, 404, "id"),
    ("GET", "/admin/jobs?limit=many", None, 400, "limit"),
    ("GET", "/admin/jobs?limit=1&limit=2", None, 400, "limit"),
    ("GET", "/admin/boundaries/none/curve.svg", None, 404, "id"),
    ("GET", "/admin/audit?before=0", None, 400, "before"),
    ("GET", "/admin/audit?after=1", None, 400, "after"),
    ("GET", "/admin/audit?actor=a%00", None, 400, "actor"),
]


async def test_wrong_names_numbers_and_fields_are_refused(admin: httpx.AsyncClient) -> None:
    for method, path, body, status, param in WRONG:
        content = {} if body is None else {"json": body}
        error = refusal(await admin.request(method, path, **content), status)
        assert error["param"] == param, (method, path, body, error)
    assert await untouched(admin)


async def test_a_pin_and_a_roll_back_are_in_force_when_they_are_answered(
    admin: httpx.AsyncClient, engine: FakeEngine
) -> None:
    for version, depth in ((1, 3), (2, 8)):
        response = await admin.put(
            "/admin/adapters/tuned/boundary", json={"depth": depth, "reason": "I say so"}
        )
        told = response.json()
        assert (told["version"], told["depth"], told["action"]) == (version, depth, "pin")
        assert told["reason"] == "I say so"
        assert engine.calibrations["tuned"].depth == depth
    response = await admin.post("/admin/adapters/tuned/boundaries/1/activate")
    assert response.json()["action"] == "roll_back"
    assert engine.calibrations["tuned"].depth == 3
    response = await admin.post(
        "/admin/adapters/tuned/boundaries/2/activate", json={"reason": "after all"}
    )
    assert (response.json()["action"], response.json()["reason"]) == ("activate", "after all")
    assert engine.calibrations["tuned"].depth == 8
    history = (await admin.get("/admin/adapters/tuned/boundaries")).json()
    assert [kept["is_active"] for kept in history["boundaries"]] == [True, False]
    error = refusal(
        await admin.get(f"/admin/boundaries/{history['boundaries'][0]['id']}/curve.svg"), 404
    )
    assert error["code"] == "no_curve"
    entries = (await admin.get("/admin/audit?limit=2")).json()["entries"]
    assert len(entries) == 2
    older = (await admin.get(f"/admin/audit?before={entries[-1]['id']}")).json()["entries"]
    assert [entry["id"] for entry in older] == sorted(
        (entry["id"] for entry in older), reverse=True
    )
    assert older[0]["id"] < entries[-1]["id"]


async def test_adapters_come_and_go_and_leave_a_trace(
    admin: httpx.AsyncClient, engine: FakeEngine
) -> None:
    response = await admin.put("/admin/adapters/new", json={"path": "/adapters/new"})
    assert (response.status_code, response.json()["name"]) == (200, "new")
    response = await admin.put(
        "/admin/adapters/new", json={"path": "/adapters/newer", "replace": True}
    )
    assert response.json()["path"] == "/adapters/newer"
    response = await admin.delete("/admin/adapters/new")
    assert response.json() == {"name": "new", "num_running": 0}
    entries = (await admin.get("/admin/audit")).json()["entries"]
    assert [entry["action"] for entry in entries] == [
        "adapter.unload", "adapter.load", "adapter.load",
    ]  # fmt: skip
    assert entries[0]["details"] == {"path": "/adapters/newer", "digest": "sha256:new"}
    assert entries[0]["subject"] == "adapter:new"


async def test_what_was_tried_is_in_the_audit_log(admin: httpx.AsyncClient) -> None:
    for path, status in (("/adapters/missing", 404), ("/adapters/corrupt", 400)):
        response = await admin.put(
            "/admin/adapters/new", json={"path": path}, headers={"x-request-id": f"r{path}"}
        )
        assert response.status_code == status
    assert (await admin.delete("/admin/adapters/nobody")).status_code == 404
    body = {"lora_name": "tuned", "lora_path": "/adapters/x"}
    assert (await admin.post("/v1/load_lora_adapter", json=body)).status_code == 400
    assert (await admin.delete("/admin/jobs/nothing")).status_code == 404
    assert (await admin.delete("/admin/adapters/a%00da")).status_code == 404
    entries = (await admin.get("/admin/audit")).json()["entries"]
    told = [(e["action"], e["subject"], e["outcome"], e["details"]["error"]) for e in entries]
    assert told == [
        ("adapter.unload", "adapter:a\ufffdda", "refused", "adapter_not_found"),
        ("job.request_cancel", "job:nothing", "refused", "not_found"),
        ("adapter.load", "adapter:tuned", "refused", "adapter_exists"),
        ("adapter.unload", "adapter:nobody", "refused", "adapter_not_found"),
        ("adapter.load", "adapter:new", "refused", "adapter_refused"),
        ("adapter.load", "adapter:new", "refused", "not_found"),
    ]
    (entry,) = (await admin.get("/admin/audit?request_id=r/adapters/missing")).json()["entries"]
    assert entry == entries[-1]
    assert (await admin.get("/admin/audit?action=boundary.pin")).json() == {"entries": []}
    assert (await admin.get("/admin/audit?subject=x")).status_code == 400


@pytest.mark.parametrize("is_forced", [False, True])
async def test_unloading_waits_for_the_adapters_requests_unless_forced(
    admin: httpx.AsyncClient, engine: FakeEngine, is_forced: bool
) -> None:
    engine.hold_after = 1
    asking = asyncio.create_task(
        admin.post(
            "/v1/completions",
            json={"model": "tuned", "prompt": "hello", "max_tokens": 3},
            headers={"authorization": f"Bearer {API_KEY}"},
        )
    )
    await engine.held.wait()
    unloading = asyncio.create_task(
        admin.delete("/admin/adapters/tuned" + ("?force" if is_forced else ""))
    )
    async with asyncio.timeout(LIMIT_S):
        if is_forced:
            assert (await unloading).json() == {"name": "tuned", "num_running": 1}
        while any(adapter.name == "tuned" for adapter in engine.adapters()):
            await asyncio.sleep(0.001)
        if not is_forced:
            await asyncio.sleep(0.2)  # longer than it looks again
            assert not unloading.done()
        engine.released.set()
        assert (await asking).status_code == 200
        if not is_forced:
            assert (await unloading).json() == {"name": "tuned", "num_running": 0}


async def test_an_adapter_shows_what_it_is_and_how_much_it_is_asked(
    admin: httpx.AsyncClient, engine: FakeEngine
) -> None:
    async def views() -> dict[str, dict[str, Any]]:
        answer = (await admin.get("/admin/adapters")).json()
        assert answer["num_layers"] == NUM_LAYERS
        return {view["name"]: view for view in answer["adapters"]}

    before = (await views())["tuned"]
    assert before["modules"] == ["q_proj", "v_proj"]
    assert before["layers"] == list(range(before["effective_max_depth"]))
    assert before["layer_applications"] == {"applied": 55, "skipped": 66}
    assert (before["num_requests"], before["num_running"]) == (0, 0)

    body = {"model": "tuned", "prompt": ["one", "two"], "max_tokens": 3}
    headers = {"authorization": f"Bearer {API_KEY}"}
    engine.hold_after = 1
    asking = asyncio.create_task(admin.post("/v1/completions", json=body, headers=headers))
    await engine.held.wait()
    found = await views()
    assert (found["tuned"]["num_requests"], found["tuned"]["num_running"]) == (2, 2)
    assert (found["plain"]["num_requests"], found["plain"]["num_running"]) == (0, 0)
    assert found["plain"]["layer_applications"] == {"applied": 0, "skipped": 0}
    engine.released.set()
    assert (await asking).status_code == 200
    after = (await views())["tuned"]
    assert (after["num_requests"], after["num_running"]) == (2, 0)


async def test_while_the_store_is_gone_requests_go_on_and_the_rest_is_503(
    admin: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    await admin.put("/admin/adapters/tuned/boundary", json={"depth": 3, "reason": "before"})

    async def gone(*_: Any, **__: Any) -> Any:
        raise StoreError("database: connection refused")

    from boundary.store.store import Store

    for name in ("history", "jobs", "create_job", "activate", "active_since", "add_audit", "pin"):
        monkeypatch.setattr(Store, name, gone)
    for response in (
        await admin.get("/admin/adapters/tuned/boundaries"),
        await admin.get("/admin/jobs"),
        await recalibrate(admin),
        await admin.put("/admin/adapters/tuned/boundary", json={"depth": 4, "reason": "now"}),
    ):
        error = refusal(response, 503)
        assert error["code"] == "store_unavailable"
        assert "connection refused" in error["message"]
    answer = await admin.post(
        "/v1/completions",
        json={"model": "tuned", "prompt": "hello", "max_tokens": 3},
        headers={"authorization": f"Bearer {API_KEY}"},
    )
    assert answer.json()["lora"]["depth"] == 3
    assert (await admin.get("/admin/adapters")).status_code == 200
    assert (await admin.put("/admin/adapters/n", json={"path": "/a"})).status_code == 200


async def test_without_a_database_adapters_are_served_and_calibrations_refused(
    engine: FakeEngine, settings: Settings
) -> None:
    app = create_app(settings.model_copy(update={"database": None}), engine)
    async with httpx.AsyncClient(  # its lifespan did not run, so no store is open
        transport=httpx.ASGITransport(app),
        base_url="http://fathom",
        headers={"authorization": f"Bearer {ADMIN_KEY}"},
    ) as client:
        assert len((await client.get("/admin/adapters")).json()["adapters"]) == 2
        assert (await client.delete("/admin/adapters/plain")).status_code == 200
        for response in (await client.get("/admin/jobs"), await recalibrate(client)):
            assert "--database" in refusal(response, 503)["message"]


async def test_jobs_end_with_the_server(engine: FakeEngine, settings: Settings) -> None:
    engine.slices = work = Work(is_held=True)
    for expected in (None, "interrupted"):
        app = create_app(settings, engine)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(
                transport=httpx.ASGITransport(app),
                base_url="http://fathom",
                headers={"authorization": f"Bearer {ADMIN_KEY}"},
            ) as client,
        ):
            if expected is None:
                await recalibrate(client)
                await work.began.wait()
            else:
                (job,) = (await client.get("/admin/jobs")).json()["jobs"]
                assert (job["state"], job["error"]) == (expected, "its server was stopped")
    assert (work.num_running, work.num_cancelled) == (0, 1)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("sqlite:////nowhere/at/all/fathom.db", "does not exist"),
        ("mysql://root:hunter2@host/db", "no database is called"),
        ("nonsense", "cannot be read"),
    ],
)
async def test_a_database_that_cannot_be_opened_stops_the_start(
    engine: FakeEngine, settings: Settings, url: str, why: str
) -> None:
    from pydantic import SecretStr

    from server.errors import StoreUnavailable

    app = create_app(settings.model_copy(update={"database": SecretStr(url)}), engine)
    with pytest.raises(StoreUnavailable, match=why) as caught:
        async with app.router.lifespan_context(app):
            pass
    assert "hunter2" not in caught.value.message
