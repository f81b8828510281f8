"""The page of traces in a real browser (Debian's chromium; skipped where there is none)."""

import html
import json
import re
import shutil
import subprocess

import pytest

from run.report import write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><b>& \u2028 \\boxed{</b>"
PROBE = """<script>
addEventListener("load", () => {
  const seen = {title: document.title, images: document.images.length};
  seen.text = document.getElementById("trace").textContent;
  const marked = () => [...document.querySelectorAll(".stop")].findIndex((node) => node.classList.contains("here"));
  document.querySelectorAll("section.episode")[1].click();
  seen.afterClick = marked();
  document.body.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowUp", bubbles: true}));
  seen.afterKey = marked();
  document.querySelectorAll(".stop")[2].click();
  seen.answers = [...document.querySelectorAll(".answers")].filter((node) => !node.hidden).length;
  seen.classes = [...document.querySelectorAll("section.episode")].map((node) => node.className.trim());
  seen.fits = document.documentElement.scrollWidth <= innerWidth;
  const out = document.createElement("pre");
  out.id = "seen";
  out.textContent = JSON.stringify(seen);
  document.body.append(out);
});
</script>"""


def forced(right: int) -> list[dict]:
    verdicts = ["right"] * right + ["wrong"] * (8 - right)
    return [{"boxed": HOSTILE, "verdict": v, "tokens": 3, "mean_logprob": -1.0, "text": HOSTILE} for v in verdicts]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize("size", ["1200,900", "500,800"])
def test_the_page_in_a_browser(tmp_path, size):
    thought = "Okay.\n\n" + HOSTILE + "\n\nWait, more.\n\n"
    record = {
        **dict(id=HOSTILE, problem=HOSTILE, gold="7", sample=0, text=thought + "</think>\n" + HOSTILE, reward=1.0),
        **dict(boxed=HOSTILE, verdict="right", tokens=30, boundaries=[0, 10, 20, 25], J=[0.0, 0.125, 1.0, 0.25]),
        **dict(characters=[0, 7, len(thought) - 13, len(thought)], forced=list(map(forced, (0, 1, 8, 2)))),
    }
    page = write_page([record], tmp_path / "trace.html")
    page.write_text(page.read_text(encoding="utf-8") + PROBE, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=3000 --dump-dom"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={size}"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    (found,) = re.findall(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    seen = json.loads(html.unescape(found))
    assert seen["title"] == "Traces by episode" and seen["images"] == 0  # hostile text stays text
    assert HOSTILE in seen["text"]
    assert seen["afterClick"] == 2 and seen["afterKey"] == 1 and seen["answers"] == 1
    # One answer of eight is noise; 7 of 8 are not.
    assert seen["classes"] == ["episode", "episode up", "episode down"] and seen["fits"]
