"""`GET /` and the files below `/console/`: what a browser gets, and what it is told about it.

Knows nothing of engine, keys or routes: the page is the same for everybody, and all that it shows it
asks for like any other client. It may run its own files only, and talk to its own server only.
"""

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import Response

from server.console.assets import Asset, load_assets

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",  # neither inline nor eval
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
PAGE_HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    # Asked for again each time, and answered 304: it is what names the version of all the rest.
    "cache-control": "no-cache",
}
FILE_HEADERS = {
    "content-security-policy": POLICY,
    "cache-control": "public, max-age=31536000, immutable",
}
METHODS = ["GET", "HEAD"]


def console_router() -> APIRouter:
    """Routes that need no key."""
    router = APIRouter(include_in_schema=False)
    assets = load_assets()

    @router.api_route("/", methods=METHODS)
    async def page(http: Request) -> Response:
        """The console."""
        return _answer(http, assets.page, PAGE_HEADERS)

    @router.api_route("/console/{digest}/{name:path}", methods=METHODS)
    async def file(http: Request, digest: str, name: str) -> Response:
        """A file of the page, by the digest of the version that it belongs to."""
        found = assets.files.get(name) if digest == assets.digest else None
        if found is None:
            raise HTTPException(404)
        return _answer(http, found, FILE_HEADERS)

    return router


def _answer(http: Request, asset: Asset, headers: dict[str, str]) -> Response:
    """The asset, compressed where the client takes that, or 304 where it has it already."""
    is_gzip = "gzip" in http.headers.get("accept-encoding", "")
    etag = asset.etag.removesuffix('"') + '-gz"' if is_gzip else asset.etag
    headers = headers | {"etag": etag, "vary": "accept-encoding"}
    known = (tag.strip() for tag in http.headers.get("if-none-match", "").split(","))
    if etag in (tag.removeprefix("W/") for tag in known):
        return Response(status_code=304, headers=headers)
    if is_gzip:
        headers["content-encoding"] = "gzip"
    content = asset.compressed if is_gzip else asset.content
    return Response(content, headers=headers, media_type=asset.media_type)
