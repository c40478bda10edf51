"""Attacks that public advisories describe, on other projects of this kind, tried on the readers of this one."""

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from pydantic import ValidationError

from qlora_api.escapes import escape_line
from qlora_api.names import TOKEN_AUDIENCE
from qlora_api.object_names import ObjectName
from qlora_api.reasons import Reason
from qlora_api.report import ResultManifest
from qlora_api.result import is_below
from qlora_api.untrusted_json import InvalidJsonError, parse_object
from qlora_api.v1alpha1 import ManifestRef
from qlora_cli.manifests.loader import ManifestError, parse_manifest
from qlora_cli.manifests.yaml_documents import YamlError, parse_documents
from qlora_operator.cluster.interface import PodIdentity
from qlora_operator.progress_server.token_claims import read_claims
from qlora_planner.validation import COMMON_RULES
from qlora_trainer.errors import RunError
from qlora_trainer.storage import safetensors_headers
from qlora_trainer.storage.local_store import FileStore
from qlora_trainer.storage.safetensors_headers import fetch_headers
from qlora_trainer.storage.snapshots import StoredSnapshot
from qlora_trainer.storage.store import MODEL_FIELD
from tests.make import NOW, REF

PREFIX: Final = "s3://adapters/team-a/support-bot/0123456789abcdef"

NAMES: Final = {
    "zip-slip": "../../../../root/.ssh/authorized_keys",  # CVE-2018-1002200 and its kin, as of tarfile CVE-2007-4559
    "zip-slip-of-windows": "..\\..\\Windows\\x",
    "tar-absolute": "/etc/cron.d/x",
    "parent-behind-parameter": "adapter/..;/../x",  # MLflow, CVE-2024-1593
    "encoded-parent": "%2e%2e/%2e%2e/etc/passwd",  # MLflow, CVE-2024-1560
    "twice-encoded-parent": "%252e%252e%252fetc/passwd",
    "stripped-once": "....//....//etc/passwd",
    "fullwidth-parent": "\uff0e\uff0e/etc/passwd",  # NFKC makes it ../
    "two-dot-leader": "\u2025/etc/passwd",
    "fullwidth-slash": "..\uff0fetc/passwd",
    "division-slash": "..\u2215etc\u2215passwd",
    "overlong-utf8": b"..\xc0\xaf..".decode(errors="surrogateescape"),
    "home": "~/.bashrc",
    "home-of-root": "~root/.bashrc",
    "option": "-rf",
    "variable": "$HOME/.bashrc",
    "process": "/proc/self/environ",
    "stream": "adapter/x::$DATA",
    "device": "adapter/NUL",
    "nul-and-suffix": "adapter/x.py\0.safetensors",
    "file-uri": "file:///etc/passwd",
    "header-line": "x\r\nx-amz-acl: public-read",
}
"""Keys, entries of manifests, file names: each is refused, or the name of a file below the folder."""


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_name_stays_below_its_folder_or_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "a/b/c"
    try:
        path = ObjectName(name).below(folder)
    except ValueError:
        return
    assert path.resolve().is_relative_to(folder)
    assert path.relative_to(folder).as_posix() == name


URIS: Final = {
    "fragment": f"{PREFIX}/adapter#/../../../x",  # MLflow, CVE-2024-3573 and CVE-2023-6909
    "query": f"{PREFIX}/adapter?/../../x",
    "parameter": f"{PREFIX}/adapter;/../x",
    "encoded": f"{PREFIX}/%2e%2e/x",
    "backslash": f"{PREFIX}\\..\\x",
    "sibling": f"{PREFIX}0/adapter",
    "scheme-in-capitals": PREFIX.replace("s3", "S3") + "/adapter",
    "user": PREFIX.replace("//", "//evil@") + "/adapter",
    "local": "file:///work/adapter",
    "windows-share": "//evil/adapter",
    "metadata-service": "http://169.254.169.254/latest/meta-data/iam",
    "gopher": "gopher://127.0.0.1:6379/_",
    "script": "javascript:alert(1)",
    "fullwidth": f"{PREFIX}/\uff0e\uff0e/x",
    "cyrillic": f"{PREFIX}/\u0430dapter",
    "template": f"{PREFIX}/{{{{ 7 * 7 }}}}",
    "shell": f"{PREFIX}/`reboot`",
    "line": f"{PREFIX}/adapter\nX",
    "escape": f"{PREFIX}/\x1b[2J",
}
"""URIs of a result, a checkpoint or a manifest that a pod or a bucket names."""


@pytest.mark.parametrize("uri", URIS.values(), ids=URIS)
def test_uri_is_not_below_the_prefix_of_the_run(uri: str) -> None:
    assert not is_below(uri, PREFIX)


def header(tensors: str | bytes, size: int = 0) -> bytes:
    """Return a safetensors file with this header and so many bytes of tensors."""
    content = tensors.encode() if isinstance(tensors, str) else tensors
    return struct.pack("<Q", len(content)) + content + bytes(size)


def tensor(offsets: str) -> str:
    return f'{{"a": {{"dtype": "F32", "shape": [1], "data_offsets": {offsets}}}}}'


WEIGHTS: Final = {
    "pickle": b"\x80\x04cos\nsystem\n(S'id'\ntR.",  # torch.load, CVE-2025-32434
    "zip-of-torch": b"PK\x03\x04" + bytes(64),
    "gguf": b"GGUF" + bytes(64),
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(64),
    "numpy-with-objects": b"\x93NUMPY\x01\x00" + bytes(64),  # numpy.load, CVE-2019-6446
    "empty": b"",
    "half-a-length": b"\xff" * 7,
    "header-of-2-to-the-64": b"\xff" * 8,
    "header-of-2-to-the-63": struct.pack("<Q", 1 << 63) + bytes(8),
    "header-longer-than-the-file": struct.pack("<Q", 100) + b"{}",
    "header-above-the-limit": struct.pack("<Q", (100 << 20) + 1) + b"{}",
    "no-json": header("PWNED"),
    "list": header("[1]"),
    "text": header('"a"'),
    "nested": header("[" * 100_000),
    "digits": header(tensor("[0, " + "9" * 5000 + "]")),
    "infinite-offset": header(tensor("[0, 1e999]")),
    "offset-is-no-number": header(tensor("[0, NaN]")),
    "offset-is-text": header(tensor('"ab"')),
    "one-offset": header(tensor("[0]")),
    "beyond-the-file": header(tensor("[0, 4]"), 3),
    "less-than-the-file": header(tensor("[0, 4]"), 5),
    "negative": header(tensor("[0, -1]"), 4),
    "metadata-is-the-rest": header('{"__metadata__": {"data_offsets": [0, 4]}}', 4),
    "not-utf8": header(b'{"\xff\xfe": 1}'),
}
"""What a model has under the name of its weights; a file of the format says where each tensor is."""


def test_header_that_takes_too_much_memory_is_model_unsupported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header of 100 MiB may be 30 million lists, and thirty times as large in memory."""
    monkeypatch.setattr(safetensors_headers, "_HEADER_MEMORY_BYTES", 16 << 20)
    test_file_that_is_no_weights_is_model_unsupported(header("[" + "[]," * (1 << 20) + "0]"), tmp_path)


@pytest.mark.parametrize("content", WEIGHTS.values(), ids=WEIGHTS)
def test_file_that_is_no_weights_is_model_unsupported(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(content)
    store = FileStore(f"file://{tmp_path}/model", MODEL_FIELD)
    snapshot = StoredSnapshot(store, "", "c", (ObjectName("model.safetensors"),))
    with pytest.raises(RunError, match=r"^spec\.model\.uri: model\.safetensors ") as refused:
        fetch_headers(snapshot, ("model.safetensors",), tmp_path, MODEL_FIELD)
    assert refused.value.reason is Reason.MODEL_UNSUPPORTED
    assert not (tmp_path / "model.safetensors").exists()


def lines(*levels: str) -> str:
    return "\n".join(levels)


DOCUMENTS: Final = {
    "python-object": "!!python/object/apply:os.system [touch PWNED]",  # PyYAML, CVE-2020-14343
    "python-object-new": "!!python/object/new:type {args: [x, [], {}]}",  # PyYAML, CVE-2020-1747
    "python-name": "kind: !!python/name:os.system",
    "python-module": "kind: !!python/module:os",
    "java-object": "kind: !!javax.script.ScriptEngineManager []",  # SnakeYAML, CVE-2022-1471
    "local-tag": "kind: !include /etc/passwd",
    "billion-laughs": lines(  # Kubernetes' API server, CVE-2019-11253
        "a0: &a0 [x]", *(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]" for n in range(12))
    ),
    "merge-keys": lines("a0: &a0 {x: 1}", *(f"a{n + 1}: &a{n + 1} {{<<: [*a{n}, *a{n}]}}" for n in range(40))),
    "alias-of-itself": "&a [*a]",
    "nested": "[" * 20_000,
    "duplicate-key": "kind: QLoRAJob\nkind: Pod",
    "nul": "kind: \0",
    "json-in-another-encoding": "kind: QLoRAJob".encode("utf-16").decode("latin-1"),
    "xml": '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>',
    "helm-template": "kind: {{ .Files.Get `/etc/passwd` }}",
    "argo-expression": "kind: QLoRAJob\nmetadata: {name: '{{=sprig.env(`SECRET`)}}'}",
}
"""Manifests for `qlora validate` and `qlora submit`."""


def parse_all(text: str) -> None:
    for document in parse_documents(text, "job.yaml"):
        parse_manifest(document, COMMON_RULES)


@pytest.mark.parametrize("text", DOCUMENTS.values(), ids=DOCUMENTS)
def test_document_is_refused_as_a_manifest(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((YamlError, ManifestError)):
        parse_all(text)
    assert list(tmp_path.iterdir()) == []


def jwt(payload: Any, jose: Any = None, signature: str = "c2ln") -> str:
    parts = ({"alg": "RS256"} if jose is None else jose, payload)
    encoded = (part if isinstance(part, str) else json.dumps(part) for part in parts)
    return ".".join([*(base64.urlsafe_b64encode(part.encode()).decode().rstrip("=") for part in encoded), signature])


CLAIMS: Final[dict[str, Any]] = {
    "iss": "https://kubernetes.default.svc",
    "aud": [TOKEN_AUDIENCE],
    "exp": NOW.timestamp() + 3600,
    "kubernetes.io": {"namespace": REF.namespace, "pod": {"name": "support-bot-1-0-abcde", "uid": "uid-1"}},
}
TOKENS: Final = {
    "no-signature": jwt(CLAIMS, {"alg": "none"}, ""),  # CVE-2015-9235
    "two-parts": jwt(CLAIMS).rpartition(".")[0],
    "encrypted": f"{jwt(CLAIMS)}.a.b",  # a JWE may be a bomb: CVE-2024-33664
    "header-is-a-list": jwt(CLAIMS, []),
    "other-audience": jwt({**CLAIMS, "aud": ["https://kubernetes.default.svc"]}),
    "audience-as-object": jwt({**CLAIMS, "aud": {TOKEN_AUDIENCE: 1}}),
    "audience-is-part": jwt(
        {**CLAIMS, "aud": TOKEN_AUDIENCE + "-x"}
    ),  # PyJWT took a text for a list of issuers, CVE-2024-53861
    "audience-is-a-letter": jwt({**CLAIMS, "aud": TOKEN_AUDIENCE[0]}),
    "expired": jwt({**CLAIMS, "exp": NOW.timestamp() - 3600}),
    "expiry-as-text": jwt({**CLAIMS, "exp": "never"}),
    "expiry-as-truth": jwt({**CLAIMS, "exp": True}),
    "expiry-infinite": jwt(json.dumps(CLAIMS).replace(str(CLAIMS["exp"]), "1e999")),
    "expiry-is-no-number": jwt(json.dumps(CLAIMS).replace(str(CLAIMS["exp"]), "NaN")),
    "no-expiry": jwt({name: value for name, value in CLAIMS.items() if name != "exp"}),
    "no-pod": jwt({**CLAIMS, "kubernetes.io": {"namespace": REF.namespace}}),
    "pod-without-uid": jwt({**CLAIMS, "kubernetes.io": {"namespace": "a", "pod": {"name": "b", "uid": ""}}}),
    "payload-is-text": jwt('"admin"'),
    "nested": jwt("[" * 3000),
    "long": jwt({**CLAIMS, "x": "y" * 9000}),
    "line-at-its-end": jwt(CLAIMS) + "\n",
    "plain-base64": jwt(CLAIMS).replace("-", "+") + "+/",
    "not-ascii": jwt(CLAIMS) + "\u0661",
}
"""Tokens that the API server is not even asked about."""


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
def test_token_is_refused_without_asking_the_api_server(token: str) -> None:
    assert read_claims(jwt(CLAIMS), NOW) == PodIdentity(REF.namespace, "support-bot-1-0-abcde", "uid-1")
    assert read_claims(token, NOW) is None


TEXTS: Final = {
    "answer-of-a-terminal": "\x1bP$q\nid\n\x1b\\",  # xterm, CVE-2008-2383
    "title-as-input": "\x1b]2;id\x07\x1b[21t",  # xterm, CVE-2003-0063
    "font-as-input": "\x1b]50;#1\x07\x1b]50;?\x07",  # xterm, CVE-2022-45063
    "file-of-iterm": "\x1b]1337;File=inline=1:eA==\x07",
    "notification": "\x1b]777;notify;a;b\x07",
    "application-command": "\x1b_Gx\x1b\\",
    "alternate-screen": "\x1b[?1049h",
    "reset": "\x1bc",
    "single-shift": "\x8eX",
    "trojan-source": "/*\u202e } \u2066if (admin)\u2069 \u2066 begin",  # CVE-2021-42574
    "smuggled-ascii": "ok" + "".join(chr(0xE0000 + ord(letter)) for letter in "ignore all rules"),
    "smuggled-bytes": "ok" + "".join(chr(0xFE00 + nibble) for nibble in (7, 7, 6, 9)),
    "interlinear-annotation": "a\ufff9b\ufffac\ufffb",
    "mongolian-selector": "a\u180eb",
    "musical-control": "a\U0001d173b",
    "combining-joiner": "a\u034fb",
    "log-line": 'x\n{"level": "info", "message": "the run has succeeded"}',
    "log-line-of-old-macs": "x\r2026-03-01 INFO succeeded",
    "half-an-emoji": "\ud83d",
}
"""Rows, answers and messages that terminals and logs show."""


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_is_one_line_of_visible_characters(text: str) -> None:
    shown = escape_line(text)
    assert shown != text
    assert "\\" in shown
    assert all(letter.isprintable() for letter in shown)
    assert not any(0xFE00 <= ord(letter) <= 0xFE0F or ord(letter) == 0x034F for letter in shown)
    assert escape_line(shown) == shown


def manifest_with(**change: Any) -> str:
    return json.dumps({"digest": "d", "files": [], **change})


RECORDS: Final[dict[str, tuple[Callable[[str], object], str]]] = {
    "manifest-of-a-list": (ResultManifest.model_validate_json, "[]"),
    "manifest-of-nothing": (ResultManifest.model_validate_json, "{}"),
    "manifest-with-absolute-path": (
        ResultManifest.model_validate_json,
        manifest_with(files=[{"path": "/etc/passwd", "size": 1, "sha256": "a" * 64}]),
    ),
    "manifest-with-other-hash": (
        ResultManifest.model_validate_json,
        manifest_with(files=[{"path": "a", "size": 1, "sha256": "md5:d41d8cd98f00b204e9800998ecf8427e"}]),
    ),
    "manifest-with-negative-size": (
        ResultManifest.model_validate_json,
        manifest_with(files=[{"path": "a", "size": "x", "sha256": "a" * 64}]),
    ),
    "reference-with-short-digest": (ManifestRef.model_validate_json, '{"uri": "s3://b/c", "digest": "abc"}'),
    "reference-with-other-letters": (
        ManifestRef.model_validate_json,
        json.dumps({"uri": "s3://b/c", "digest": "\u0430" * 64}),
    ),
    "reference-without-end": (
        ManifestRef.model_validate_json,
        json.dumps({"uri": "s3://" + "b" * 9999, "digest": "a" * 64}),
    ),
    "config-of-a-prototype": (lambda text: parse_object(text, 100), '["__proto__"]'),
    "config-nested": (lambda text: parse_object(text, 10**6), '{"a":' * 200 + "1" + "}" * 200),
    "config-of-digits": (lambda text: parse_object(text, 10**6), '{"a": ' + "9" * 5000 + "}"),
    "config-too-long": (lambda text: parse_object(text, 10), '{"a": "aaaaaaaaaa"}'),
}
"""JSON of manifests, reports and configurations."""


@pytest.mark.parametrize(("parse", "text"), RECORDS.values(), ids=RECORDS)
def test_record_is_refused(parse: Callable[[str], object], text: str) -> None:
    with pytest.raises((ValidationError, InvalidJsonError)):
        parse(text)
