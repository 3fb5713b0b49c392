"""A headless browser: what a page looks like, and how large it and its pictures are.

Chromium or Chrome on the PATH, or what FPN_PLUGIN_BROWSER names. Where there is none,
tests are skipped, unless FPN_PLUGIN_NEEDS_BROWSER is set: then they fail.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--disable-dev-shm-usage", "--enable-logging=stderr", "--v=0"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
_TIMEOUT = 120  # seconds; a page takes a few on a busy machine
# a page may load nothing but what it carries itself; the console reports what else it asks for
_POLICY = (
    '<meta http-equiv="Content-Security-Policy"'
    " content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
)
_PROBE = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="f" style="border:0;width:%dpx;height:2000px" srcdoc="%s"></iframe>
<pre id="sizes"></pre><script>
document.getElementById("f").onload = (event) => {
  const page = event.target.contentDocument, root = page.documentElement;
  document.getElementById("sizes").textContent = JSON.stringify({
    width: root.clientWidth, needed: root.scrollWidth, height: root.scrollHeight,
    images: [...page.images].map((image) => image.complete ? image.naturalWidth : 0),
    drawings: [...page.querySelectorAll("svg")].map((svg) => svg.getBoundingClientRect().width)});
};
</script>"""


@dataclass(frozen=True)
class Inspection:
    """The layout of a page in a frame of a given width, in pixels.

    Attributes:
        width: of the frame.
        needed: the width that the page takes; more than `width` scrolls sideways.
        height: that the page takes.
        images: the width of each picture in its own pixels, 0 where it did not load.
        drawings: the width that each inline SVG takes.
        complaints: lines of the console: scripts' errors, and what the page asked for that it
            does not carry itself, which is refused.
    """

    width: int
    needed: int
    height: int
    images: list[int]
    drawings: list[float]
    complaints: list[str]


def browser() -> str:
    """The browser's path; skips the test, or fails it, where there is none."""
    path = os.environ.get("FPN_PLUGIN_BROWSER") or next(filter(None, map(shutil.which, NAMES)), "")
    if not path:
        text = f"no browser is installed (looked for {', '.join(NAMES)})"
        if os.environ.get("FPN_PLUGIN_NEEDS_BROWSER"):
            pytest.fail(f"{text}, and FPN_PLUGIN_NEEDS_BROWSER is set")
        # Pages are also checked without one, as text; CI has one, or says so, and may not skip.
        pytest.skip(f"{text}: apt-get install chromium")
    return path


def screenshot(page: Path, out: Path, width: int, height: int, dark: bool = False) -> None:
    """Write the top `height` pixels of a page as PNG.

    A window is at least 500 pixels wide; :func:`inspect` also takes less.
    """
    flags = ["--blink-settings=preferredColorScheme=0"] if dark else []
    _run(page, *flags, f"--screenshot={out}", f"--window-size={width},{height}")


def inspect(page: Path, width: int) -> Inspection:
    """Load a page in a frame of `width` pixels, with everything refused that it does not carry."""
    text = re.sub("<head>", lambda match: match[0] + _POLICY, page.read_text(), count=1)
    assert _POLICY in text, f"{page} has no <head>"
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.html")
        probe.write_text(_PROBE % (width, html.escape(text)), encoding="utf-8")
        flags = ("--dump-dom", "--virtual-time-budget=5000", "--window-size=1200,2000")
        result = _run(probe, *flags)
    console = [line for line in result.stderr.splitlines() if ":CONSOLE" in line]
    match = re.search(r'<pre id="sizes">(.+?)</pre>', result.stdout, re.DOTALL)
    assert match, f"{page} did not load: {console}"
    return Inspection(**json.loads(html.unescape(match[1])), complaints=console)


def _run(page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as profile:
        command = [browser(), *_FLAGS, f"--user-data-dir={profile}", *flags]
        command.append(page.resolve().as_uri())
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=True)
