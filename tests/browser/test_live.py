"""Live: the figures of `/metrics` as they are, and the arithmetic on them."""

import httpx
from playwright.sync_api import expect

from tests.browser.conftest import Visit
from tests.browser.served import Site


def test_traffic_is_seen_as_it_comes(visit: Visit, site: Site) -> None:
    page = visit("live", admin_key=None)
    expect(page.get_by_text("No request in the last minute")).to_be_visible()
    body = {
        "model": "pirate", "prompt": "Plain: The dog is old.\nPirate:", "max_tokens": 200,
        "ignore_eos": True, "temperature": 0,
    }  # fmt: skip
    tile = page.locator(".tile").filter(has_text="Running").locator(".big")
    expect(tile).to_have_text("0")
    for depth in (0, 3, 3, 12, 12):
        told = httpx.post(
            f"{site.url}/v1/completions", json=body | {"lora_depth": depth}, timeout=60
        )
        assert told.status_code == 200
    # One that is read as slowly as it takes to be seen: nobody reads the end of it.
    long = body | {"max_tokens": 490, "n": 16, "stream": True, "lora_depth": 12}
    with httpx.stream("POST", f"{site.url}/v1/completions", json=long, timeout=60) as answer:
        assert answer.status_code == 200
        expect(tile).to_have_text("16")
    expect(tile).to_have_text("0")
    rows = page.get_by_role("region", name="Depth of requests").locator("tbody tr")
    expect(rows).to_have_count(13)
    for index, (name, amount) in {0: ("base", 1), 3: ("3", 2), 12: ("full 12", 3)}.items():
        expect(rows.nth(index)).to_contain_text(name)
        expect(rows.nth(index).locator("td").nth(1)).to_have_text(str(amount))
    latency = page.get_by_role("region", name="Latency").locator("tbody tr")
    expect(latency.first.locator("td").last).to_have_text("6")
    expect(latency.first.locator("td").first).to_contain_text("s")
    expect(page.get_by_role("region", name="LoRA layer applications")).to_contain_text("pirate")


def test_metrics_are_read_as_prometheus_reads_them(visit: Visit) -> None:
    page = visit("live", admin_key=None)
    found = page.evaluate(
        """async () => {
          const address = document.querySelector("link[href$='exposition.js']").href;
          const { parse, histogram, quantile, rate, total } = await import(address);
          const look = (a, b, c) => parse([
            "# HELP x Words.", "# TYPE x histogram",
            `x_bucket{le="1",source="a\\\\"b"} ${a}`, `x_bucket{le="2",source="a\\\\"b"} ${b}`,
            `x_bucket{le="+Inf",source="a\\\\"b"} ${c}`, `n_total{le="1"} ${c}`, "n_total 1", "",
          ].join("\\n"));
          const [then, now] = [look(1, 1, 1), look(3, 5, 6)];
          return {
            label: now.get("x_bucket")[0].labels.source,
            ranges: histogram(now, "x", then).map(({ count }) => count),
            all: histogram(now, "x").map(({ count }) => count),
            anew: histogram(then, "x", now).map(({ count }) => count),
            median: quantile(histogram(now, "x"), 0.5),
            late: quantile(histogram(now, "x"), 0.99),
            none: quantile(histogram(now, "gone"), 0.5),
            sum: total(now, "n_total"),
            gone: total(now, "gone"),
            rate: rate({ at: 3000, found: now }, { at: 1000, found: then }, "n_total"),
            fell: rate({ at: 3000, found: then }, { at: 1000, found: now }, "n_total"),
          };
        }"""
    )
    assert found == {
        "label": 'a"b',
        "ranges": [2, 2, 1],
        "all": [3, 2, 1],
        "anew": [1, 0, 0],
        "median": 1,
        "late": 2,
        "none": None,
        "sum": 7,
        "gone": None,
        "rate": 2.5,
        "fell": None,
    }


def test_where_answers_part_is_where_tokens_first_differ(visit: Visit) -> None:
    page = visit("live", admin_key=None)
    found = page.evaluate(
        """async () => {
          const address = document.querySelector("link[href$='parting.js']").href;
          const { parting, partings } = await import(address);
          const answer = (text, state) => ({ state, tokens: [...text].map((token) => ({ token })) });
          return [
            parting(answer("abc", "done"), answer("abd", "done")),
            parting(answer("abc", "done"), answer("abc", "done")),
            parting(answer("ab", "streaming"), answer("abc", "done")),
            parting(answer("ab", "done"), answer("abc", "streaming")),
            parting(answer("", "waiting"), answer("abc", "done")),
            partings(["xbc", "abd", "abc"].map((text) => answer(text, "done"))),
          ];
        }"""
    )
    assert found == [2, None, None, 2, None, [0, 2, 0]]
