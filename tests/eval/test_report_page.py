"""The report in a real browser: silent, self-contained, no wider than a phone, dark where one asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from eval.report import main
from tests.eval.browser import Browser, find_browser
from tests.eval.report_runs import make_everything, make_run

PROGRAM = find_browser()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="needs Chromium on the path, or its name in CHROMIUM"),
]
# WCAG's contrast of the text of everything that has some with the background behind it.
CONTRAST = """
(() => {
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const bad = [];
  const written = 'h1,h2,h3,h4,p,td,th,dt,dd,li,label,summary,text,code,.interval,.mark,.ref,nav a';
  for (const e of document.querySelectorAll(written)) {
    if (!e.textContent.trim() || !e.getClientRects().length) continue;
    const style = getComputedStyle(e);
    const a = light(parse(e.tagName === 'text' ? style.fill : style.color)), b = light(behind(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const name = e.className.baseVal ?? e.className;
    if (ratio < 4.5) bad.push(`${e.tagName} ${name} ${ratio.toFixed(2)} ${e.textContent.slice(0, 40)}`);
  }
  return bad;
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with Browser(PROGRAM, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, llava_dir: Path) -> Path:
    """A page with every section, a very long answer and one that looks like HTML."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_everything(llava_dir)
        long = make_run(Path("runs/long"), Path("vit"), ["no" * 900] * 10)
        names = ("vit", "ours", "blind", "pareto", "cost.jsonl", "zeroshot.json")
        runs = [*(f"runs/{name}" for name in names), str(long)]
        assert main([*runs, "-o", "report.html"]) == 0
    return folder / "report.html"


def test_a_page_is_whole_on_every_screen(page: Path, browser: Browser) -> None:
    for width, scheme in ((390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")):
        browser.open(page, width, 844, scheme)
        place = f"{width} px, {scheme}"
        assert browser.complaints() == [], place
        asked = [address for address in browser.requests() if not address.startswith("data:")]
        assert asked == [page.as_uri()], place
        assert browser.run("document.documentElement.scrollWidth") == width, place
        assert browser.run("[...document.images].every(i => i.complete && i.naturalWidth)"), place
        assert browser.run(CONTRAST) == [], place
        ground = browser.run("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(15, 17, 21)" if scheme == "dark" else "rgb(250, 249, 246)"), place


def test_cards_end_where_their_text_ends(page: Path, browser: Browser) -> None:
    """Whatever the height of the picture on the card beside them."""
    browser.open(page, 1280, 800, "light")
    left_over = (
        "[...document.querySelectorAll('.example')].map(card => card.getBoundingClientRect().bottom"
        " - card.lastElementChild.getBoundingClientRect().bottom)"
    )
    assert max(browser.run(left_over)) < 30


def test_regions_come_and_go_with_their_switch(page: Path, browser: Browser) -> None:
    browser.open(page, 1280, 800, "light")
    shown = (
        "[1, 2].map(n => [...document.querySelectorAll(`.layer-${n}`)]"
        ".filter(e => getComputedStyle(e).display !== 'none').length)"
    )
    count = browser.run("document.querySelectorAll('.photo').length")
    assert count > 2
    assert browser.run(shown) == [0, count]
    browser.run("document.querySelector('.pick-1 + label').click()")
    assert browser.run(shown) == [count, 0]
    browser.run("document.querySelector('.pick-0 + label').click()")
    assert browser.run(shown) == [0, 0]


def test_faults_would_be_seen(tmp_path: Path, browser: Browser) -> None:
    """The checks above can fail: a page that loads, complains, is too wide and pale is caught."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<body style="background:#fff"><p style="color:#ddd;width:900px">pale</p><img src="none.png">'
        "<script>console.error('no')</script></body>"
    )
    browser.open(bad, 390, 844, "light")
    assert any("no" in line for line in browser.complaints())
    assert any(address.endswith("none.png") for address in browser.requests())
    assert browser.run("document.documentElement.scrollWidth") > 390
    assert browser.run("[...document.images].every(i => i.complete && i.naturalWidth)") is False
    assert len(browser.run(CONTRAST)) == 1
