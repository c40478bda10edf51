"""Names that an installation may set in the pods of runs, and those that are refused since the pods need them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import AfterValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from qlora_api import names
from qlora_api.v1alpha1.patterns import VALIDATIONS

RESERVED_ENVIRONMENT: Final = (
    "^(HOME|HF_HOME|XDG_CACHE_HOME|MPLCONFIGDIR|TRITON_CACHE_DIR|TMPDIR|AWS_CONFIG_FILE|AWS_SHARED_CREDENTIALS_FILE|"
    "HF_TOKEN_PATH|NETRC|USE_HUB_KERNELS|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|"
    "JOB_COMPLETION_INDEX|PATH|PYTHON.*|LD_.*|ACCELERATE_.*|QLORA_.*|KUBEFLOW_TRAINER_.*)$"
)
"""What the operator, the controller of Jobs, the launcher and the image set, or what changes the trainer's code."""
CA_VARIABLES: Final = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE")
"""Where boto3, requests, OpenSSL (httpx of the hub's client, urllib) and curl read the path of their CA bundle."""
PROXY_VARIABLES: Final = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
"""Set from `pods.proxy`, in upper and lower case."""
_PROXY_SPELLINGS: Final = "|".join(name for upper in ("ALL_PROXY", *PROXY_VARIABLES) for name in (upper, upper.lower()))
_DEDICATED: Final = f"^({'|'.join(CA_VARIABLES)}|{_PROXY_SPELLINGS})$"
RESERVED_LABELS: Final = (
    r"^(([a-z0-9.-]+\.)?qlora\.dev/.*|app\.kubernetes\.io/managed-by|batch\.kubernetes\.io/.*|job-name|controller-uid|"
    r"kueue\.x-k8s\.io/.*)$"
)
"""The operator finds its pods by its own, the Job controller by its own, and Kueue would admit the pods by its own."""
RESERVED_ANNOTATIONS: Final = r"^(([a-z0-9.-]+\.)?qlora\.dev/.*|batch\.kubernetes\.io/.*)$"
"""Those of the operator and of the Job controller."""
CA_VOLUME: Final = "ca-bundle"
CA_MOUNT: Final = "/etc/qlora-ca"
"""Where the CA bundle is mounted, read-only."""
RESERVED_VOLUMES: Final = f"^(config|work|tmp|token|shm|{CA_VOLUME}|secret-.*|claim-.*)$"
RESERVED_PATHS: Final = (
    f"^/?$|^({names.CONFIG_MOUNT}|{CA_MOUNT}|{names.WORK_MOUNT}|/tmp|/dev|/proc|/sys|/var/run/qlora|/run/qlora|"
    "/opt/qlora|/opt/qlora-operator)(/.*)?$"
    r"|^(/etc|/opt|/run|/var|/var/run|/usr|/bin|/lib|/lib64|/sbin)/?$|/\.\.?(/|$)|//"
)
"""Mounts of the operator and of the runtime, the code of the images, the folders that contain those, and ways around:
'.', '..' and '//'."""

_NAME: Final = r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"
_OPTIONAL_NAME: Final = r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?)?$"
_LABEL_KEY: Final = r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
MAX_TEXT: Final = 32_768
"""Characters of a text that Kubernetes does not bound, such as the value of a variable."""
MAX_ENTRIES: Final = 64
"""Entries of a list or mapping."""
MAX_LABEL_KEY: Final = 317
"""Characters of a label key: a prefix of 253, '/' and 63."""
_LABEL_VALUE: Final = r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"


@dataclass(frozen=True)
class _Text:
    """Checks a text by a pattern, and by one that is refused: in Python, and in JSON Schema for the chart."""

    pattern: str
    fix: str
    refused: str = ""
    cause: str = ""
    """Why what matches `refused` is refused, and what to do."""
    longest: int = 253
    """Most characters, which the patterns of most texts imply."""

    def check(self, text: str) -> str:
        """Return the text; ValueError with cause and fix if it is refused."""
        if len(text) > self.longest or not re.fullmatch(self.pattern, text):
            raise ValueError(f"{text!r} does not match {self.pattern}; {self.fix}")
        if self.refused and re.search(self.refused, text):
            raise ValueError(f"{text!r} {self.cause}")
        return text

    def schema(self) -> dict[str, Any]:
        """Return the same as JSON Schema."""
        return {"type": "string", "pattern": self.pattern, "maxLength": self.longest} | (
            {"not": {"pattern": self.refused}} if self.refused else {}
        )

    def rules(self, variable: str = "self") -> list[dict[str, str]]:
        """Return what is refused as CEL rules for a CRD, which has no `not`."""
        if not self.refused:
            return []
        subject = "it" if variable == "self" else f"a {variable}"
        return [{"rule": f"!{variable}.matches({json.dumps(self.refused)})", "message": f"{subject} {self.cause}"}]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check it after pydantic has checked the type."""
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Add the patterns."""
        return handler(schema) | self.schema() | ({VALIDATIONS: rules} if (rules := self.rules()) else {})


@dataclass(frozen=True)
class _Map:
    """Checks the keys and values of a mapping."""

    key: _Text
    value: _Text | None = None

    def check(self, mapping: Mapping[str, str]) -> Mapping[str, str]:
        """Return the mapping; ValueError if a key or value is refused."""
        for key, value in mapping.items():
            self.key.check(key)
            if self.value:
                self.value.check(value)
        return mapping

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check it after pydantic has checked the type."""
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Add the patterns; not as propertyNames, for which Helm names a wrong value."""
        values = self.value.schema() if self.value else {"type": "string", "maxLength": MAX_TEXT}
        refused = {self.key.refused: False} if self.key.refused else {}
        valid = {"rule": f"self.all(key, key.matches({json.dumps(self.key.pattern)}))", "message": self.key.fix}
        rules = [rule | {"rule": f"self.all(key, {rule['rule']})"} for rule in self.key.rules("key")]
        return handler(schema) | {
            "patternProperties": {self.key.pattern: values} | refused,
            "additionalProperties": False,
            VALIDATIONS: [valid, *rules],
        }


_OURS: Final = "is set by the operator or the controller of Jobs; remove it"
_KEY_FIX: Final = "write name or prefix/name"
_VALUE: Final = _Text(_LABEL_VALUE, "write at most 63 letters, digits, '-', '_' or '.'", longest=63)
Name = Annotated[str, _Text(_NAME, "write the name of a Kubernetes object")]
OptionalName = Annotated[str, _Text(_OPTIONAL_NAME, "write the name of a Kubernetes object, or nothing")]
_Mapping = Annotated[dict[str, str], Field(max_length=MAX_ENTRIES)]
Labels = Annotated[_Mapping, _Map(_Text(_LABEL_KEY, _KEY_FIX, RESERVED_LABELS, _OURS, MAX_LABEL_KEY), _VALUE)]
Annotations = Annotated[_Mapping, _Map(_Text(_LABEL_KEY, _KEY_FIX, RESERVED_ANNOTATIONS, _OURS, MAX_LABEL_KEY))]
NodeSelector = Annotated[_Mapping, _Map(_Text(_LABEL_KEY, _KEY_FIX, longest=MAX_LABEL_KEY), _VALUE)]
VariableName = Annotated[
    str,
    _Text(
        r"^[A-Za-z_][A-Za-z0-9_]*$",
        "write letters, digits and '_'",
        f"{RESERVED_ENVIRONMENT}|{_DEDICATED}",
        "is set by the operator, the controller of Jobs, the launcher or the image; remove it, or set "
        "pods.proxy or pods.caBundle if it is about those",
    ),
]
VolumeName = Annotated[
    str,
    _Text(
        r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$",
        "write lower-case letters, digits and '-'",
        RESERVED_VOLUMES,
        "is a volume of the operator; choose another name",
        longest=63,
    ),
]
MountPath = Annotated[
    str,
    _Text(
        "^/.*$",
        "write an absolute path",
        RESERVED_PATHS,
        "covers a folder that the pod needs; choose another path",
        longest=1024,
    ),
    AfterValidator(lambda path: path.rstrip("/")),
]
LabelKey = Annotated[str, _Text(_LABEL_KEY, _KEY_FIX, longest=MAX_LABEL_KEY)]
LabelValue = Annotated[str, _VALUE]
Object = Mapping[str, Any]
"""A part of core/v1 that the API server checks when the Job is created."""
