"""A fake Hugging Face hub on localhost, with the repositories of a test."""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Final, Self
from urllib.parse import unquote, urlsplit

COMMIT: Final = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Repository:
    """The files of one commit, and who may read them."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    commit: str = COMMIT
    revisions: tuple[str, ...] = ("main",)
    token: str | None = None
    """If set, the repository is gated, and this token opens it."""
    status: int | None = None
    """HTTP status for every request, such as 429 or 503."""
    ranges: bool = True
    """Whether it answers a request for a part of a file with that part; some proxies send the whole file."""


class FakeHub:
    """Serves repositories under the paths of the hub while the context is open.

    Models have ids like `organization/name`; data sets `datasets/organization/name`.
    """

    def __init__(self, repositories: Mapping[str, Repository], address: str = "127.0.0.1") -> None:
        self.repositories = dict(repositories)
        self.requests: list[str] = []
        self.sent: Counter[str] = Counter()
        """Bytes of each file that were sent."""
        self._server = ThreadingHTTPServer((address, 0), self._make_handler())
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def endpoint(self) -> str:
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _make_handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self)

            def do_HEAD(self) -> None:
                hub._answer(self)

            def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 (the base's name)
                """Log nothing."""

        return Handler

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path).strip("/")
        self.requests.append(f"{request.command} /{path}")
        if path.startswith("api/"):
            self._answer_info(request, path)
        else:
            self._answer_file(request, path)

    def _answer_info(self, request: BaseHTTPRequestHandler, path: str) -> None:
        name, _, revision = path.removeprefix("api/").removeprefix("models/").partition("/revision/")
        repository = self._allowed(request, name, revision or "main")
        if repository is not None:
            files = [{"rfilename": file} for file in sorted(repository.files)]
            content = {"id": name.removeprefix("datasets/"), "sha": repository.commit, "siblings": files}
            _send(request, 200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer_file(self, request: BaseHTTPRequestHandler, path: str) -> None:
        name, _, rest = path.partition("/resolve/")
        revision, _, file = rest.partition("/")
        repository = self._allowed(request, name, revision)
        if repository is None:
            return
        content = repository.files.get(file)
        if content is None:
            _send(request, 404, b"Entry not found", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": repository.commit}
        asked = re.fullmatch(r"bytes=0-(\d+)", request.headers.get("Range", ""))
        if asked is None or not repository.ranges:
            self.sent[file] += len(content)
            _send(request, 200, content, headers)
        elif not content:
            _send(request, 416, b"", {"Content-Range": "bytes */0"})
        else:
            part = content[: int(asked[1]) + 1]
            self.sent[file] += len(part)
            _send(request, 206, part, {**headers, "Content-Range": f"bytes 0-{len(part) - 1}/{len(content)}"})

    def _allowed(self, request: BaseHTTPRequestHandler, name: str, revision: str) -> Repository | None:
        """Return the repository, or send the hub's error if it is missing or gated."""
        repository = self.repositories.get(name)
        if repository is None:
            _send(request, 401, b"Invalid username or password.", {"X-Error-Code": "RepoNotFound"})
        elif repository.status is not None:
            _send(request, repository.status, b"", {"Retry-After": "0"})
        elif repository.token is not None and request.headers.get("Authorization") != f"Bearer {repository.token}":
            status = 403 if request.headers.get("Authorization") else 401
            _send(request, status, b"Access to this model is restricted.", {"X-Error-Code": "GatedRepo"})
        elif revision not in {*repository.revisions, repository.commit}:
            _send(request, 404, b"Revision not found", {"X-Error-Code": "RevisionNotFound"})
        else:
            return repository
        return None


def _send(request: BaseHTTPRequestHandler, status: int, content: bytes, headers: Mapping[str, str]) -> None:
    request.send_response(status)
    for name, value in {**headers, "Content-Length": str(len(content))}.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content)
