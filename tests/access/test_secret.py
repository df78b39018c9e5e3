"""A key's text and its hash: what matches, what is refused, and that every check is the same work."""

import re

import pytest

from server.access import secret


def test_a_key_matches_its_own_hash_and_no_other() -> None:
    text = secret.make_text(secret.make_id())
    hash, other = secret.hashed(text), secret.hashed(secret.make_text(secret.make_id()))
    assert secret.matches(text, hash)
    assert not secret.matches(text, other)
    assert not secret.matches(text + "x", hash)
    assert not secret.matches("", hash)
    assert not secret.matches(text, secret.DECOY)


def test_two_hashes_of_one_key_differ_and_show_nothing_of_it() -> None:
    text = secret.make_text(secret.make_id())
    first, second = secret.hashed(text), secret.hashed(text)
    assert first != second
    _, id, random = text.split("-", 2)
    assert id not in first
    assert random not in first


def test_an_id_is_read_from_a_key_and_from_nothing_else() -> None:
    id = secret.make_id()
    text = secret.make_text(id)
    assert secret.id_of(text) == id
    assert secret.is_id(id)
    assert re.fullmatch(r"fathom-[0-9a-f]{16}-[\w-]{43}", text)
    for wrong in ("", "none", id, text[:-1], text + "x", text.upper(), f" {text}", f"{text}\n"):
        assert secret.id_of(wrong) is None


def test_keys_differ() -> None:
    texts = {secret.make_text(secret.make_id()) for _ in range(1000)}
    assert len(texts) == 1000
    assert len({secret.id_of(text) for text in texts}) == 1000


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "plain-text",
        secret.DECOY[:-4],
        secret.DECOY + "x",
        secret.DECOY.replace("ln=14", "ln=4"),
        secret.DECOY.replace("$scrypt$", "$argon2$"),
        secret.DECOY.replace("r=8", "r=1"),
        secret.DECOY + "$" + "A" * 44,
        secret.DECOY[:21] + "!" + secret.DECOY[22:],
    ],
    ids=["empty", "plain", "cut", "longer", "cheap", "argon2", "r", "three parts", "no base64"],
)
def test_a_hash_that_costs_less_or_is_cut_is_no_hash(wrong: str) -> None:
    assert secret.is_hash(secret.DECOY)
    assert not secret.is_hash(wrong)
    with pytest.raises(ValueError, match="hash of a key"):
        secret.matches("text", wrong)


def test_a_match_compares_in_constant_time_once_and_hashes_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By construction: whatever the text is, one scrypt and one `compare_digest` of whole hashes."""
    text = secret.make_text(secret.make_id())
    hash = secret.hashed(text)
    done: list[tuple[str, int, int]] = []
    scrypt, compare = secret.hashlib.scrypt, secret.hmac.compare_digest

    def counted_scrypt(given: bytes, **how: int) -> bytes:
        done.append(("scrypt", how["n"], how["dklen"]))
        return scrypt(given, **how)  # type: ignore[arg-type]

    def counted_compare(a: bytes, b: bytes) -> bool:
        done.append(("compare", len(a), len(b)))
        return compare(a, b)

    monkeypatch.setattr(secret.hashlib, "scrypt", counted_scrypt)
    monkeypatch.setattr(secret.hmac, "compare_digest", counted_compare)
    for given in (
        text,
        text[:-1],
        "",
        "x" * 5000,
        "k\u00e9y",
        "\udcff",
        secret.make_text("0" * 16),
    ):
        for held in (hash, secret.DECOY):
            done.clear()
            secret.matches(given, held)
            assert done == [("scrypt", 1 << 14, 32), ("compare", 32, 32)]
