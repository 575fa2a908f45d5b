# SPDX-License-Identifier: Apache-2.0
"""The HTML report in a real browser: it draws, fits, and asks nobody for anything."""

import html
import json
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from checkpointd.report import page, record

pytestmark = pytest.mark.needs("chromium")

RECORD = Path(__file__).parents[1] / "data" / "measurement-v1.jsonl"

LOOK = """<script>
const found = {
  page: [document.documentElement.scrollWidth, innerWidth],
  drawings: [...document.querySelectorAll("svg")].map(svg => {
    const out = [], box = svg.viewBox.baseVal;
    for (const text of svg.querySelectorAll("text")) {
      if (text.getAttribute("transform")) continue;
      const b = text.getBBox();
      if (b.x < -1 || b.y < -1 || b.x + b.width > box.width + 1 || b.y + b.height > box.height + 1)
        out.push(text.textContent);
    }
    return {size: svg.getBoundingClientRect().width, outside: out, marks: svg.querySelectorAll("rect,circle").length};
  }),
  fetched: performance.getEntriesByType("resource").map(entry => entry.name),
};
document.body.setAttribute("data-found", JSON.stringify(found));
</script>"""


def chromium(tmp_path, file, *options):
    return subprocess.run(
        [
            *(
                shutil.which("chromium"),
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
            ),
            *(f"--user-data-dir={tmp_path}/profile", "--host-resolver-rules=MAP * ~NOTFOUND"),
            *("--force-color-profile=srgb", *options, file.as_uri()),
        ],
        capture_output=True,
        timeout=240,
        check=True,
    )


def pixels(path):
    """(width, height, rows) of an 8-bit RGB or RGBA PNG."""
    data, at, body = path.read_bytes(), 8, b""
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        chunk = data[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", chunk[:10])
        body += chunk if kind == b"IDAT" else b""
        at += 12 + length
    assert depth == 8
    channels = {2: 3, 6: 4}[colour]
    raw, rows, above = zlib.decompress(body), [], bytearray(width * channels)
    for y in range(height):
        begin = y * (width * channels + 1)
        filter_, line = raw[begin], bytearray(raw[begin + 1 : begin + 1 + width * channels])
        for n in range(len(line)):
            a = line[n - channels] if n >= channels else 0
            b, c = above[n], above[n - channels] if n >= channels else 0
            if filter_ == 1:
                line[n] = (line[n] + a) & 255
            elif filter_ == 2:
                line[n] = (line[n] + b) & 255
            elif filter_ == 3:
                line[n] = (line[n] + (a + b) // 2) & 255
            elif filter_ == 4:
                pa, pb, pc = abs(b - c), abs(a - c), abs(a + b - 2 * c)
                line[n] = (line[n] + (a if pa <= pb and pa <= pc else b if pb <= pc else c)) & 255
        rows.append([bytes(line[n : n + 3]) for n in range(0, len(line), channels)])
        above = line
    return width, height, rows


@pytest.mark.parametrize("width", [1280, 480])
def test_everything_fits_and_nothing_is_fetched(tmp_path, width):
    file = tmp_path / "page.html"
    file.write_text(page.html(record.load(RECORD)).replace("</body>", LOOK + "</body>"), encoding="utf-8")
    done = chromium(tmp_path, file, "--dump-dom", f"--window-size={width},900")
    found = json.loads(html.unescape(re.search(rb'data-found="(.*?)"', done.stdout)[1].decode()))
    assert found["page"][0] <= found["page"][1]
    assert len(found["drawings"]) == 5
    for drawing in found["drawings"]:
        assert drawing["outside"] == []
        assert drawing["marks"] > 0
        assert drawing["size"] > width / 4
    assert found["fetched"] == []


@pytest.mark.parametrize(("scheme", "paper", "line"), [(1, "fbfbfa", "2f6fb3"), (0, "15181b", "6ea8e6")])
def test_it_draws_in_light_and_in_dark(tmp_path, scheme, paper, line):
    file, shot = tmp_path / "page.html", tmp_path / "shot.png"
    file.write_text(page.html(record.load(RECORD)), encoding="utf-8")
    chromium(
        *(tmp_path, file, f"--screenshot={shot}", "--window-size=700,700"),
        f"--blink-settings=preferredColorScheme={scheme}",
    )
    width, height, rows = pixels(shot)
    assert (width, height) == (700, 700)
    seen = {colour for row in rows for colour in row}
    assert rows[2][2] == bytes.fromhex(paper)
    assert len(seen) > 20
    assert bytes.fromhex(line) in seen
