"""Looks at six pages of the built site in a browser, wide and narrow, light and dark: ``python docs/check_site.py``.

Pictures of them go to ``build/screens``. It fails where text has too little contrast (WCAG 2.2 AA), headings skip a
level or a page has not one title, a picture has no alternative text, a page is wider than the screen, another server is
asked for something, or the search finds nothing.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SITE, SCREENS = ROOT / "site", ROOT / "build" / "screens"
PAGES = [
  "index.html",
  "quick-start.html",
  "notebooks/2-maps.html",
  "models/smollm2-135m-instruct.html",
  "benchmarks.html",
  "reference/sa_jax.html",
]
WIDTHS = {"wide": (1280, 900), "narrow": (390, 844)}
BROWSERS = ("chromium", "google-chrome", "chrome", "chromium-browser")

FAULTS = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")


class Quiet(http.server.SimpleHTTPRequestHandler):
  """Serves without a line a request."""

  def log_message(self, *_: Any) -> None:
    """Says nothing."""


def serve() -> str:
  """Serves the site from this machine, and tells its address."""
  handler = functools.partial(Quiet, directory=str(SITE))
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  return f"http://127.0.0.1:{server.server_port}/"


def main() -> int:
  """Visits all pages; returns how many faults there are."""
  from playwright.sync_api import sync_playwright

  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
  parser.add_argument("--browser", default=found, help="Chrome or Chromium; found by itself where it is installed")
  flags = parser.parse_args()
  if not (SITE / "index.html").exists():
    sys.exit("There is no site to look at: run make docs")
  SCREENS.mkdir(parents=True, exist_ok=True)
  home = serve()
  faults: list[str] = []

  def only_ours(request: Any) -> None:
    if not request.url.startswith((home, "data:", "blob:")):
      faults.append(f"another server is asked for {request.url}")

  with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=flags.browser, args=["--no-sandbox"])
    for scheme in ("light", "dark"):
      for width, (x, y) in WIDTHS.items():
        page = browser.new_page(viewport={"width": x, "height": y}, color_scheme=scheme)
        page.on("request", only_ours)
        for name in PAGES:
          page.goto(home + name, wait_until="networkidle")
          stem = name.replace("/", "-").removesuffix(".html")
          page.screenshot(path=SCREENS / f"{stem}-{width}-{scheme}.png")
          faults += [f"{name}, {width}, {scheme}: {fault}" for fault in page.evaluate(FAULTS)]
        page.close()
    page = browser.new_page()
    page.goto(home)
    page.locator(".md-search__input").first.fill("head map")
    try:
      page.wait_for_selector(".md-search-result__item", timeout=10_000)
    except Exception:
      faults.append("the search finds nothing")
    browser.close()
  print("\n".join(faults) or f"No faults on {len(PAGES)} pages; pictures of them are in {SCREENS.relative_to(ROOT)}.")
  return len(faults)


if __name__ == "__main__":
  sys.exit(main() > 0)
