"""A browser for the tests of the page; what it complains of fails the test."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

from moec.view.page import write_page
from moec.view.timeline import Timeline

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync"

Open = Callable[..., Page]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium, one for all tests of a process."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=found, args=QUIET.split())
        yield running
        running.close()


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Opens the page of a timeline. Afterwards: no error, no complaint, nothing fetched but the file."""
    complaints: list[str] = []
    fetched: list[str] = []
    written: set[str] = set()
    contexts = []

    def opened(
        shown: Timeline | Path, link: str = "", size: tuple[int, int] = (1280, 800), **how: Any
    ) -> Page:
        path = shown if isinstance(shown, Path) else write_page(shown, tmp_path / "page.html")
        written.add(path.as_uri())
        context = browser.new_context(viewport=ViewportSize(width=size[0], height=size[1]), **how)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("dialog", lambda dialog: dialog.dismiss())
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        page.on("request", lambda asked: fetched.append(asked.url.partition("#")[0]))
        page.goto(path.as_uri() + link)
        page.wait_for_selector("html[data-ready]", state="attached")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []
    assert set(fetched) == written
