"""A headless browser for tests of pages, and what is said where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

NONE_FOUND = "BROWSER TESTS SKIPPED: no chromium"


def executable() -> str | None:
    """The browser on this computer."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def chromium() -> Iterator[object]:
    """A headless Chromium; without one, tests are skipped and the end of the run says so."""
    from playwright.sync_api import sync_playwright

    path = executable()
    if path is None:
        pytest.skip(NONE_FOUND)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
