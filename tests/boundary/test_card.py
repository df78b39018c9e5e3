"""The model card's section: what it says of a record, and that the rest of the file is left alone."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from boundary.record import BoundaryRecord
from boundary.report.card import BEGIN, END, CardError, card_section, update_card
from tests.boundary.test_record import ADAPTER, BASE, DATA, NUM_LAYERS, pinned, selected

FRONT = "---\nlicense: mit\ntags:\n- lora\n---\n# Mine\n\ntext\n"


@pytest.mark.parametrize("before", ["", "# Mine", FRONT, FRONT.replace("\n", "\r\n")])
def test_a_section_is_put_at_the_end_and_renewed_where_it_stands(
    before: str, tmp_path: Path
) -> None:
    card = tmp_path / "README.md"
    if before:
        card.write_bytes(before.encode())
    record = selected()
    assert update_card(record, tmp_path) == card
    first = card.read_bytes()
    assert first.decode().startswith(before)
    update_card(record, tmp_path)
    assert card.read_bytes() == first
    ends = b"\r\n" if "\r\n" in before else b"\n"
    assert first.count(b"\n") == first.count(ends)
    after = ends + b"## After" + ends
    card.write_bytes(first + after)
    update_card(pinned(), tmp_path)
    renewed = card.read_bytes()
    assert renewed.startswith(before.encode())
    assert renewed.endswith(END.encode() + ends + after)
    assert b"by hand" in renewed
    assert b"Every depth" not in renewed
    update_card(record, tmp_path)
    assert card.read_bytes() == first + after


def test_the_hub_reads_the_card_as_before(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(FRONT)
    update_card(selected(), tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {"license": "mit", "tags": ["lora"]}
    assert BEGIN in card.text


def test_it_says_what_was_found_and_what_that_rests_on() -> None:
    record = selected()
    assert record.curve is not None
    text = card_section(record)
    assert f"**Calibrated depth: 2 of {NUM_LAYERS} layers.**" in text
    assert "scores higher than with all of it: +" in text
    assert "boundary.lora_depth(model, 2)" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert sum(line.startswith("| **2** |") for line in rows) == 1
    for depth, point in enumerate(record.curve):
        cell = f"**{depth}**" if depth == record.depth else str(depth)
        assert f"| {cell} | {point.score:.4f} | " in text
    for fact in (BASE, ADAPTER, DATA, "60 samples", record.created_at.isoformat()[:19]):
        assert fact in text


def test_each_verdict_has_its_words() -> None:
    cheaper = selected().model_copy(update={"verdict": "equal_cheaper"})
    assert "loses less than the tolerance of 0.2500" in card_section(cheaper)
    kept = card_section(selected(best=NUM_LAYERS))
    assert f"**Use the whole adapter (depth {NUM_LAYERS} of {NUM_LAYERS}).**" in kept


def test_a_strangers_reason_is_only_quoted(tmp_path: Path) -> None:
    reason = f"`a` | {END}\n{END}\n# b"
    record = BoundaryRecord.pinned(1, NUM_LAYERS, reason, base=BASE, adapter=ADAPTER)
    assert "\n# b" not in card_section(record)
    first = update_card(record, tmp_path).read_bytes()
    assert update_card(record, tmp_path).read_bytes() == first


@pytest.mark.parametrize(
    "content", [BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}\n{END}\n{BEGIN}\n{END}"]
)
def test_a_card_with_no_one_place_for_the_section_is_left_alone(
    content: str, tmp_path: Path
) -> None:
    card = tmp_path / "README.md"
    card.write_text(content)
    with pytest.raises(CardError, match="one of each"):
        update_card(selected(), tmp_path)
    assert card.read_text() == content
    assert list(tmp_path.iterdir()) == [card]


def test_a_card_that_is_no_text_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"# \xff")
    with pytest.raises(CardError, match="no UTF-8: byte 2"):
        update_card(selected(), tmp_path)
    assert (tmp_path / "README.md").read_bytes() == b"# \xff"
