"""Compare: depths that stream side by side, where they part, what tokens were likely, and how it ends."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
from playwright.sync_api import Page, Request, Route, expect

from server import demo
from tests.browser.conftest import Visit
from tests.browser.served import Site, make_site, serve
from tests.browser.watch import Watch

PROMPT = "Plain: The old dog is in the park.\nPirate:"


def compare(page: Page, adapter: str = "pirate") -> None:
    page.get_by_role("combobox", name="Adapter").select_option(adapter)
    page.get_by_role("button", name="Run").click()


def finished(page: Page, num_lanes: int) -> None:
    """Every lane says how it ended."""
    ends = page.locator(".lane .how dd").filter(has_text="ended by itself")
    cut = page.locator(".lane .how dd").filter(has_text="reached max tokens")
    expect(ends.or_(cut)).to_have_count(num_lanes)


@contextmanager
def busy(site: Site) -> Iterator[None]:
    """Others who ask for much, so that an answer takes seconds and something can happen meanwhile."""
    body = {
        "model": "restaurant", "prompt": "Restaurant:", "max_tokens": 490, "ignore_eos": True,
        "n": 16, "stream": True, "logprobs": 5,
    }  # fmt: skip
    with ExitStack() as streams:
        for _ in range(2):
            stream = httpx.stream("POST", f"{site.url}/v1/completions", json=body, timeout=60)
            assert streams.enter_context(stream).status_code == 200
        yield


def ask_for_much(page: Page) -> None:
    """An answer that goes on until its tokens are used up: nonsense ends by itself less than sense."""
    for label, value in {"Max tokens": "450", "Temperature": "4", "Seed": "1"}.items():
        page.get_by_label(label).fill(value)


def answer(page: Page, lane: int) -> str:
    return page.locator(".lane").nth(lane).locator(".text > p.sr").inner_text()


def completions(site: Site, page: Page, depth: int) -> dict[str, object]:
    body = {
        "model": "pirate", "prompt": PROMPT, "max_tokens": 48, "temperature": 0, "seed": 0,
        "lora_depth": depth, "logprobs": 5,
    }  # fmt: skip
    response = page.request.post(f"{site.url}/v1/completions", data=body)
    choice: dict[str, object] = response.json()["choices"][0]
    return choice


DASH = "\N{EN DASH}"


def minus(value: float) -> str:
    """As the page writes numbers."""
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def test_three_depths_stream_and_say_what_the_server_says(visit: Visit, site: Site) -> None:
    page = visit("compare")
    compare(page)
    finished(page, 3)
    lanes = page.locator(".lane h2")
    assert [text.split() for text in lanes.all_inner_texts()] == [
        ["Base", "0", "of", "12"],
        ["Depth", "6", "of", "12"],
        ["Full", "12", "of", "12"],
    ]
    said = [completions(site, page, depth) for depth in (0, 6, 12)]
    for lane, choice in enumerate(said):
        assert answer(page, lane).split() == str(choice["text"]).split()
    tokens = [choice["logprobs"]["tokens"] for choice in said]  # type: ignore[index]
    for lane, own in enumerate(tokens):
        pairs = enumerate(zip(own, tokens[2], strict=False))
        first = next((index for index, (one, two) in pairs if one != two), None)
        marked = page.locator(".lane").nth(lane).locator(".token.parts")
        expect(marked).to_have_count(1)  # in the last lane, where anybody first parts from it
        if lane < 2:
            assert first is not None
            assert str(marked.get_attribute("id")).endswith(f"-{first}")
            depth = (0, 6)[lane]
            sentence = f"depth {depth} parts at token {first + 1}"
            expect(page.get_by_role("status").filter(has_text=sentence)).to_be_visible()
    for figures in page.locator(".lane .figures").all():
        to_first, rate, amount = figures.locator("dd").all_inner_texts()[:3]
        assert to_first.endswith(("ms", "s"))
        assert rate == DASH or float(rate) > 0, "a dash where all tokens came at once"
        assert int(amount) > 1


def test_tokens_tell_their_probabilities_to_a_pointer_and_to_keys(visit: Visit, site: Site) -> None:
    page = visit("compare/pirate")
    compare(page)
    finished(page, 3)
    choice = completions(site, page, 12)
    top = [dict(each) for each in choice["logprobs"]["top_logprobs"]]  # type: ignore[index]
    lane = page.locator(".lane").last
    lane.locator(".token").nth(2).hover()
    rows = lane.locator(".alternatives tbody tr")
    expect(rows).to_have_count(5)
    likeliest = max(top[2].values())
    expect(rows.first).to_contain_text(minus(likeliest))

    tokens = lane.get_by_role("listbox")
    tokens.focus()
    page.keyboard.press("Home")
    expect(lane.get_by_role("option", selected=True)).to_have_attribute("id", ends_with(page, 0))
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    chosen = lane.get_by_role("option", selected=True)
    expect(chosen).to_have_attribute("id", ends_with(page, 3))
    assert tokens.get_attribute("aria-activedescendant") == chosen.get_attribute("id")
    expect(rows.first).to_contain_text(minus(max(top[3].values())))


def ends_with(page: Page, index: int) -> str:
    lane = str(page.locator(".lane").last.get_by_role("option").first.get_attribute("id"))
    return f"{lane.rpartition('-')[0]}-{index}"


def test_the_slider_moves_by_keys_and_its_depth_is_what_is_asked(visit: Visit) -> None:
    page = visit("compare/pirate")
    slider = page.get_by_role("slider", name="Depth of this answer")
    slider.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(slider).to_have_attribute("aria-valuetext", "depth 9 of 12")
    sent: list[Request] = []
    page.on("request", lambda request: sent.append(request))
    page.get_by_role("button", name="Add a depth").click()
    page.get_by_role("button", name="Run 4 depths").click()
    finished(page, 4)
    bodies = [json.loads(str(each.post_data)) for each in sent if each.method == "POST"]
    assert sorted(body["lora_depth"] for body in bodies) == [0, 6, 9, 12]
    page.get_by_role("button", name="Take depth 6 away").click()
    expect(page.locator(".lane")).to_have_count(3)


def test_a_chat_streams_too(visit: Visit, site: Site) -> None:
    page = visit("compare/pirate")
    page.get_by_role("radio", name="Chat").check()
    page.get_by_label("Message").fill("The dog runs home.")
    page.keyboard.press("Control+Enter")
    finished(page, 3)
    body = {
        "model": "pirate", "messages": [{"role": "user", "content": "The dog runs home."}],
        "max_tokens": 48, "temperature": 0, "seed": 0,
    }  # fmt: skip
    response = page.request.post(f"{site.url}/v1/chat/completions", data=body)
    expected = response.json()["choices"][0]["message"]["content"]
    assert answer(page, 2).split() == expected.split()
    shown = page.locator(".lane").last.get_by_role("listbox").inner_text()
    assert shown.replace("<|eos|>", "").split() == expected.split()


def test_a_run_can_be_stopped(visit: Visit, site: Site) -> None:
    page = visit("compare/pirate")
    ask_for_much(page)
    with busy(site):
        page.get_by_role("button", name="Run").click()
        expect(page.locator(".lane .token").first).to_be_visible()
        page.get_by_role("button", name="Stop").click()
    expect(page.locator(".lane .how dd").filter(has_text="stopped by you").first).to_be_visible()
    expect(page.get_by_role("button", name="Run")).to_be_enabled()


def test_what_the_server_refuses_is_read_in_its_words(visit: Visit, watches: list[Watch]) -> None:
    page = visit("compare/pirate")
    watches[-1].expect("status of 400")
    page.get_by_label("Max tokens").fill("100000")
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".lane").first.get_by_role("alert")).to_contain_text("max_tokens")


def test_a_server_that_dies_in_a_stream_and_comes_back(
    visit: Visit, watches: list[Watch], tmp_path: Path, log: Path
) -> None:
    site = make_site(tmp_path)
    with serve(site, log) as process:
        page = visit("compare/pirate", url=site.url, admin_key=None)
        watches[-1].expect("ERR_INCOMPLETE_CHUNKED_ENCODING")
        watches[-1].expect("ERR_CONNECTION_REFUSED")
        ask_for_much(page)
        with busy(site):
            page.get_by_role("button", name="Run").click()
            expect(page.locator(".lane").first.locator(".token").nth(5)).to_be_visible()
            process.kill()
        said = page.locator(".lane").first.get_by_role("alert")
        expect(said).to_contain_text("The connection broke after")
        expect(said).to_contain_text("Run it again when the server is back")
        assert page.locator(".lane").first.locator(".token").count() > 5, "what came stays"
        expect(page.get_by_role("status").filter(has_text="no answer")).to_be_visible()
    with serve(site, log):
        expect(page.get_by_role("status").filter(has_text="ready")).to_be_visible()
        page.get_by_label("Max tokens").fill("5")
        page.get_by_role("button", name="Run").click()
        finished(page, 3)


def test_a_server_that_drains_says_so_in_the_stream(
    visit: Visit, watches: list[Watch], tmp_path: Path, log: Path
) -> None:
    site = make_site(tmp_path)
    with serve(site, log) as process:
        page = visit("compare/pirate", url=site.url, admin_key=None)
        watches[-1].expect("ERR_CONNECTION_REFUSED|status of 503")
        ask_for_much(page)
        with busy(site):
            page.get_by_role("button", name="Run").click()
            expect(page.locator(".lane").first.locator(".token").nth(5)).to_be_visible()
            process.terminate()
        said = page.locator(".lane").first.get_by_role("alert")
        expect(said).to_contain_text("The server is stopping")
        expect(page.get_by_role("status").filter(has_text="no answer")).to_be_visible()


def test_news_of_what_is_served_disturb_no_answer_that_is_being_written(visit: Visit) -> None:
    held: list[Route] = []
    page = visit("live")
    expect(page.get_by_role("status").filter(has_text="ready")).to_be_visible()
    asked: list[Route] = []
    page.route("**/v1/models", lambda route: held.append(route))
    page.route("**/v1/completions", lambda route: asked.append(route))
    page.get_by_role("link", name="Compare").click()  # which asks anew what is served
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    while len(asked) < 3 or not held:
        page.wait_for_timeout(20)
    with page.expect_response("**/v1/models"):
        held[0].continue_()
    page.wait_for_timeout(200)  # the page reads it
    for route in asked:
        route.continue_()
    finished(page, 3)


def test_the_demo_has_prompts_for_its_adapters(visit: Visit) -> None:
    page = visit("compare")
    for name in demo.adapters():
        page.get_by_role("combobox", name="Adapter").select_option(name)
        expect(page.get_by_label("Prompt")).not_to_have_value("")
