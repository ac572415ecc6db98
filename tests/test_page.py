"""The page, in the real browser that a customer opens it in: Chromium, headless."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, Dialog, Locator, Page, sync_playwright
from torch import nn

from sp_compile import explain
from sp_compile.tools.page import render
from tests.models import MODELS, inputs_of
from tests.page_data import decoder_report, with_fallback
from tests.test_explain import Layer

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None and "CI" not in os.environ:
    pytest.skip("no chromium on this machine; where CI is set this would be an error", allow_module_level=True)

# On a closed network Chromium would try to call home.
QUIET = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
READY = "body[data-ready]"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None, "CI has no chromium: .ci/run installs it"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


class Opened:
    """A report in the browser, with all that the page said and asked for."""

    def __init__(self, browser: Browser, folder: Path, report: dict[str, Any], **options: Any) -> None:
        self.report = report
        self.said: list[str] = []
        self.asked: list[str] = []
        file = folder / "report.html"
        file.write_text(render(report), encoding="utf-8")
        self.page: Page = browser.new_page(viewport={"width": 1440, "height": 1000}, **options)
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", self.refuse)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector(READY, timeout=20_000)
        self.file = file

    def refuse(self, dialog: Dialog) -> None:
        self.said.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def row(self, name: str) -> Locator:
        return self.page.locator(f'#tree .row[data-name="{name}"]')

    def shown(self) -> list[str]:
        return self.page.eval_on_selector_all(
            "#tree .row", "rows => rows.filter(r => r.offsetParent).map(r => r.dataset.name)"
        )

    def drawn(self) -> int:
        """The bytes of all bars of the chart per layer."""
        return sum(self.page.eval_on_selector_all("#layers [data-bytes]", "bars => bars.map(b => +b.dataset.bytes)"))


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Any]:
    pages: list[Opened] = []

    def show(report: dict[str, Any], **options: Any) -> Opened:
        pages.append(Opened(browser, tmp_path, report, **options))
        return pages[-1]

    yield show
    for each in pages:
        each.page.close()
        assert each.said == [], "the page wrote to the console"
        assert each.asked == [each.file.as_uri()], "the page asked for more than itself"


@pytest.mark.parametrize(("layers", "scheme"), [(2, "light"), (32, "dark")])
def test_bars_and_tree_give_the_totals(opened: Any, layers: int, scheme: str) -> None:
    view = opened(decoder_report(layers), color_scheme=scheme)
    totals = view.report["totals"]
    assert view.drawn() == totals["bytes_forward"] + totals["bytes_backward"]
    assert view.page.locator("#moved").get_attribute("title") == f"{view.drawn():,} bytes"
    assert view.page.locator("#disagree").count() == 0
    bars = view.page.eval_on_selector_all(
        "#layers rect[data-bytes]", "bars => bars.map(b => b.dataset.bytes / b.getAttribute('height'))"
    )
    assert len(bars) == 2 * layers
    assert max(bars) / min(bars) < 1.001, "bars are not as high as their bytes"


def test_the_page_of_32_layers_is_small_and_quick(opened: Any) -> None:
    view = opened(decoder_report(32))
    assert len(view.report["graphs"][0]["ops"]) > 2000
    assert view.file.stat().st_size < 3_000_000
    milliseconds = view.page.evaluate("performance.getEntriesByType('navigation')[0].duration")
    assert milliseconds < 2000


def test_layers_are_folded_and_open(opened: Any) -> None:
    view = opened(decoder_report(32))
    assert "32 × identical" in view.row("layers 0–31").inner_text()
    assert len(view.shown()) < 60
    view.row("layers.1–31").click()
    assert {f"layers.{number}" for number in range(32)} <= set(view.shown())
    view.row("layers.17").click()
    assert view.row("layers.17").get_attribute("aria-expanded") == "true"
    assert "model.layers.17" in view.page.locator("#panel .title").inner_text()


def test_a_layer_unlike_the_others_is_not_folded_with_them(opened: Any) -> None:
    report = decoder_report(6)
    wider = next(each for each in report["graphs"][0]["ops"] if each["module"] == "model.layers.3.mlp.act_fn")
    wider["shape"] = [1, 131072, 28672]
    view = opened(report)
    shown = view.shown()
    assert "layers" in shown
    assert [name for name in shown if re.fullmatch("(layers )?[0-9–]+", name)] == ["layers 0–2", "3", "layers 4–5"]


def test_layers_that_take_turns_are_folded_as_pairs(opened: Any) -> None:
    report = decoder_report(8)
    for each in report["graphs"][0]["ops"]:
        if re.fullmatch(r"model\.layers\.[1357]\.mlp\.act_fn", each["module"]):
            each["op"] = "aten.gelu"
    view = opened(report)
    assert "4 × identical, 2 unlike in turn" in view.row("layers 0–7").inner_text()


def test_a_click_on_a_collective_shows_what_is_before_and_after(opened: Any) -> None:
    view = opened(decoder_report(32))
    view.row("gather_seq_scatter_heads_k").click()
    panel = view.page.locator("#panel")
    before = panel.locator("#before button").evaluate_all("all => all.map(b => b.dataset.op)")
    after = panel.locator("#after button").evaluate_all("all => all.map(b => b.dataset.op)")
    collective = next(op for op in view.report["graphs"][0]["ops"] if op["name"] == "gather_seq_scatter_heads_k")
    assert before == collective["operands"]
    assert after == ["sdpa"]
    text = panel.inner_text()
    assert "28.0 MiB forward + 28.0 MiB backward" in text
    assert "bf16[1, 8, 16384 of 131072, 128]" in text and "bf16[1, 1 of 8, 131072, 128]" in text
    assert collective["line"] in text
    panel.locator("#after button").click()
    assert panel.locator("#before button").count() == 3
    assert view.row("sdpa").get_attribute("aria-selected") == "true"


def test_the_keyboard_walks_the_tree(opened: Any) -> None:
    view = opened(decoder_report(2))
    view.row("graph_0").focus()
    for key, name in (
        ("ArrowDown", "inputs"),
        ("ArrowRight", "inputs"),
        ("ArrowRight", "input_ids"),
        ("ArrowLeft", "inputs"),
        ("ArrowLeft", "inputs"),
        ("ArrowDown", "model"),
        ("Home", "graph_0"),
        ("End", "outputs"),
        ("Enter", "outputs"),
        ("ArrowDown", "output"),
    ):
        view.page.keyboard.press(key)
        assert view.page.evaluate("document.activeElement.dataset.name") == name
    view.page.locator("#next").focus()
    view.page.keyboard.press("Shift+Tab")
    assert view.page.evaluate("document.activeElement.id") == "previous"


def test_steps_through_the_collectives(opened: Any) -> None:
    view = opened(decoder_report(2))
    names = []
    for _ in range(5):
        view.page.locator("#next").click()
        names.append(view.page.locator("#panel .title").inner_text())
    heads = [f"gather_seq_scatter_heads_{name}" for name in "qkv"]
    assert names == [*heads, "gather_heads_scatter_seq", "gather_seq_scatter_heads_q_1"]
    view.page.locator("#previous").click()
    assert view.page.locator("#panel .title").inner_text() == "gather_heads_scatter_seq"


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_what_explain_gives_agrees_with_itself(opened: Any, name: str) -> None:
    keywords = {"use_cache": False} if name == "llama" else {}
    report = explain(MODELS[name](), **inputs_of(name, 33), **keywords, sp_size=3)
    view = opened(report.to_dict())
    assert view.page.locator("#disagree").count() == 0
    assert view.drawn() == report.totals.bytes_forward + report.totals.bytes_backward > 0
    assert "2 × identical" in view.page.locator("#tree").inner_text()
    view.page.locator("#next").click()
    assert view.page.locator("#before button").count() >= 1
    chosen = view.page.locator("#tree .row[aria-selected=true]").inner_text()
    assert re.search(r"S\(2: [0-9+]+\) → S\(1: \d\)", chosen)


def test_a_graph_that_is_called_often_counts_as_often(opened: Any) -> None:
    report = explain(nn.Sequential(*[Layer() for _ in range(5)]), torch.randn(1, 16, 12), sp_size=2)
    view = opened(report.to_dict())
    assert view.page.locator("#disagree").count() == 0
    assert view.drawn() == report.totals.bytes_forward + report.totals.bytes_backward
    assert "called 4 times; numbers of one" in view.page.locator("#tree").inner_text()
    partly = view.page.locator("#partly").inner_text()
    assert partly.count("ends at a graph break: test_explain.py:") == 1 and "Developer" not in partly


@pytest.mark.parametrize("total", ["bytes_forward", "launches_backward", "flops_sharded"])
def test_totals_that_disagree_are_shouted(opened: Any, total: str) -> None:
    report = decoder_report(2)
    report["totals"][total] += 1
    view = opened(report)
    alarm = view.page.locator("#disagree")
    assert alarm.get_attribute("role") == "alert"
    assert f"{report['totals'][total]:,}" in alarm.inner_text()


def test_an_operand_that_is_no_op_is_shouted(opened: Any) -> None:
    report = decoder_report(2)
    report["graphs"][0]["ops"][-1]["operands"].append("lost")
    assert "takes lost, which is no op" in opened(report).page.locator("#disagree").inner_text()


def test_fallbacks_and_dear_outputs_say_what_to_do(opened: Any) -> None:
    view = opened(with_fallback(decoder_report(2)))
    fallbacks = view.page.locator("#fallbacks").inner_text()
    assert "no sharding rule for mylib.scan" in fallbacks and "512 MiB" in fallbacks
    assert "What to do" in view.page.eval_on_selector(
        "#fallbacks .remedy", "e => getComputedStyle(e, '::before').content"
    )
    assert "register_sharding_rule(" in fallbacks
    assert "28.0 GiB" in view.page.locator("#outputs").inner_text()
    assert view.page.locator("#tree .icon.fallback").count() >= 1


def test_estimates_are_called_that(opened: Any) -> None:
    report = decoder_report(2)
    view = opened(report)
    marked = view.page.locator(".tile", has=view.page.locator(".estimate")).locator("h2").all_inner_texts()
    assert marked == ["Activations of a rank", "Communication, a step"]
    report["totals"]["seconds"] = report["links"] = None
    assert "not timed" in opened(report).page.locator(".tiles").inner_text()


def test_names_are_text_and_never_code(opened: Any) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!--<script>"
    report = decoder_report(1, model=evil)
    for each in report["graphs"][0]["ops"][30:]:
        each["module"], each["line"], each["layout"] = evil, evil, evil
    view = opened(report)
    assert view.page.locator("h1").inner_text() == evil
    assert view.page.title() == f"{evil} over 8 ranks"
    assert view.page.locator("img").count() == 0
    view.page.locator('#tree .row[data-kind="module"]', has_text=evil).last.click()
    assert view.page.locator("#panel .title").inner_text() == evil


def test_no_number_that_json_lacks() -> None:
    report = decoder_report(1)
    report["totals"]["seconds"] = {"forward": float("inf")}
    with pytest.raises(ValueError, match="not JSON compliant"):
        render(report)


def test_the_charts_have_their_numbers_as_tables(opened: Any) -> None:
    view = opened(decoder_report(4))
    view.page.locator("#scaling summary").click()
    cells = view.page.locator("#scaling tbody td").all_inner_texts()
    expected = [
        text
        for row in view.report["scaling"]
        for text in (str(row["sp_size"]), *(f"{value:,} bytes" for value in row["strategies"].values()))
    ]
    assert cells == expected
    assert view.page.locator("#scaling rect.strategy").count() == 12


def test_nothing_overflows_a_narrow_window(opened: Any) -> None:
    view = opened(decoder_report(32))
    for width in (1440, 1024, 800):
        view.page.set_viewport_size({"width": width, "height": 900})
        assert view.page.evaluate("document.documentElement.scrollWidth") <= width
