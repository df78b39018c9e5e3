"""`make test-helm`: what the chart renders, run as root by podman in the image of `make test-docker`.

Podman has the kubelet's place: the pod's user, its root that is read only, no capabilities, volumes whose
group is the pod's, a keys file behind links that are exchanged, and its grace period. There is no cluster:
the Service, policies and whatever an API server does are not here.
"""

import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from server.access import key_file
from server.access.key import Grant, NewKey
from tests.deploy.chart import manifests as look
from tests.deploy.chart.container import filled, probes, variables
from tests.deploy.chart.helm_process import Helm
from tests.deploy.chart.settings_schema import CHART
from tests.deploy.chart.values import at, merged

WORK = CHART.parents[2] / "build" / "docker"
START_S = 120
ADMIN_KEY = "an-operator's"
MODEL = {"model": "restaurant", "prompt": "name: Nando", "max_tokens": 400, "ignore_eos": True}
VALUES = merged(
    at("settings", {"port": 8000, "drain_timeout_s": 120}),
    at("secrets.adminKey.value", ADMIN_KEY),
    at("secrets.keysFile.value", '{"keys": []}'),
    {"persistence": {name: {"enabled": True} for name in ("state", "adapters", "data")}},
)


class Failed(Exception):
    """What was seen, where something else should be."""


def require(is_so: bool, words: object) -> None:
    """Raises Failed with the words."""
    if not is_so:
        raise Failed(str(words))


def podman(*words: str, check: bool = True) -> str:
    """Run it on the storage of `make test-docker`; returns what it printed, both streams."""
    command = ["podman", "--root", str(WORK / "storage"), "--runroot", str(WORK / "run"), *words]
    environ = os.environ | {"CONTAINERS_CONF": str(WORK / "containers.conf")}
    done = subprocess.run(
        command,
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    require(done.returncode == 0 or not check, f"{' '.join(words[:3])}: {done.stdout}")
    return done.stdout.strip()


def started(made: list[look.Manifest], root: Path, name: str) -> list[str]:
    """The words after `podman`: every part of the pod that a container can have."""
    pod, spec = look.pod_of(made)["spec"], look.container_of(made)
    user, security = pod["securityContext"], spec["securityContext"]
    require(security["capabilities"]["drop"] == ["ALL"], security)
    require(
        security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"], security
    )
    places = filled(made, root)
    words = ["run", "--detach", "--name", name, "--publish", "127.0.0.1::8000"]
    words += ["--read-only", "--read-only-tmpfs=false", "--cap-drop", "all"]
    words += ["--security-opt", "no-new-privileges", "--group-add", str(user["fsGroup"])]
    words += ["--user", f"{user['runAsUser']}:{user['runAsGroup']}"]
    for key, value in variables(made).items():
        words += ["--env", f"{key}={value}"]
    for mount in spec["volumeMounts"]:
        place = places[mount["mountPath"]]
        os.chown(place, 0, user["fsGroup"])
        place.chmod(0o2775)
        is_read_only = ":ro" if mount.get("readOnly") else ""
        words += ["--volume", f"{place}:{mount['mountPath']}{is_read_only}"]
    link_keys(places["/etc/fathom-keys"], user["fsGroup"])
    return [*words, spec["image"], *spec["args"]]


def link_keys(place: Path, group: int) -> None:
    """Lay the keys file as a kubelet does: a link into a directory that another link names."""
    data = place / f"..{time.monotonic_ns()}"
    data.mkdir(mode=0o755)
    file = place / "keys.json"
    os.replace(file.resolve(), data / "keys.json")
    (data / "keys.json").chmod(0o440)
    os.chown(data / "keys.json", 0, group)
    new = place / "..data_tmp"
    new.symlink_to(data.name)
    new.rename(place / "..data")
    if not file.is_symlink():
        file.symlink_to("..data/keys.json")


def asked(
    port: int, path: str, key: str = "", body: dict[str, Any] | None = None
) -> tuple[int, str]:
    """Status and body; 0 where nobody listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_S)
    try:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        connection.request(
            "GET" if body is None else "POST", path, json.dumps(body) if body else None, headers
        )
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except OSError:
        return 0, ""
    finally:
        connection.close()


def wait_for(port: int, path: str, status: int, key: str = "", within_s: float = START_S) -> None:
    """Raises Failed where it does not come."""
    give_up = time.monotonic() + within_s
    while (seen := asked(port, path, key))[0] != status:
        require(time.monotonic() < give_up, f"{path}: {seen} and not {status} within {within_s} s")
        time.sleep(0.1)


@contextmanager
def running(made: list[look.Manifest], name: str) -> Iterator[tuple[int, Path]]:
    """Its port on this machine, and where its volumes are."""
    root = Path(tempfile.mkdtemp(prefix=name))
    try:
        podman(*started(made, root, name))
        yield int(podman("port", name, "8000").rpartition(":")[2]), root
    except Failed:
        sys.stderr.write(podman("logs", "--tail", "30", name, check=False) + "\n")
        raise
    finally:
        podman("rm", "--force", "--volumes", name, check=False)
        shutil.rmtree(root)


def answers(made: list[look.Manifest], port: int, root: Path, name: str) -> str:
    """Probes, confinement, keys; returns a client's key."""
    paths = probes(made)
    wait_for(port, paths["startup"], 200)
    for kind in ("readiness", "liveness"):
        require(asked(port, paths[kind])[0] == 200, paths[kind])
    status = podman("exec", name, "cat", "/proc/1/status").splitlines()
    said = {name: value.split() for name, _, value in (line.partition(":") for line in status)}
    require(set(said["Uid"] + said["Gid"]) == {"10001"}, said["Uid"])
    require(int(said["CapEff"][0], 16) == int(said["CapBnd"][0], 16) == 0, said["CapEff"])
    require(said["NoNewPrivs"] == ["1"], said["NoNewPrivs"])
    mounts = [line.split() for line in podman("exec", name, "cat", "/proc/1/mounts").splitlines()]
    root_is = [options.split(",") for _, place, _, options, *_ in mounts if place == "/"]
    require("ro" in root_is[-1], root_is)
    for place in ("/", "/opt/fathom", "/etc/fathom", "/etc/fathom-keys", "/adapters", "/data"):
        written = podman("exec", name, "sh", "-c", f"touch {place}/x && echo written", check=False)
        require("written" not in written.splitlines(), f"{place} can be written")
    podman("exec", name, "sh", "-c", "touch /state/x /tmp/x && rm /state/x /tmp/x")
    require((root / "state" / "fathom" / "fathom.db").is_file(), "no database in the volume")
    require(asked(port, "/v1/models")[0] == 401, "no key is asked for")
    require(asked(port, "/admin/adapters", ADMIN_KEY)[0] == 200, "the admin key is not taken")
    keys = root / "etc" / "fathom-keys"
    copy = root / "keys.json"
    shutil.copyfile(keys / "keys.json", copy)
    _, key = key_file.add(copy, NewKey(name="ada", scope="api", grant=Grant()))
    require(asked(port, "/v1/models", key)[0] == 401, "a key that nobody made is taken")
    os.replace(copy, (keys / "keys.json").resolve())
    link_keys(keys, 10001)
    wait_for(port, "/v1/models", 200, key)
    return key


def tested(made: list[look.Manifest], name: str) -> None:
    """Run the pod of `helm test` in the network of the server, whose Service's name is the server's."""
    (pod,) = [each for each in made if look.is_test(each)]
    (spec,) = pod["spec"]["containers"]
    words = ("run", "--rm", "--network", f"container:{name}", "--entrypoint", spec["command"][0])
    command = [*spec["command"][1:], spec["args"][0], "127.0.0.1", spec["args"][2]]
    require("200" in podman(*words, spec["image"], *command), "helm test")
    wrong = [*command[:-1], "1"]
    require(
        "200" not in podman(*words, spec["image"], *wrong, check=False), "helm test passes always"
    )


def drains(made: list[look.Manifest], port: int, key: str, name: str) -> float:
    """End it as a kubelet does, a stream being open; returns the seconds it took after the hook."""
    pod, spec = look.pod_of(made)["spec"], look.container_of(made)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_S)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(MODEL | {"stream": True}), headers)
    stream = connection.getresponse()
    first = stream.readline()
    require(first.startswith(b"data: "), first)
    podman("kill", "--signal", "TERM", name)
    began = time.monotonic()
    wait_for(port, probes(made)["readiness"], 503)
    require(
        asked(port, probes(made)["liveness"])[0] == 200, "it is said to be dead while it drains"
    )
    rest = stream.read()
    require(rest.rstrip().endswith(b"data: [DONE]"), rest[-300:])
    require(b'"finish_reason":"length"' in rest.replace(b" ", b""), rest[-300:])
    code = podman("wait", name)
    took_s = time.monotonic() - began
    require(code.splitlines()[-1] == "0", f"status {code}")
    hook_s = int(spec["lifecycle"]["preStop"]["exec"]["command"][1])
    require(took_s < pod["terminationGracePeriodSeconds"] - hook_s, f"{took_s} s")
    return took_s


def main() -> None:
    """Raises Failed."""
    require(os.geteuid() == 0, "podman needs root here")
    images = podman("images", "--format", "{{.Repository}}:{{.Tag}}", check=False)
    require("/fathom:cpu" in images, "no image fathom:cpu: make test-docker builds it")
    name = f"fathom-helm-{os.getpid()}"
    with Helm(CHART) as helm:
        made = helm.manifests(VALUES)
    with running(made, name) as (port, root):
        key = answers(made, port, root, name)
        tested(made, name)
        hook = look.container_of(made)["lifecycle"]["preStop"]["exec"]["command"]
        podman("exec", name, *hook)
        took_s = drains(made, port, key, name)
    sys.stdout.write(
        f"the chart's container: probes, confinement, keys and helm test; drained in {took_s:.1f} s\n"
    )


if __name__ == "__main__":
    main()
