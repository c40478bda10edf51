"""Tokens that cannot be a pod's are refused by their claims, before anybody is asked."""

import base64
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import pytest

from qlora_operator.cluster.interface import PodIdentity
from qlora_operator.progress_server.token_claims import LEEWAY_SECONDS, MAX_TOKEN, read_claims
from tests.make import NOW, REF, encode_segment, make_token

POD: Final = PodIdentity(REF.namespace, "support-bot-1-0-abcde", "uid-1")
HEADER, PAYLOAD, SIGNATURE = make_token(POD).split(".")
PAST: Final = int(NOW.timestamp()) - int(LEEWAY_SECONDS) - 1


def with_payload(payload: bytes) -> str:
    return f"{HEADER}.{encode_segment(payload)}.{SIGNATURE}"


def without(*claims: str) -> str:
    """Return a token that lacks one claim, which is given by its path."""
    payload: dict[str, Any] = json.loads(base64.urlsafe_b64decode(PAYLOAD + "=="))
    part = payload
    for claim in claims[:-1]:
        part = part[claim]
    del part[claims[-1]]
    return with_payload(json.dumps(payload).encode())


IMPLAUSIBLE: Final[dict[str, Callable[[], str]]] = {
    "empty": lambda: "",
    "random text": lambda: "5f0c1b5e00004000",
    "no ASCII": lambda: "ä.ö.ü",
    "too long": lambda: make_token(POD, padding="x" * MAX_TOKEN),
    "two segments": lambda: f"{HEADER}.{PAYLOAD}",
    "four segments": lambda: f"{make_token(POD)}.{SIGNATURE}",
    "only dots": lambda: "..",
    "no signature": lambda: f"{HEADER}.{PAYLOAD}.",
    "base64, but not base64url": lambda: f"{HEADER}.{PAYLOAD}.a+/b",
    "white space in a segment": lambda: f"{HEADER}.{PAYLOAD[:8]}\n{PAYLOAD[8:]}.{SIGNATURE}",
    "header is no object": lambda: f"{encode_segment(b'[]')}.{PAYLOAD}.{SIGNATURE}",
    "payload is no JSON": lambda: with_payload(b"claims"),
    "payload is no UTF-8": lambda: with_payload(b"\xff\xfe"),
    "payload is a number": lambda: with_payload(b"1"),
    "deeply nested payload": lambda: with_payload(b"[" * 5_000),
    "integer of 5,000 digits": lambda: with_payload(b'{"exp": ' + b"9" * 5_000 + b"}"),
    "expires never": lambda: make_token(POD, exp=float("inf")),
    "expires at NaN": lambda: make_token(POD, exp=float("nan")),
    "expiry as text": lambda: make_token(POD, exp="9999999999"),
    "expiry as bool": lambda: make_token(POD, exp=True),
    "expired": lambda: make_token(POD, exp=PAST),
    "no expiry": lambda: without("exp"),
    "no issuer": lambda: without("iss"),
    "empty issuer": lambda: make_token(POD, iss=""),
    "no audience": lambda: without("aud"),
    "the API server's audience": lambda: make_token(POD, aud=["https://kubernetes.default.svc"]),
    "audience is part of another": lambda: make_token(POD, aud="not-qlora-operator"),
    "audiences are numbers": lambda: make_token(POD, aud=[1]),
    "no namespace": lambda: without("kubernetes.io", "namespace"),
    "a user's token": lambda: without("kubernetes.io"),
    "bound to no pod": lambda: without("kubernetes.io", "pod"),
    "no uid": lambda: without("kubernetes.io", "pod", "uid"),
    "empty name": lambda: make_token(POD, **{"kubernetes.io": {"pod": {"name": ""}}}),
}


@pytest.mark.parametrize("token", IMPLAUSIBLE.values(), ids=IMPLAUSIBLE)
def test_implausible_token_has_no_claims(token: Callable[[], str]) -> None:
    assert read_claims(token(), NOW) is None


@pytest.mark.parametrize(
    "token",
    [
        pytest.param(make_token(POD), id="of-a-kubelet"),
        pytest.param(make_token(POD, aud="qlora-operator"), id="one-audience-as-text"),
        pytest.param(make_token(POD, aud=["other", "qlora-operator"]), id="another-audience-too"),
        pytest.param(make_token(POD, **{"kubernetes.io": {"node": {"name": "a"}}, "later": [{}]}), id="more-claims"),
    ],
)
def test_plausible_token_names_its_pod(token: str) -> None:
    assert read_claims(token, NOW) == POD


def test_clock_of_the_operator_may_be_a_minute_fast() -> None:
    token = make_token(POD, exp=NOW.timestamp())
    assert read_claims(token, NOW + timedelta(seconds=LEEWAY_SECONDS)) == POD
    assert read_claims(token, NOW + timedelta(seconds=LEEWAY_SECONDS + 1)) is None
