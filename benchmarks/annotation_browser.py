"""Vote to next pair in Chromium: from the key press to the next pair decoded and painted."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from annotation_server import Server

LATENCY_MS, BYTES_PER_S = 100, 20e6 / 8
DWELL_MS = {False: 300, True: 1500}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WATCH = """
window.waits = [];
let pressed = null, wake = () => {};
addEventListener("keydown", () => { pressed = performance.now(); }, true);
new MutationObserver(() => {
  if (pressed !== null && document.body.dataset.shown !== before) {
    waits.push(performance.now() - pressed);
    pressed = null;
  }
  before = document.body?.dataset.shown;
  wake();
}).observe(document, { subtree: true, childList: true, attributes: true, attributeFilter: ["data-shown", "class"] });
let before;
window.whenLive = async (count) => {
  const isLive = () => document.body.dataset.shown && waits.length === count && !document.querySelector("#choices.arming");
  while (!isLive()) await new Promise((done) => { wake = done; });
};
"""


def measured(server: Server, project: int, token: str, *, num_votes: int, slow: bool) -> dict[str, Any]:
    """Judge so many pairs by keyboard and return the spread of the waits in ms."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise SystemExit(f"no browser: want one of {', '.join(BROWSERS)} on the path.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            context = browser.new_context(viewport={"width": 1280, "height": 800})
            [(name, value)] = server.cookie(token).items()
            context.add_cookies([{"name": name, "value": value, "url": server.url}])
            context.add_init_script(WATCH)
            page = context.new_page()
            if slow:
                session = context.new_cdp_session(page)
                session.send("Network.enable")
                rates = {"downloadThroughput": BYTES_PER_S, "uploadThroughput": BYTES_PER_S}
                session.send("Network.emulateNetworkConditions", {"offline": False, "latency": LATENCY_MS, **rates})
            page.goto(f"{server.url}/judge/{project}")
            for number in range(num_votes):
                page.evaluate("count => whenLive(count)", number)
                page.wait_for_timeout(DWELL_MS[slow])
                page.keyboard.press("ArrowLeft" if number % 2 else "ArrowRight")
            page.evaluate("count => whenLive(count)", num_votes)
            waits = sorted(page.evaluate("waits"))
            version = browser.version
        finally:
            browser.close()
    link = {"latency_ms": LATENCY_MS, "mbit_per_s": 20, "dwell_ms": DWELL_MS[True]} if slow else {"dwell_ms": DWELL_MS[False]}
    at = {f"p{share}_ms": round(waits[int(share / 100 * (len(waits) - 1))], 1) for share in (50, 95)}
    return {"votes": len(waits), **at, "max_ms": round(waits[-1], 1), **link, "chromium": version}
