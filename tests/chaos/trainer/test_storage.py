"""The object store is slow, drops connections or rejects requests: checkpoints and results arrive intact."""

import dataclasses
import http.client
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

import pytest
import time_machine

from qlora_api.reasons import Reason
from qlora_api.runconfig import S3Config
from qlora_trainer.errors import RunError
from qlora_trainer.storage.credentials import Credentials
from qlora_trainer.storage.s3 import S3Store
from qlora_trainer.storage.store import OUTPUT_FIELD
from qlora_trainer.training.checkpoint_store import CheckpointCallbacks, CheckpointStore
from tests.chaos.promises import Dose, promise
from tests.chaos.trainer.lives import ADAPTER, STEPS, TrainerRuns
from tests.chaos.trainer.publishers import check_published, publish_files, write_files
from tests.cluster.services.s3 import S3
from tests.cluster.services.toxiproxy import Toxiproxy
from tests.unit.trainer.states import FINGERPRINT, make_state
from tests.unit.trainer.tiny import serving

REFUSED = 0.3
"""Fraction of the requests that get 503."""
FILE_BYTES = 20_000


def save_and_publish(address: str, s3: S3, bucket: str, folder: Path, repeats: int) -> float:
    """Save and load checkpoints and publish a result through an endpoint, verify all, and return the seconds."""
    keys = s3.environment() | {"AWS_ENDPOINT_URL": address}
    started = time.monotonic()
    for number in range(repeats):
        root = f"s3://{s3.make_bucket(f'{bucket}-{number}')}/result"
        notes: list[str] = []
        store = S3Store(root, OUTPUT_FIELD, Credentials(keys), S3Config())
        checkpoints = CheckpointStore(
            store, FINGERPRINT, 1, datetime.now(UTC), CheckpointCallbacks(notes.append, lambda _: None)
        )
        for step in (1, 2):
            checkpoints.save(make_state(step), keep=1)
        found = checkpoints.load_latest()
        assert found is not None
        assert (found.checkpoint_id.step, [note for note in notes if "skipped" in note]) == (2, [])
        publish_files(root, keys, write_files(folder / str(number), number, FILE_BYTES), number, None)
        assert check_published(s3.client(), root) is not None
    return time.monotonic() - started


@dataclasses.dataclass(frozen=True)
class Fault:
    """A toxic on a fraction of the connections, and its strength in a short and a full run."""

    kind: str
    attribute: str
    short: int
    full: int
    share: float = 1.0
    repeats: int = 1


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault("reset_peer", "timeout", 0, 0, share=0.3, repeats=3), id="resets"),
        pytest.param(Fault("latency", "latency", 200, 5000), id="latency"),
        pytest.param(Fault("bandwidth", "rate", 200, 50), id="bandwidth"),
        pytest.param(Fault("timeout", "timeout", 300, 3000, share=0.3, repeats=3), id="time-outs"),
    ],
)
@promise(
    fault="S3 resets connections, responds late or not at all, or is slow",
    promise="checkpoints and results are uploaded, and every digest matches its manifest",
    how="toxiproxy: 30 % of the connections reset, 5 s latency, 50 kB/s, 30 % of the connections cut after 3 s",
)
def test_bad_connections(  # noqa: PLR0917 (fixtures and a table)
    fault: Fault, s3: S3, toxic: Toxiproxy, tmp_path: Path, dose: Dose, outcome: Callable[[str], None]
) -> None:
    amount = dose(short=fault.short, full=fault.full)
    toxic.add_toxic(fault.kind, {fault.attribute: amount}, fault.share)
    took = save_and_publish(f"http://{toxic.address}", s3, fault.kind.replace("_", "-"), tmp_path, fault.repeats)
    outcome(f"{fault.kind}{f' {amount}' if amount else ''}: complete after {took:.0f} s")


class ForwardingHandler(BaseHTTPRequestHandler):
    """Forwards every request to an object store."""

    protocol_version = "HTTP/1.1"
    upstream: ClassVar[str]

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        backend = http.client.HTTPConnection(self.upstream)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        backend.request(self.command, self.path, body, headers)
        found = backend.getresponse()
        content = found.read()
        headers = {n: v for n, v in found.getheaders() if n.lower() not in {"transfer-encoding", "connection"}}
        backend.close()
        self.reply(found.status, headers, content)

    def reply(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response_only(status)
        length = headers.get("Content-Length", str(len(content)))
        for name, value in {**headers, "Content-Length": length}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        self.answer()

    do_PUT = do_HEAD = do_DELETE = do_GET  # noqa: N815 (http.server's names)


class ThrottlingHandler(ForwardingHandler):
    """Answers a fraction of the requests with SlowDown."""

    chance: ClassVar[random.Random]
    refused: ClassVar[list[str]]

    def answer(self) -> None:
        if self.chance.random() >= REFUSED:
            return super().answer()
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.refused.append(self.path)
        return self.reply(503, {}, b"<Error><Code>SlowDown</Code></Error>")


class TruncatingHandler(ForwardingHandler):
    """Reports every adapter one byte shorter than it is."""

    def reply(self, status: int, headers: dict[str, str], content: bytes) -> None:
        if self.command == "HEAD" and self.path.endswith(ADAPTER) and "Content-Length" in headers:
            headers = {**headers, "Content-Length": str(int(headers["Content-Length"]) - 1)}
        super().reply(status, headers, content)


def make_server(kind: type[ForwardingHandler], s3: S3, **attributes: Any) -> type[ForwardingHandler]:
    """Make a handler of this kind in front of the store."""
    return type(kind.__name__, (kind,), {"upstream": s3.endpoint.removeprefix("http://"), **attributes})


@promise(
    fault="S3 rejects a third of the requests",
    promise="checkpoints and results are uploaded, and every digest matches its manifest",
    how="a proxy answers 30 % of all requests with 503 SlowDown",
)
def test_refused_requests(s3: S3, tmp_path: Path, dose: Dose, outcome: Callable[[str], None]) -> None:
    repeats, refused = dose(short=1, full=5), list[str]()
    with serving(make_server(ThrottlingHandler, s3, chance=random.Random(4), refused=refused)) as address:
        took = save_and_publish(address, s3, "refusing", tmp_path, repeats)
    assert len(refused) > repeats
    outcome(f"{len(refused)} requests rejected; {repeats} of {repeats} complete after {took:.0f} s")


@promise(
    fault="S3 stores something other than what was sent",
    promise="nothing is published, the attempt ends with UploadFailed, and the next attempt publishes what was trained",
    how="a proxy reports the adapter as one byte shorter than uploaded",
)
def test_corrupted_upload_fails_and_is_retried(runs: TrainerRuns, s3: S3, outcome: Callable[[str], None]) -> None:
    run = runs.make()
    with serving(make_server(TruncatingHandler, s3)) as address:
        process = run.start(endpoint=address)
        assert process.wait_for_exit() != 0
    message = process.termination_message
    assert message is not None
    assert message.reason is Reason.UPLOAD_FAILED
    assert "reads back different from what was sent" in message.message
    assert check_published(s3.client(), run.config.prepared.prefix) is None
    retry = run.start()
    assert retry.wait_for_exit() == 0
    assert run.verified_adapter()
    assert retry.resumed == STEPS
    outcome(f"UploadFailed, and published from the checkpoint of step {retry.resumed}")


@promise(
    fault="a node's clock is an hour off",
    promise="the run blames the clock, not its credentials",
    how="reads, writes and listings by a process with a different system time",
)
@pytest.mark.parametrize("hours", [-1, 1])
@pytest.mark.parametrize(
    "operation",
    [
        pytest.param(lambda store: store.read("x"), id="read"),
        pytest.param(lambda store: store.put("y", b"content"), id="write"),
        pytest.param(lambda store: store.exists("x"), id="exists"),
    ],
)
def test_clock_skew_is_reported(s3: S3, operation: Callable[[S3Store], object], hours: int, tmp_path: Path) -> None:
    root = f"s3://{s3.make_bucket(tmp_path.name.replace('_', '-'))}/result"
    store = S3Store(root, OUTPUT_FIELD, Credentials(s3.environment()), S3Config())
    store.put("x", b"content")
    operation(store)
    with (
        time_machine.travel(datetime.now(UTC) + timedelta(hours=hours), tick=True),
        pytest.raises(RunError, match="the clock of this node is more than 15 minutes off") as refusal,
    ):
        operation(store)
    assert refusal.value.reason is Reason.S3_UNAVAILABLE
