"""Names of places: one spelling each, and nothing in them that leads elsewhere."""

from pathlib import Path

import pytest

from server.sources.location import (
    LocationError,
    RemoteAdapter,
    allowed,
    checked_prefix,
    checked_scheme,
    parse,
)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("adapters/x", Path("adapters/x")),
        ("/adapters/x", Path("/adapters/x")),
        ("C:/x", Path("C:/x")),
        ("hf://org/name", RemoteAdapter("hf", "org/name")),
        ("hf://org/name/", RemoteAdapter("hf", "org/name")),
        ("hf://org/na.me_1@v1.0", RemoteAdapter("hf", "org/na.me_1", revision="v1.0")),
        ("hf://org/name/a/b", RemoteAdapter("hf", "org/name", "a/b")),
        ("hf://org/name@main/a", RemoteAdapter("hf", "org/name", "a", "main")),
        ("hf://org/name@refs%2Fpr%2F1", RemoteAdapter("hf", "org/name", revision="refs/pr/1")),
        ("s3://bucket", RemoteAdapter("s3", "bucket")),
        ("s3://bucket/a b/c=1/", RemoteAdapter("s3", "bucket", "a b/c=1")),
        ("gs://bucket/a@b", RemoteAdapter("gs", "bucket", "a@b")),
    ],
)
def test_a_place_has_one_spelling(text: str, place: Path | RemoteAdapter) -> None:
    found = parse(text)
    assert found == place
    if isinstance(found, RemoteAdapter):
        assert parse(str(found)) == found


@pytest.mark.parametrize(
    "text",
    [
        "hf://",
        "hf://name",
        "hf://org//name",
        "hf://org/name@",
        "hf://org/name@a..b",
        "hf://org/name@..%2Fmain",
        "hf://org/name@-x",
        "hf://org/name@a%2F%2Fb",
        "hf://org/..",
        "hf://../name",
        "hf://org/name/../other",
        "hf://org/name/./x",
        "hf://org/name//x",
        "hf://org/name/a%2e%2e",
        "hf://org/name/a\\b",
        "hf://org/na--me",
        "hf://or g/name",
        "hf://user:secret@org/name",
        "hf://org/name/a\nb",
        "hf://org/name/" + "x" * 3000,
        "s3://",
        "s3:///x",
        "s3://bucket/../x",
        "s3://bucket/a/../../x",
        "s3://bucket/a?versionId=1",
        "s3://bucket/*",
        "s3://bucket/a#b",
        "s3://key:secret@bucket/x",
        "simplecache::s3://bucket/x",
        "s3://bucket/x::zip",
        "file:///etc",
        "local://etc",
        "S3://bucket/x",
        "HF://org/name",
    ],
)
def test_what_names_no_place_is_refused(text: str) -> None:
    with pytest.raises(LocationError) as refusal:
        parse(text)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("prefix", "inside", "outside"),
    [
        ("hf://org", ("hf://org/a", "hf://org/a@x/b"), ("hf://organ/a", "hf://or/g", "s3://org/a")),
        (
            "hf://org/a",
            ("hf://org/a", "hf://org/a@v1", "hf://org/a/b"),
            ("hf://org/ab", "hf://org/b"),
        ),
        ("hf://org/a@v1", ("hf://org/a@v1", "hf://org/a@v1/b"), ("hf://org/a", "hf://org/a@v12")),
        ("hf://org/a@x%2Fy", ("hf://org/a@x%2Fy",), ("hf://org/a@x", "hf://org/a/y")),
        ("hf://org/a/b", ("hf://org/a/b", "hf://org/a@v/b/c"), ("hf://org/a", "hf://org/a/bc")),
        ("s3://b", ("s3://b", "s3://b/x/y"), ("s3://bb/x", "hf://b/x", "gs://b/x")),
        ("s3://b/x/", ("s3://b/x", "s3://b/x/y"), ("s3://b", "s3://b/xy", "s3://b/y/x")),
    ],
)
def test_a_prefix_covers_whole_parts(
    prefix: str, inside: tuple[str, ...], outside: tuple[str, ...]
) -> None:
    prefixes = [checked_prefix(prefix)]
    for text in (*inside, *outside):
        place = parse(text)
        assert isinstance(place, RemoteAdapter)
        assert allowed(place, prefixes) == (text in inside), text
        assert not allowed(place, ())


@pytest.mark.parametrize("prefix", ["hf://", "s3://", "org", "/adapters", "hf://a b", "s3://b/.."])
def test_a_prefix_is_never_everything(prefix: str) -> None:
    with pytest.raises(LocationError):
        checked_prefix(prefix)


def test_schemes_are_added_beside_those_that_are_built_in() -> None:
    assert checked_scheme("gs") == "gs"
    for scheme in ("hf", "s3", "file", "local"):
        with pytest.raises(LocationError):
            checked_scheme(scheme)


@pytest.mark.parametrize(
    ("text", "name"),
    [("hf://org/name@v1", "name"), ("hf://org/name/sub/x", "x"), ("s3://bucket/a/b", "b")],
)
def test_an_adapter_is_called_by_its_last_part(text: str, name: str) -> None:
    place = parse(text)
    assert isinstance(place, RemoteAdapter)
    assert place.name == name
