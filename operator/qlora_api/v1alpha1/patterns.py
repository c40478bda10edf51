r"""Patterns for the strings of a spec, each defined once for pydantic and for the API server.

Patterns use the common subset of Python's `re` and the API server's RE2: no look-ahead, no \d, no \p.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from qlora_api.accelerators import MIG_PREFIX, MIG_PROFILE
from qlora_api.escapes import INVISIBLE, JOINERS, escape_line

VALIDATIONS: Final = "x-kubernetes-validations"


@dataclass(frozen=True)
class CelRule:
    """A CEL rule on the annotated field, checked by the API server only."""

    expression: str
    message: str

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Add the rule to those of the field."""
        json_schema = handler(schema)
        return {**json_schema, VALIDATIONS: [*json_schema.get(VALIDATIONS, ()), self._to_dict()]}

    def _to_dict(self) -> dict[str, str]:
        return {"rule": self.expression, "message": self.message}


@dataclass(frozen=True)
class TextPattern:
    """A pattern that a string must match completely, or must not contain, and what to write instead."""

    pattern: str
    message: str
    forbidden: bool = False
    where: str = ""
    """Pattern of the strings that it is about; on others another rule says what is wrong, and one message is enough."""

    def matches(self, text: str) -> bool:
        """Return whether a string satisfies the pattern."""
        if self.where and re.search(self.where, text) is None:
            return True
        if self.forbidden:
            return re.search(self.pattern, text) is None
        return re.fullmatch(self.pattern, text) is not None

    @property
    def rule(self) -> CelRule:
        """Return the same check as a CEL rule."""
        if self.forbidden:
            condition = f"!self.matches({_to_cel(self.pattern)})"
        else:
            condition = f"self.matches({_to_cel(f'^(?:{self.pattern})$')})"
        guard = f"!self.matches({_to_cel(self.where)}) || " if self.where else ""
        return CelRule(f"{guard}{condition}", self.message)

    @property
    def rule_for_keys(self) -> CelRule:
        """Return the same check as a CEL rule on every key of a map."""
        return CelRule(f"self.all(key, {self.rule.expression.replace('self.', 'key.')})", self.message)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check the pattern in pydantic."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Check the pattern in the API server."""
        return self.rule.__get_pydantic_json_schema__(schema, handler)

    def _check(self, text: str) -> str:
        if not self.matches(text):
            raise ValueError(self.message)
        return text


@dataclass(frozen=True)
class PatternMessage:
    """Says in words what a field's pattern asks for: in the CRD a CEL rule with this message replaces the pattern."""

    message: str

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Replace the pattern by a CEL rule."""
        json_schema = dict(handler(schema))
        rule = {"rule": f"self.matches({_to_cel(json_schema.pop('pattern'))})", "message": self.message}
        return {**json_schema, VALIDATIONS: [rule, *json_schema.get(VALIDATIONS, ())]}


def _to_cel(text: str) -> str:
    """Return a CEL string: one of JSON is valid, but CEL has no surrogate pairs."""
    return escape_line(json.dumps(text, ensure_ascii=False))


def _any_of(patterns: Sequence[str]) -> str:
    return f"({'|'.join(patterns)})"


PRINTABLE: Final = TextPattern(
    f"[{INVISIBLE}{JOINERS}]",
    "it contains a control character or an invisible character; remove it",
    forbidden=True,
)

SUBDOMAIN: Final = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
"""A DNS-1123 subdomain: the name of a Secret, a ServiceAccount, a claim, a queue."""
_SEGMENT: Final = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
"""One segment of a repository name on the hub."""
_ON_THE_HUB: Final = "^hf://"
_IN_A_BUCKET: Final = "^s3://"
QUANTITY: Final = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"

NO_PATH_TRAVERSAL: Final = TextPattern(
    r"^(hf|s3|pvc)://(.*/)?\.\.?(/|$)",
    "its path contains a '.' or '..' segment; write the resolved path",
    forbidden=True,
)
BUCKET: Final = TextPattern(
    r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?",
    "write s3://bucket/key; a bucket has 3 to 63 lower-case letters, digits, dots and hyphens",
    where=_IN_A_BUCKET,
)
NO_IP_BUCKET: Final = TextPattern(
    r"^s3://([0-9]+(\.[0-9]+){3}|[^/]*\.\.[^/]*)(/|$)",
    "a bucket name must not be an IP address or contain two dots in a row; correct the bucket",
    forbidden=True,
)
HUB_MODEL: Final = TextPattern(
    f"hf://{_SEGMENT}/{_SEGMENT}",
    "write hf://organization/name; the revision goes into spec.model.revision",
    where=_ON_THE_HUB,
)
HUB_DATASET: Final = TextPattern(
    f"hf://datasets/{_SEGMENT}/{_SEGMENT}(@[A-Za-z0-9_][A-Za-z0-9._-]*)?/.*",
    "write hf://datasets/organization/name/file.jsonl, with @revision after the name if needed",
    where=_ON_THE_HUB,
)
CLAIM_NAME: Final = TextPattern(
    "^pvc://[^/]{254}",
    "the name of a PersistentVolumeClaim has at most 253 characters; correct the part before the first '/'",
    forbidden=True,
)
REVISION: Final = TextPattern(
    r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*", "write the name of a branch or tag, or a commit"
)

_OCTET: Final = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_HOST: Final = rf"(({_OCTET}\.){{3}}{_OCTET}|([A-Za-z0-9-]+\.)*[A-Za-z][A-Za-z0-9-]*)"
"""A host name, or an IPv4 address in dotted decimal; other notations of an address would bypass the lists below."""
_METADATA_SERVER_HOSTS: Final = (
    r"169\.254\.[0-9.]+",
    r"0\.[0-9.]+",
    r"100\.100\.100\.200",
    r"168\.63\.129\.16",
    r"metadata(\.google\.internal|\.goog)?",
    r"instance-data(\.ec2\.internal)?",
)
"""Cloud metadata services, which serve machine credentials, and link-local and unspecified addresses."""
SERVER_URL: Final = TextPattern(
    rf"https?://{_HOST}(:[0-9]{{1,5}})?(/[^?#]*)?",
    "write https://host/path: a name or an IPv4 address, no user, no password (they go into secretRef), no query",
)
NO_METADATA_SERVER: Final = TextPattern(
    rf"(?i)^https?://{_any_of(_METADATA_SERVER_HOSTS)}(:[0-9]*)?(/|$)",
    "this is a cloud metadata address, which hands out credentials; write the tracking server's host",
    forbidden=True,
)
NO_LOOPBACK: Final = TextPattern(
    r"(?i)^https?://(localhost|127\.[0-9.]+)(:[0-9]*)?(/|$)",
    "in a pod this is the pod itself; write a host that pods can reach",
    forbidden=True,
)
"""For clusters only: `qlora run` may report to a server on the local machine."""
LABEL: Final = TextPattern(
    "(([A-Za-z0-9][A-Za-z0-9_.-]*)?[A-Za-z0-9])?",
    "write a label value: letters, digits, '-', '_' and '.', with a letter or digit at both ends",
)
LABEL_KEY: Final = TextPattern(
    f"({SUBDOMAIN}/)?[A-Za-z0-9]([A-Za-z0-9_.-]{{0,61}}[A-Za-z0-9])?",
    "write a label key, such as topology.kubernetes.io/zone: at most 63 characters after the '/'",
)
LABEL_PREFIX: Final = TextPattern(
    "^[^/]{254}", "the prefix of a label key has at most 253 characters; shorten what is before the '/'", forbidden=True
)
GPU_RESOURCE: Final = TextPattern(
    f"nvidia[.]com/gpu|{re.escape(MIG_PREFIX)}{MIG_PROFILE}",
    "the trainer can use nvidia.com/gpu, and MIG partitions such as nvidia.com/mig-3g.40gb; write one of them",
)
CPU: Final = TextPattern(
    r"[0-9.]*[1-9][0-9.]*m?",
    "write a number of cores above 0, such as 2, or thousandths of a core, such as 500m",
    where=QUANTITY,
)
WHOLE_BYTES: Final = TextPattern(
    "m$",
    "m means thousandths of a byte; write a number and a unit, such as 512Mi or 16Gi",
    forbidden=True,
    where=QUANTITY,
)
NO_FILE_URI: Final = CelRule(
    "!self.startsWith('file://')", "file:// works with 'qlora run' only; upload it and use s3://"
)
"""For clusters only; the operator checks it in qlora_planner.validation."""
