"""The page in a real browser, headless Chromium: as wide as a screen and as a phone, in the light and in the dark."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.shardrun.present.conftest import Recorded

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
WIDTHS = (1280, 390)
SCHEMES = {"dark": 0, "light": 1}
"""Chromium's own numbers."""

MEASURE = """
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, style = getComputedStyle(page.body), root = page.documentElement;
    page.querySelectorAll("details").forEach(each => each.open = true);
    const boxes = [...page.querySelectorAll("main *:not(svg *)")].filter(each => each.offsetParent);
    return {
      wide: root.scrollWidth, paper: style.backgroundColor, ink: style.color,
      scrolled: boxes.filter(each => each.scrollWidth > each.clientWidth + 1)
        .filter(each => getComputedStyle(each).overflowX == "auto").map(each => each.textContent.slice(0, 60)),
      outside: boxes.filter(each => each.getBoundingClientRect().right > root.clientWidth + 1
        ).map(each => each.outerHTML.slice(0, 80)),
      diagrams: [...page.querySelectorAll("svg.diagram")].filter(each => each.getBoundingClientRect().width > 0).length,
      text: Math.min(...[...page.querySelectorAll("svg.diagram text")].map(each => each.getBoundingClientRect().height
        ).filter(height => height > 0)),
    };
  });
  document.getElementById("found").textContent = JSON.stringify(found);
});
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_sideways_scroll_and_colours_that_can_be_read(recorded: Recorded, tmp_path: Path, scheme: str) -> None:
    page = html.escape((recorded.folder / "page.html").read_text(encoding="utf-8"))
    frames = "".join(f'<iframe width={width} height=900 style="border:0" srcdoc="{page}"></iframe>' for width in WIDTHS)
    outer = tmp_path / "outer.html"
    outer.write_text(f"<!doctype html><meta charset=utf-8><body>{frames}<pre id=found></pre><script>{MEASURE}</script>")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
        "--virtual-time-budget=5000", "--window-size=1400,2000", "--dump-dom", outer.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<pre id=.?found.?>(.+?)</pre>", done.stdout, re.S)
    assert found, done.stderr[-2000:]
    for width, seen in zip(WIDTHS, json.loads(html.unescape(found[1])), strict=True):
        assert seen["wide"] <= width, (width, seen)
        assert not seen["outside"] and not seen["scrolled"], (width, seen)
        assert seen["diagrams"] == 1 and seen["text"] >= 12, (width, seen)
        paper, ink = (brightness(seen[kind]) for kind in ("paper", "ink"))
        assert (paper < 0.1 and ink > 0.7) if scheme == "dark" else (paper > 0.9 and ink < 0.2), seen


def brightness(colour: str) -> float:
    red, green, blue = (int(number) / 255 for number in re.findall(r"\d+", colour)[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
