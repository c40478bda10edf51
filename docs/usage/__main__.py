"""Writes docs/usage.svg: `python -m docs.usage`; the figures are what `qlora usage` prints for november.json."""

import contextlib
import json
import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

from typer.testing import CliRunner

from qlora_api.v1alpha1.usage import PARTS
from qlora_cli.__main__ import app

SAMPLE: Final = Path(__file__).with_name("november.json")
PICTURE: Final = Path(__file__).parents[1] / "usage.svg"
MONTH: Final = "2026-11"
_COLORS: Final = {
    "training": "#2f9e62",
    "evaluating": "#4a86e8",
    "publishing": "#8a63d2",
    "starting": "#d9a300",
    "repeated": "#e07b39",
    "idle": "#d64545",
}
"""In the order of the bar."""
_WIDTH, _LEFT, _BAR, _ROW, _TOP = 860, 120, 560, 46, 96


class _Handler(BaseHTTPRequestHandler):
    """An API server that has the QLoRAJobs of the sample."""

    def do_GET(self) -> None:
        found = json.loads(SAMPLE.read_text(encoding="utf-8"))
        namespace = re.search(r"/namespaces/([^/]+)/", self.path)
        if namespace:
            found["items"] = [job for job in found["items"] if job["metadata"]["namespace"] == namespace[1]]
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@contextlib.contextmanager
def sample_cluster() -> Iterator[str]:
    """Serve the sample as a cluster does; yield the path of its kubeconfig."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "sample",
        "clusters": [{"name": "sample", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "sample", "user": {"token": "none"}}],
        "contexts": [{"name": "sample", "context": {"cluster": "sample", "user": "sample"}}],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kubeconfig")
        path.write_text(json.dumps(config), encoding="utf-8")
        try:
            yield str(path)
        finally:
            server.shutdown()
            server.server_close()


def run_qlora(words: Sequence[str]) -> str:
    """Return what a command prints for the sample."""
    with sample_cluster() as kubeconfig:
        result = CliRunner().invoke(app, [*words, f"--kubeconfig={kubeconfig}"], catch_exceptions=False)
    if result.exit_code:
        raise SystemExit(result.output)
    return result.stdout


def draw(report: dict[str, Any]) -> str:
    """Return a bar for each team, divided by what its GPUs were held for."""
    rows = sorted(report["rows"], key=lambda row: -row["gpuHours"])
    scale = _BAR / max(row["gpuHours"] for row in rows)
    height = _TOP + _ROW * len(rows) + 58
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="20" y="32" font-size="18" fill="#1f2430">GPU-hours by team, {MONTH}</text>',
        *_legend(),
    ]
    for index, row in enumerate(rows):
        lines += _bar(row, _TOP + _ROW * index, scale)
    lost = ", ".join(f"{reason} {hours:.1f}" for reason, hours in report["lostByReason"].items())
    saved = report["saved"]
    lines += [
        _text(20, height - 34, f"lost: {lost}"),
        _text(
            20,
            height - 12,
            f"saved: {saved['gpuHours']:.1f}, results found published: {saved['resultsFound']}",
        ),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _legend() -> Iterator[str]:
    for index, (part, color) in enumerate(_COLORS.items()):
        x = 20 + 125 * index
        yield f'<rect x="{x}" y="52" width="14" height="14" fill="{color}"/>'
        yield _text(x + 20, 64, part)


def _bar(row: dict[str, Any], y: int, scale: float) -> Iterator[str]:
    yield _text(20, y + 20, row["namespace"])
    x = float(_LEFT)
    for part, color in _COLORS.items():
        width = row[part] * scale
        if width:
            yield f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="28" fill="{color}"/>'
        x += width
    costs = " + ".join(f"{amount} {currency}" for currency, amount in row["costs"].items())
    yield _text(int(x) + 10, y + 19, f"{row['gpuHours']:.1f} h, {costs}")


def _text(x: int, y: int, text: str) -> str:
    return f'<text x="{x}" y="{y}" font-size="14" fill="#1f2430">{text}</text>'


if __name__ == "__main__":
    if set(_COLORS) != set(PARTS):
        raise SystemExit("a part has no color")
    output = run_qlora(["usage", "-A", "--by=namespace", f"--month={MONTH}", "-o", "json"])
    PICTURE.write_text(draw(json.loads(output)), encoding="utf-8")
