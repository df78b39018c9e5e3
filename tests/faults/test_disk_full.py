"""A disk that is full, under the store and under a report: what is told, what goes on, what is left."""

import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from boundary import whole_file
from tests.conftest import Run
from tests.faults import disks, stored
from tests.faults.clients import Clients
from tests.faults.disks import Disk, Limited
from tests.live.operator import NAME, Operator
from tests.live.process import ADMIN_KEY, LiveServer, Site, make_site, metric, serve
from tests.soak.served import read_metrics

NUM_CLIENTS = 2
PAUSE_S = 0.05
"""Time passes while a store goes and comes; nobody need be busy meanwhile."""
MAX_LOOKS = 1200
LOOK_S = 0.1


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """One that can be full: mounted where that is allowed, else by the size of files."""
    path = tmp_path / "disk"
    path.mkdir()
    if not disks.can_mount(path):
        yield Limited(path)
        return
    with disks.mounted(path) as mounted:
        yield mounted


def test_a_full_disk_under_the_store_stops_no_request(
    site: Site, disk: Disk, tmp_path: Path
) -> None:
    what_a_full_disk_does(site, disk, tmp_path)


@pytest.mark.slow
def test_files_that_may_not_grow_under_the_store_stop_no_request(
    site: Site, tmp_path: Path
) -> None:
    """The other way to fill a disk, also where one can be mounted."""
    path = tmp_path / "limited"
    path.mkdir()
    what_a_full_disk_does(site, Limited(path), tmp_path)


def what_a_full_disk_does(site: Site, disk: Disk, tmp_path: Path) -> None:
    url = f"sqlite:///{disk.path / 'fathom.db'}"
    words = ["--admin-key", ADMIN_KEY, "--database", url]
    with serve(site, tmp_path / "log", *words) as server, Operator(server) as operator:
        made = operator.admin.post("/admin/keys", json={"name": "ada"}).json()
        operator.http.headers["authorization"] = f"Bearer {made['key']}"
        pinned = operator.pin(2)
        with Clients(server.url, made["key"], NUM_CLIENTS, "disk", PAUSE_S) as clients:
            clients.until_answered(10)
            disk.fill(server.process.pid)
            until_usage(operator.admin, 0)
            clients.until_answered(10)
            the_full_disk_is_told(operator, server)
            clients.until_answered(10)
            disk.free(server.process.pid)
            until_usage(operator.admin, 1)
            clients.until_answered(10)
        assert (clients.seen.problems, clients.seen.num_in_flight) == ([], 0)
        rows = operator.admin.get("/admin/usage", params={"bucket": "all"}).json()["usage"]
        counted = {(row["adapter"], row["depth"]): row["requests"] for row in rows}
        assert counted == {model: len(each) for model, each in clients.seen.answered.items()}
        assert operator.pin(3)["version"] == pinned["version"] + 1
        assert "Traceback" not in server.stderr, server.stderr
        assert "disk is full" in server.stderr or "disk I/O error" in server.stderr
    left = asyncio.run(stored.read(url, made["id"]))
    rules = (stored.history_is_whole, stored.jobs_are_whole, stored.usage_is_whole)
    assert [finding for rule in rules for finding in rule(left)] == []
    assert [each.depth for each in left.boundaries] == [2, 3]


def until_usage(http: httpx.Client, value: float) -> None:
    """Wait until the metrics say that usage is written, or is not."""
    for _ in range(MAX_LOOKS):
        up = read_metrics(http.get("/metrics").text)["fathom_store_up"]
        if [number for labels, number in up if labels["work"] == "usage"] == [value]:
            return
        time.sleep(LOOK_S)
    pytest.fail(f"the metrics say {up}")


def the_full_disk_is_told(operator: Operator, server: LiveServer) -> None:
    """What writes is a 503 in words; what reads goes on."""
    admin = operator.admin
    sample = [{"prompt": "a", "completion": "b"}] * 40
    for answer in (
        admin.put(f"/admin/adapters/{NAME}/boundary", json={"depth": 1, "reason": "x"}),
        admin.post("/admin/keys", json={"name": "new" * 20}),
        operator.recalibrate(dataset={"samples": sample}),
    ):
        assert answer.status_code == 503, answer.text
        message = answer.json()["error"]["message"]
        assert "disk is full" in message or "disk I/O error" in message
    assert operator.history()["boundaries"][0]["version"] == 1
    assert admin.get("/ready").status_code == 200
    assert metric(admin, "fathom_usage_unwritten_requests") > 0
    assert admin.get("/admin/jobs").json() == {"jobs": []}


def test_a_report_on_a_full_disk_is_the_old_one_and_an_error_in_words(
    site: Site, disk: Disk, tmp_path: Path, fathom: Run
) -> None:
    report = disk.path / "report"
    data = tmp_path / "samples.jsonl"
    lines = [{"prompt": f"{number} tells", "completion": " it all"} for number in range(40)]
    data.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    words = ["calibrate", str(site.model), str(site.adapters["plain"]), "--data", str(data)]
    words += ["--device", "cpu", "--dtype", "float32", "--report", str(report)]
    status, _, err = fathom(*words)
    assert status == 0, err
    old = {path.name: path.read_bytes() for path in report.iterdir()}
    assert old.keys() == {"report.md", "report.json", "curve.svg"}

    disk.fill(os.getpid())
    try:
        status, out, err = fathom(*words, "--max-samples", "33")
    finally:
        disk.free(os.getpid())
    assert status == 1, (out, err)
    assert "plain" in out, "what was found is shown all the same"
    assert "reports are in" not in out
    assert "No space left on device" in err or "File too large" in err
    assert str(report) in err
    assert "Traceback" not in err
    assert {path.name: path.read_bytes() for path in report.iterdir()} == old

    status, _, err = fathom(*words, "--max-samples", "33")
    assert status == 0, err
    new = {path.name: path.read_bytes() for path in report.iterdir()}
    assert new.keys() == old.keys()
    assert new["report.json"] != old["report.json"]


def test_files_written_in_their_places_would_be_found_half_written(
    disk: Disk,
) -> None:
    """The control: on the same disk, the plain way to write leaves half a file; ours the old one."""
    path = disk.path / "report.json"
    path.write_bytes(b"old")
    new = bytes(1 << 23)  # more than the disk has
    if isinstance(disk, Limited):
        (disk.path / "largest").write_bytes(bytes(1 << 16))
        disk.fill(os.getpid())
    try:
        with pytest.raises(OSError, match=r"No space left|File too large"):
            whole_file.write({path: new})
        assert (path.read_bytes(), len(list(disk.path.glob(".*")))) == (b"old", 0)
        with pytest.raises(OSError, match=r"No space left|File too large"):
            path.write_bytes(new)
    finally:
        if isinstance(disk, Limited):
            disk.free(os.getpid())
    assert path.read_bytes() not in (b"old", new)
