"""The picture of the page in the README: `python -m benchmarks.page_picture` writes docs/page.png.

Needs Chromium. It shows the pass that makes experts of a PR-MoE, with one of its layers chosen.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import ViewportSize, sync_playwright

import moec
from examples.gpt import small

PICTURE = Path(__file__).parents[1] / "docs" / "page.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SIZE = ViewportSize(width=1440, height=900)


def draw(page: Path, out: Path = PICTURE, theme: str = "light") -> None:
    """A picture of `page`, opened in a browser, where the experts are made."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise SystemExit(f"needs a browser: one of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport=SIZE, color_scheme="dark" if theme == "dark" else "light")
        tab.goto(f"{page.as_uri()}#step=lift_experts")
        folded = tab.locator('svg[data-side="after"] .region', has_text="moe_1")
        folded.click()
        tab.locator('svg[data-side="after"] .handle', has_text="moe_1").click()  # chosen, and folded again
        tab.keyboard.press("0")
        tab.mouse.move(0, 0)
        tab.wait_for_timeout(500)  # the picture glides to where it fits
        tab.screenshot(path=out)
        browser.close()


def main() -> None:
    """Compile the example, write its page, take the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, help="a page that is there already (default: one is made)")
    parser.add_argument("--out", type=Path, default=PICTURE)
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = asked.page or moec.compile(small(), plan="pr_moe").show(Path(folder) / "page.html", B=8)
        draw(page.absolute(), asked.out, asked.theme)
    print(asked.out)


if __name__ == "__main__":
    main()
