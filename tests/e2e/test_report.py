"""The page of `tocsin evaluate --report` in a real browser, and the picture of `--png`."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from tests.e2e.program import tocsin

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the page and the picture of a sample KPI."""
    directory = tmp_path_factory.mktemp("report")
    tocsin(directory, "sample", "--days", "8", "-o", "checkout.csv")
    options = ("--model", "deepant@1", "--train-fraction", "0.3", "--report", "out.html", "--png", "out.png")
    tocsin(directory, "evaluate", "checkout.csv", *options)
    return directory


def browse(*arguments: str) -> str:
    assert BROWSER is not None
    fixed = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=10000")
    done = subprocess.run([BROWSER, *fixed, *arguments], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def test_the_page_draws_its_chart_without_a_network(made: Path) -> None:
    page = browse("--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", (made / "out.html").as_uri())
    assert "Evaluation of deepant@1" in page
    assert "svg-container" in page, "plotly drew"
    shown = set(re.findall(r'class="legendtext"[^>]*>([^<]+)<', page))
    assert {"value", "normal band", "expected", "incident opened", "score", "threshold", "labelled"} <= shown
    assert page.count('class="trace scatter') >= 8


def test_the_picture_is_one(made: Path) -> None:
    content = (made / "out.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1600, 900)
    assert len(content) > 50_000
