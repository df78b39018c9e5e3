"""A hub and an S3 store on loopback, and the real clients told of them as a process would be."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from huggingface_hub import constants
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from server.sources.cache import AdapterCache
from server.sources.fetcher import Fetcher
from tests.sources.hub_site import HubSite

MakeFetcher = Callable[..., Fetcher]

KEY_ID, SECRET = "the-key-id-of-a-test", "the-secret-of-a-test"
BUCKET = "adapters"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubSite]:
    """What HF_ENDPOINT and HF_HOME set where the client is imported, set afterwards."""
    with HubSite().served() as site:
        monkeypatch.setattr(constants, "ENDPOINT", site.url)
        template = site.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield site


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def aws_variables(url: str) -> dict[str, str]:
    """What a process is told of a store."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


@pytest.fixture
def new_instance() -> Iterator[None]:
    """s3fs keeps what it made, with its credentials: this test makes one of its own."""
    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def s3(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of an empty bucket, for the test's own hands."""
    for key, value in aws_variables(s3_url).items():
        monkeypatch.setenv(key, value)

    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    yield client
    for entry in client.list_objects_v2(Bucket=BUCKET).get("Contents", ()):
        client.delete_object(Bucket=BUCKET, Key=entry["Key"])
    client.delete_bucket(Bucket=BUCKET)
    client.close()


def upload(s3: Any, folder: Path, prefix: str) -> None:
    """Every file of a folder, at `s3://BUCKET/prefix`."""
    for path in folder.iterdir():
        s3.put_object(Bucket=BUCKET, Key=f"{prefix}/{path.name}", Body=path.read_bytes())


@pytest.fixture
def make_fetcher(tmp_path: Path) -> MakeFetcher:
    """A fetcher with a cache below `tmp_path / "cache"`."""

    def make(*, max_bytes: int = 1 << 30, max_weights_bytes: int = 1 << 30, **more: Any) -> Fetcher:
        cache = AdapterCache(tmp_path / "cache", max_bytes)
        given = {"timeout_s": 30.0} | more
        return Fetcher(cache=cache, max_weights_bytes=max_weights_bytes, **given)

    return make
