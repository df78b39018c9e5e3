"""The page over HTTP: types, policy, caches, and a server that serves none."""

import gzip

import httpx
import pytest

from server.config import Settings
from server.console.assets import load_assets
from tests.api.conftest import API_KEY, MakeClient
from tests.api.conftest import make_client as make_client
from tests.api.fake_engine import FakeEngine
from tests.api.tokenizers import byte_tokenizer

pytestmark = pytest.mark.anyio


@pytest.fixture
def client(make_client: MakeClient) -> httpx.AsyncClient:
    return make_client(FakeEngine(byte_tokenizer()), Settings(api_key=API_KEY))


def directives(response: httpx.Response) -> dict[str, list[str]]:
    parts = response.headers["content-security-policy"].split("; ")
    return {name: values for name, *values in (part.split() for part in parts)}


async def test_the_page_needs_no_key_and_may_run_its_own_files_only(
    client: httpx.AsyncClient,
) -> None:
    page = await client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert directives(page) == {
        "default-src": ["'none'"],
        "script-src": ["'self'"],
        "style-src": ["'self'"],
        "img-src": ["'self'"],
        "connect-src": ["'self'"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "frame-ancestors": ["'none'"],
        "require-trusted-types-for": ["'script'"],
        "trusted-types": ["'none'"],
    }
    assert page.headers["cross-origin-opener-policy"] == "same-origin"
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"


async def test_the_page_is_asked_for_again_and_its_files_are_kept(
    client: httpx.AsyncClient,
) -> None:
    page = await client.get("/")
    assert page.headers["cache-control"] == "no-cache"
    known = {"if-none-match": page.headers["etag"]}
    again = await client.get("/", headers=known)
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == page.headers["etag"]
    assert (await client.get("/", headers={"if-none-match": '"else"'})).status_code == 200
    # The compressed page is another representation, whose tag is not this one's.
    plain = await client.get("/", headers=known | {"accept-encoding": "identity"})
    assert plain.status_code == 200

    digest = load_assets().digest
    for name, media_type in {
        "main.js": "text/javascript; charset=utf-8",
        "vendor/preact.mjs": "text/javascript; charset=utf-8",
        "style.css": "text/css; charset=utf-8",
        "icon.svg": "image/svg+xml",
    }.items():
        file = await client.get(f"/console/{digest}/{name}")
        assert file.status_code == 200
        assert file.headers["content-type"] == media_type
        assert file.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert "default-src 'none'" in file.headers["content-security-policy"]


async def test_files_are_compressed_where_the_client_takes_that(client: httpx.AsyncClient) -> None:
    assets = load_assets()
    url = f"/console/{assets.digest}/style.css"
    plain = await client.get(url, headers={"accept-encoding": "identity"})
    packed = await client.get(url, headers={"accept-encoding": "gzip"})
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.content == plain.content, "httpx unpacks it"
    assert int(packed.headers["content-length"]) < int(plain.headers["content-length"]) / 2
    assert plain.headers["vary"] == packed.headers["vary"] == "accept-encoding"
    assert gzip.decompress(assets.files["style.css"].compressed) == plain.content


async def test_heads_are_answered_without_a_body(client: httpx.AsyncClient) -> None:
    for url in ("/", f"/console/{load_assets().digest}/main.js"):
        head, get = await client.head(url), await client.get(url)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == get.headers["content-length"]


@pytest.mark.parametrize(
    "name", ["gone.js", "../router.py", "%2e%2e/router.py", "index.html", "", "vendor"]
)
async def test_only_the_files_of_the_page_are_served(client: httpx.AsyncClient, name: str) -> None:
    answer = await client.get(f"/console/{load_assets().digest}/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_files_of_another_version_are_not_mixed_in(client: httpx.AsyncClient) -> None:
    assert (await client.get("/console/0000000000000000/main.js")).status_code == 404


async def test_a_server_may_have_no_page(make_client: MakeClient) -> None:
    client = make_client(FakeEngine(byte_tokenizer()), Settings(console=False))
    for url in ("/", f"/console/{load_assets().digest}/main.js"):
        assert (await client.get(url)).status_code == 404


async def test_the_page_is_no_part_of_the_api(client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert not [path for path in paths if path == "/" or path.startswith("/console")]
