"""A headless browser reads a page at several widths: what is where, and in which colours.

The page is shown in frames of the wanted widths, since a window cannot be narrow enough.  A script
in a copy of the page measures it and sends what it found to the page around it, whose text the
browser prints.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
WIDTHS = (360, 400, 700, 1280, 2560)
HEIGHT = 20000  # all of the page, so that every number is inside the window

SCRIPT = """
<script>
addEventListener('load', () => {
  const box = (element) => {  // of the text that eyes see
    const all = document.createTreeWalker(element, NodeFilter.SHOW_TEXT), rects = [];
    for (let node = all.nextNode(); node; node = all.nextNode()) {
      if (node.parentElement.closest('.unseen') || !node.data.trim()) continue;
      const range = document.createRange(); range.selectNodeContents(node);
      rects.push(...range.getClientRects());
    }
    const edge = (pick, side) => pick(...rects.map((r) => r[side]));
    return {left: edge(Math.min, 'left'), right: edge(Math.max, 'right'),
            top: edge(Math.min, 'top'), bottom: edge(Math.max, 'bottom')};
  };
  const shown = (element) => {
    const b = box(element);
    const at = document.elementFromPoint((b.left + b.right) / 2, (b.top + b.bottom) / 2);
    return at !== null && (element.contains(at) || at.contains(element));
  };
  const texts = (cell) => [...cell.querySelectorAll('.value, .ratio')].concat(
    cell.matches('.why') && !cell.querySelector('.value') ? [cell] : []);
  const tables = [...document.querySelectorAll('table')].map((table) => {
    const region = table.closest('.scroll'), r = region.getBoundingClientRect();
    return {
      id: table.id, caption: table.caption.textContent, label: region.getAttribute('aria-label'),
      focusable: region.tabIndex === 0,
      left: r.left, width: region.clientWidth, scrollable: region.scrollWidth,
      headings: [...table.querySelectorAll('thead th')].map((h) => h.scope),
      rows: [...table.querySelectorAll('tbody tr')].map((row) => ({
        name: row.cells[0].textContent.trim(), scope: row.cells[0].scope,
        box: box(row.cells[0]), shown: shown(row.cells[0]),
        cells: [...row.cells].slice(1).map((cell) => ({
          label: cell.dataset.label || '',
          parts: texts(cell).map((e) => ({text: e.innerText.trim(), box: box(e), shown: shown(e)})),
        })),
      })),
    };
  });
  const paper = (element) => {
    const svg = element.closest('svg');
    if (svg) return getComputedStyle(svg.querySelector('.paper')).fill;
    for (let e = element; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$/.test(c) && c !== 'transparent') return c;
    }
    return 'rgb(255, 255, 255)';
  };
  const colours = {};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const e = node.parentElement;
    if (!node.data.trim() || e.closest('script, style, title')) continue;
    const style = getComputedStyle(e), ink = e.closest('svg') ? style.fill : style.color;
    colours[ink + '/' + paper(e)] = node.data.trim().slice(0, 40);
  }
  parent.postMessage({
    width: innerWidth, page: document.documentElement.scrollWidth, tables, colours,
    dark: matchMedia('(prefers-color-scheme: dark)').matches,
    headings: [...document.querySelectorAll('h1, h2, h3')].map((h) => h.tagName),
    pictures: [...document.querySelectorAll('svg')].map((svg) => ({
      label: svg.getAttribute('aria-label'), role: svg.getAttribute('role'),
      right: svg.getBoundingClientRect().right, width: svg.getBoundingClientRect().width,
      viewbox: svg.viewBox.baseVal.width,
      outside: [...svg.querySelectorAll('text')].filter((t) => {
        const b = t.getBBox(), v = svg.viewBox.baseVal;
        return b.x < 0 || b.x + b.width > v.width || b.y < 0 || b.y + b.height > v.height;
      }).map((t) => t.textContent),
    })),
  }, '*');
});
</script>
"""

AROUND = """<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<body style="margin:0"><script>
const found = [];
addEventListener('message', (event) => {
  found.push(event.data);
  if (found.length === COUNT) {
    const out = document.createElement('pre');
    out.id = 'found'; out.textContent = JSON.stringify(found); document.body.append(out);
  }
});
</script>FRAMES</body>"""


def measured(page: str, folder: Path, *, dark: bool) -> dict[int, dict[str, Any]]:
    """What the browser found at each of WIDTHS."""
    assert BROWSER is not None
    (folder / "page.html").write_text(page.replace("</body>", SCRIPT + "</body>"))
    frames = "".join(
        f'<iframe src="page.html" style="width:{w}px;height:{HEIGHT}px;border:0"></iframe>'
        for w in WIDTHS
    )
    around = AROUND.replace("COUNT", str(len(WIDTHS))).replace("FRAMES", frames)
    (folder / "around.html").write_text(around)
    printed = _printed(folder, "--dump-dom", dark=dark)
    said = re.search(r'<pre id="found">(.*?)</pre>', printed, re.DOTALL)
    assert said is not None, printed[-2000:]
    found = json.loads(html.unescape(said[1]))
    return {each["width"]: each for each in found}


def _printed(folder: Path, action: str, *, dark: bool) -> str:
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--window-size=2600,1000", "--virtual-time-budget=20000",
        f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        action, (folder / "around.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def contrast(pair: str) -> float:
    """The WCAG 2 contrast of "rgb(...)/rgb(...)"."""
    first, second = sorted(map(_luminance, pair.split("/")), reverse=True)
    return (first + 0.05) / (second + 0.05)


def _luminance(colour: str) -> float:
    parts = [float(x) / 255 for x in re.findall(r"[\d.]+", colour)[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
