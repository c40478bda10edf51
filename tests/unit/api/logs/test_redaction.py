"""A canary of every kind of secret, everywhere one can occur, and text that must not be redacted."""

import threading
import time

import pytest

from qlora_api.logs.redaction import MASK, Redactor

CANARY = "c4n4ry0123456789ABCDEFabcdef"
JWT = f"eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJrdWJlcm5ldGVzIn0.{CANARY}"
PRESIGNED = (
    "https://adapters.s3.eu-west-1.amazonaws.com/team/adapter.safetensors?X-Amz-Algorithm=AWS4-HMAC-SHA256"
    f"&X-Amz-Credential={CANARY}%2F20260301%2Feu-west-1%2Fs3%2Faws4_request&X-Amz-Date=20260301T120000Z"
    f"&X-Amz-Expires=3600&X-Amz-Security-Token={CANARY}&X-Amz-Signature={CANARY}"
)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(f"Authorization: Bearer {CANARY}", id="header"),
        pytest.param(f"{{'authorization': 'Bearer {CANARY}'}}", id="header-in-a-dictionary"),
        pytest.param(f'{{"Authorization": "Basic {CANARY}=="}}', id="basic"),
        pytest.param(f"curl -H 'Authorization: {CANARY}'", id="header-without-scheme"),
        pytest.param(
            f"Authorization: AWS4-HMAC-SHA256 Credential={CANARY}/20260301/us-east-1/s3/aws4_request, "
            f"SignedHeaders=host, Signature={CANARY}",
            id="signed-request",
        ),
        pytest.param(f"got 401 for bearer {CANARY}", id="bearer"),
        pytest.param(f"x-amz-security-token: {CANARY}", id="session-header"),
        pytest.param(f"GET {PRESIGNED} failed with 403", id="presigned-url"),
        pytest.param(f"https://b.s3.amazonaws.com/k?AWSAccessKeyId={CANARY}&Signature={CANARY}%3D&Expires=1", id="v2"),
        pytest.param(f"https://cdn.hub/x?Policy={CANARY}&Signature={CANARY}&Key-Pair-Id={CANARY}", id="cdn"),
        pytest.param(f"https://azure.blob/x?sv=2026&sig={CANARY}", id="shared-access-signature"),
        pytest.param(f"https://user:{CANARY}@minio.example:9000/bucket", id="user-information"),
        pytest.param(f"https://:{CANARY}@minio.example:9000/bucket", id="password-without-a-user"),
        pytest.param(f"AWS_SECRET_ACCESS_KEY={CANARY} aws s3 ls", id="assignment"),
        pytest.param(f"environ({{'AWS_SECRET_ACCESS_KEY': '{CANARY}', 'HOME': '/work'}})", id="environment"),
        pytest.param(f"aws_secret_access_key = {CANARY}", id="ini"),
        pytest.param(f"session(aws_access_key_id='{CANARY}', aws_session_token='{CANARY}')", id="arguments"),
        pytest.param(f"HF_TOKEN={CANARY}", id="hub-variable"),
        pytest.param(f"WANDB_API_KEY={CANARY}", id="wandb"),
        pytest.param(f"MLFLOW_TRACKING_PASSWORD={CANARY}", id="mlflow"),
        pytest.param(f"token hf_{CANARY} is not valid", id="hub-token"),
        pytest.param(f"TokenReview of {JWT} failed", id="service-account-token"),
    ],
)
def test_canary_secret_is_redacted(text: str) -> None:
    redacted = Redactor().redact_text(text)
    assert CANARY not in redacted
    assert MASK in redacted


@pytest.mark.parametrize("key", ["AKIAIOSFODNN7EXAMPLE", "ASIAIOSFODNN7EXAMPLE"])
def test_access_key_is_found_by_its_format(key: str) -> None:
    assert Redactor().redact_text(f"The key {key} does not exist") == f"The key {MASK} does not exist"


@pytest.mark.parametrize(
    "text",
    [
        "spec.output.secretRef: Secret 's3' does not exist in namespace 'ml', or has none of the keys "
        "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, HF_TOKEN; create it there",
        "1,384 rows to train on, 112 held out, 52,298 tokens to learn from",
        "hf://HuggingFaceTB/SmolLM2-135M-Instruct is at 60c253bc11c9eede5f58b1c7d5d06cd9f70d2077",
        "s3://adapters/quickstart/quickstart/1765b934fb6e3cf1/adapter",
        "a basic configuration, the bearer of bad news, signature of a function",
        "http://qlora-operator.qlora-system.svc:8080/apis/qlora.dev/v1alpha1/namespaces/ml/qlorajobs/x/status",
        "pod support-bot-1-0-abcde runs on node node-1 at 12:30:00; user@example.org asked",
        "hf_hub_download and hf_transfer are functions",
    ],
)
def test_text_without_secret_is_unchanged(text: str) -> None:
    assert Redactor().redact_text(text) == text


def test_redacted_presigned_url_keeps_its_path() -> None:
    redacted = Redactor().redact_text(PRESIGNED)
    assert redacted.startswith("https://adapters.s3.eu-west-1.amazonaws.com/team/adapter.safetensors?X-Amz-Algorithm=")
    assert "X-Amz-Date=20260301T120000Z" in redacted


@pytest.mark.parametrize(
    "value", ["plain words 7", 'quote " and \\ slash', "pässwörd-mit-umlaut", "a+b/c=d&e?f#g", "(.*)+$(.*)+$"]
)
def test_added_secret_is_redacted_anywhere(value: str) -> None:
    redactor = Redactor()
    redactor.add_secrets([value])
    told = redactor.redact_value(
        {"message": f"before {value} after", "deep": [{"list": (value,)}], "error": ValueError(value)}
    )
    assert value not in str(told)
    assert told == {"message": f"before {MASK} after", "deep": [{"list": [MASK]}], "error": MASK}


def test_known_secret_is_redacted_in_a_url() -> None:
    redactor = Redactor()
    redactor.add_secrets(["a+b/c=d&e"])
    assert redactor.redact_text("https://s3/x?password2=a%2Bb%2Fc%3Dd%26e") == f"https://s3/x?password2={MASK}"


def test_secret_that_contains_another_is_redacted_completely() -> None:
    redactor = Redactor()
    redactor.add_secrets(["longer-secret-value"])
    redactor.add_secrets(["longer-secret"])
    assert redactor.redact_text("longer-secret-value") == MASK


def test_short_values_are_not_looked_for() -> None:
    redactor = Redactor()
    redactor.add_secrets(["test", ""])
    assert redactor.redact_text("a test") == "a test"


def test_field_with_secret_name_is_redacted_completely() -> None:
    told = {
        "token": "x",
        "hf_token": "x",
        "Authorization": "x",
        "password": "x",
        "tokens": "12",
        "secretRef": "hf",
        "n": 1,
    }
    assert Redactor().redact_value(told) == {
        "token": MASK, "hf_token": MASK, "Authorization": MASK, "password": MASK, "tokens": "12", "secretRef": "hf",
        "n": 1,
    }  # fmt: skip


def test_secrets_can_be_added_from_threads() -> None:
    redactor, failures = Redactor(), []

    def work(number: int) -> None:
        value = f"secret-of-thread-{number}"
        redactor.add_secrets([value])
        if value in redactor.redact_text(f"it is {value}!"):
            failures.append(value)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_hostile_line_is_redacted_fast() -> None:
    """No form may need time that grows faster than the text: logs come from outside."""
    redactor = Redactor()
    for hostile in (
        "a" * 50_000,
        "://" * 20_000,
        "authorization" * 4_000,
        "eyJ" * 20_000,
        "-eyJabcdefgh" * 5_000,
        "eyJabcdefgh." * 5_000,
        "?sig=" * 10_000,
        "x:" * 25_000,
    ):
        start = time.process_time()
        redactor.redact_text(hostile)
        assert time.process_time() - start < 1.0, hostile[:20]


def test_token_with_long_claims_is_redacted() -> None:
    groups = "Z3JvdXBz" * 4_000
    for token in (f"eyJhbGciOiJSUzI1NiJ9.eyJ{groups}.{CANARY}", f"eyJ{groups}.eyJpc3MiOiJrdWJlcm5ldGVzIn0.{CANARY}"):
        assert Redactor().redact_text(f"got {token} back") == f"got {MASK} back"
