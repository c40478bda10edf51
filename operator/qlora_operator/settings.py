"""Settings of the operator, from environment variables; no other module reads the environment."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from qlora_api import names
from qlora_api.gpu_prices import NO_PRICES, GpuPrices
from qlora_api.logs.formatters import FORMAT_ENV, Format
from qlora_api.pod_profile import DEFAULT_PROFILE, PodProfile
from qlora_api.runconfig import Platform, S3Config
from qlora_api.v1alpha1 import to_timedelta
from qlora_api.v1alpha1.types import Duration
from qlora_operator.models import Retention
from qlora_operator.resources import Installation

_DURATION: Final[TypeAdapter[str]] = TypeAdapter(Duration)
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
PULL_POLICIES: Final = ("Always", "IfNotPresent", "Never")
MAX_PORT: Final = 65_535
MAX_WORKERS: Final = 256
MAX_RESYNC: Final = 86_400
"""Seconds; a resync less often than daily would be of no use."""


class SettingsError(Exception):
    """An environment variable is missing or invalid; whoever installed the operator must change it."""


@dataclass(frozen=True)
class LeaderElectionSettings:
    """The namespace and pod of this replica, and the Lease of the election."""

    namespace: str
    pod: str
    lease: str

    @property
    def installation(self) -> str:
        """Return what all replicas of this installation have in common, and no other installation has."""
        return f"{self.namespace}/{self.lease}"


@dataclass(frozen=True)
class Settings:
    """Settings of one operator."""

    installation: Installation
    namespaces: tuple[str, ...] = ()
    """Empty means the whole cluster."""
    workers: int = 64
    """Concurrent reconciles; each mostly waits for the API server."""
    progress_port: int = 8080
    health_port: int = 8081
    log_level: str = "info"
    log_format: Format = Format.JSON
    kubeconfig: str = ""
    """Empty means the pod's service account."""
    resync: timedelta = timedelta(minutes=10)
    """Interval of the resync, which finds what lost events would have reported."""
    leader_election: LeaderElectionSettings | None = None
    """None outside a cluster, where there is only one replica."""
    gpu_prices: GpuPrices = NO_PRICES
    """Prices of a GPU-hour, recorded with each attempt."""


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Read every variable.

    Raises:
        SettingsError: A variable is missing or invalid; the message names it and the values it may have.

    """
    image = environment.get("QLORA_TRAINER_IMAGE", "")
    if not image:
        raise SettingsError("QLORA_TRAINER_IMAGE is not set: name the image of prepare and training pods")
    return Settings(
        installation=Installation(
            image=image,
            pull_policy=_choice(environment, "QLORA_IMAGE_PULL_POLICY", PULL_POLICIES, "IfNotPresent"),
            progress_url=environment.get("QLORA_PROGRESS_URL", ""),
            platform=_platform(environment),
            pull_secrets=_names(environment.get("QLORA_IMAGE_PULL_SECRETS", "")),
            retention=Retention(
                ttl=_duration(environment, "QLORA_TTL"), jobs=_duration(environment, "QLORA_RETENTION")
            ),
            pods=_pods(environment),
        ),
        namespaces=_names(environment.get("QLORA_NAMESPACES", "")),
        workers=_number(environment, "QLORA_WORKERS", 64, MAX_WORKERS),
        progress_port=_number(environment, "QLORA_PROGRESS_PORT", 8080, MAX_PORT),
        health_port=_number(environment, "QLORA_HEALTH_PORT", 8081, MAX_PORT),
        log_level=_choice(environment, "QLORA_LOG_LEVEL", LOG_LEVELS, "info"),
        log_format=Format(_choice(environment, FORMAT_ENV, tuple(Format), Format.JSON)),
        kubeconfig=environment.get("KUBECONFIG", ""),
        resync=timedelta(seconds=_number(environment, "QLORA_RESYNC_SECONDS", 600, MAX_RESYNC)),
        gpu_prices=_gpu_prices(environment),
        leader_election=_leader_election(environment),
    )


def _leader_election(environment: Mapping[str, str]) -> LeaderElectionSettings | None:
    namespace, pod = environment.get("POD_NAMESPACE", ""), environment.get("POD_NAME", "")
    if not namespace:
        return None
    if not pod:
        raise SettingsError("POD_NAME is not set, but POD_NAMESPACE is: leader election needs the names of both")
    return LeaderElectionSettings(namespace, pod, environment.get("QLORA_LEASE") or names.FIELD_MANAGER)


def _platform(environment: Mapping[str, str]) -> Platform:
    s3 = {
        "endpoint": environment.get("QLORA_S3_ENDPOINT") or None,
        "region": environment.get("QLORA_S3_REGION") or None,
        "addressing": environment.get("QLORA_S3_ADDRESSING") or "auto",
        "checksums": environment.get("QLORA_S3_CHECKSUMS") or "when_supported",
    }
    try:
        config = S3Config.model_validate(s3)
    except ValidationError as error:
        first = error.errors()[0]
        raise SettingsError(f"QLORA_S3_{str(first['loc'][0]).upper()}: {first['msg']}") from error
    return Platform(
        s3=config,
        hub_endpoint=environment.get("QLORA_HUB_ENDPOINT") or None,
        hub_mirror=environment.get("QLORA_HUB_MIRROR") or None,
    )


def _gpu_prices(environment: Mapping[str, str]) -> GpuPrices:
    text = environment.get("QLORA_GPU_PRICES")
    try:
        return GpuPrices.model_validate_json(text) if text else NO_PRICES
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "value"
        raise SettingsError(f"QLORA_GPU_PRICES: {field}: {first['msg']}") from error


def _pods(environment: Mapping[str, str]) -> PodProfile:
    """Read the settings of the pods of runs; the chart writes those that were left out as empty."""
    text = environment.get("QLORA_PODS")
    try:
        # Helm writes null for values that were set to null, or kept from a chart without them.
        return PodProfile.model_validate_json(text) if text and text != "null" else DEFAULT_PROFILE
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(("pods", *map(str, first["loc"])))
        raise SettingsError(f"QLORA_PODS: {field}: {_cause_and_fix(first)}") from error


def _cause_and_fix(error: ErrorDetails) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown, or set by the operator itself; remove it, the chart's values.yaml has the known fields"
    return error["msg"].removeprefix("Value error, ")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for part in text.split(",") if (name := part.strip()))


def _number(environment: Mapping[str, str], name: str, default: int, maximum: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal() or not 1 <= int(text) <= maximum:
        raise SettingsError(f"{name} is {text!r}: write a number from 1 to {maximum}")
    return int(text)


def _duration(environment: Mapping[str, str], name: str) -> timedelta | None:
    text = environment.get(name) or None
    try:
        return to_timedelta(_DURATION.validate_python(text)) if text else None
    except ValidationError as error:
        raise SettingsError(f"{name} is {text!r}: write a number and one unit: 12h or 30d") from error


def _choice(environment: Mapping[str, str], name: str, choices: tuple[str, ...], default: str) -> str:
    text = environment.get(name) or default
    if text not in choices:
        raise SettingsError(f"{name} is {text!r}: write one of {', '.join(choices)}")
    return text
