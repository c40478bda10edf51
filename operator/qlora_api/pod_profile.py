"""What an installation sets in the pods of runs, in the words of core/v1: the chart's `pods`.

What the operator itself sets has no field here, or a name that is refused: the pod of a run would not work without it.
"""

from collections.abc import Iterator
from ipaddress import ip_address
from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from qlora_api.base import ApiModel
from qlora_api.pod_names import (
    Annotations,
    LabelKey,
    Labels,
    LabelValue,
    MountPath,
    Name,
    NodeSelector,
    Object,
    OptionalName,
    VariableName,
    VolumeName,
)
from qlora_api.v1alpha1 import Toleration

MAX_NAMESERVERS: Final = 3
MAX_SEARCHES: Final = 32
"""What Kubernetes allows in dnsConfig (pkg/apis/core/validation)."""
_URL: Final = r"^(https?://[^\s/]+.*)?$"


def _check_address(text: str) -> str:
    try:
        return str(ip_address(text))
    except ValueError as error:
        raise ValueError(f"{text!r} is no IP address; write one") from error


IpAddress = Annotated[str, AfterValidator(_check_address)]


class LocalObjectReference(ApiModel):
    """An object of the namespace of the run."""

    name: Name


class KeySelector(ApiModel):
    """A key of a ConfigMap or Secret of the namespace of the run."""

    name: Name
    key: str = Field(min_length=1)
    optional: bool = False


class FieldSelector(ApiModel):
    """A field of the pod."""

    field_path: str = Field(min_length=1)


class EnvironmentSource(ApiModel):
    """Where the value of a variable is from: one of three."""

    config_map_key_ref: KeySelector | None = None
    secret_key_ref: KeySelector | None = None
    field_ref: FieldSelector | None = None

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("valueFrom has not exactly one source; write one, such as configMapKeyRef")
        return self


class EnvironmentVariable(ApiModel):
    """A variable of the trainer's container."""

    name: VariableName
    value: str | None = None
    value_from: EnvironmentSource | None = None

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.value is not None and self.value_from:
            raise ValueError(f"{self.name} has value and valueFrom; remove one")
        return self


class PodToleration(Toleration):
    """A toleration as in a spec, where the API server checks the texts and how the fields go together."""

    key: LabelKey | None = None
    value: LabelValue | None = None

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        if self.operator == "Exists" and self.value:
            raise ValueError("operator Exists matches every value; remove value, or write operator Equal")
        if self.operator == "Equal" and not self.key:
            raise ValueError("operator Equal needs a key; add it, or write operator Exists for all taints")
        if self.toleration_seconds is not None and self.effect != "NoExecute":
            raise ValueError("tolerationSeconds is for evictions; write effect NoExecute, or remove tolerationSeconds")
        return self


class HostAlias(ApiModel):
    """A line of /etc/hosts."""

    ip: IpAddress
    hostnames: tuple[str, ...] = Field(min_length=1)


class DnsOption(ApiModel):
    """An option of the resolver."""

    name: str = Field(min_length=1)
    value: str | None = None


class DnsConfig(ApiModel):
    """Settings of the resolver, in addition to those of dnsPolicy."""

    nameservers: tuple[IpAddress, ...] = Field(default=(), max_length=MAX_NAMESERVERS)
    searches: tuple[str, ...] = Field(default=(), max_length=MAX_SEARCHES)
    options: tuple[DnsOption, ...] = ()


class Volume(ApiModel):
    """A volume of the pod; its source is as in core/v1, and the pod must be admitted with it."""

    name: VolumeName
    config_map: Object | None = None
    secret: Object | None = None
    projected: Object | None = None
    downward_api: Annotated[Object | None, Field(alias="downwardAPI")] = None
    persistent_volume_claim: Object | None = None
    empty_dir: Object | None = None
    ephemeral: Object | None = None
    nfs: Object | None = None
    csi: Object | None = None
    image: Object | None = None
    host_path: Object | None = None

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if len(self.model_dump(exclude_none=True)) != 2:
            raise ValueError(f"the volume {self.name!r} has not exactly one source; write one, such as configMap")
        return self


class VolumeMount(ApiModel):
    """Where the trainer's container has a volume."""

    name: str = Field(min_length=1)
    mount_path: MountPath
    sub_path: str | None = None
    read_only: bool = True


class PodSecurityContext(ApiModel):
    """The pod's security context; a field that is left out is for the platform to choose."""

    run_as_non_root: bool | None = None
    run_as_user: int | None = Field(default=None, ge=1)
    run_as_group: int | None = Field(default=None, ge=0)
    fs_group: int | None = Field(default=None, ge=0)
    fs_group_change_policy: Literal["Always", "OnRootMismatch"] | None = None
    supplemental_groups: tuple[int, ...] | None = None
    seccomp_profile: Object | None = None
    se_linux_options: Object | None = None
    app_armor_profile: Object | None = None


class PodSettings(ApiModel):
    """Fields of the pods of runs."""

    labels: Labels = Field(default_factory=dict)
    annotations: Annotations = Field(default_factory=dict)
    node_selector: NodeSelector = Field(default_factory=dict)
    tolerations: tuple[PodToleration, ...] = ()
    priority_class_name: OptionalName = ""
    runtime_class_name: OptionalName = ""
    scheduler_name: OptionalName = ""
    image_pull_secrets: tuple[LocalObjectReference, ...] = ()
    host_aliases: tuple[HostAlias, ...] = ()
    dns_policy: Literal["", "ClusterFirst", "Default", "None"] = ""
    dns_config: DnsConfig = DnsConfig()
    env: tuple[EnvironmentVariable, ...] = ()
    volumes: tuple[Volume, ...] = ()
    volume_mounts: tuple[VolumeMount, ...] = ()
    security_context: PodSecurityContext = PodSecurityContext()

    @model_validator(mode="after")
    def _check_duplicates(self) -> Self:
        for field, keys in self._keys():
            if repeated := [key for key in keys if keys.count(key) > 1]:
                raise ValueError(f"{field}: {repeated[0]!r} occurs twice; remove one")
        return self

    @model_validator(mode="after")
    def _check_dns(self) -> Self:
        if self.dns_policy == "None" and not self.dns_config.nameservers:
            raise ValueError("dnsPolicy None leaves the pods without DNS; add dnsConfig.nameservers beside it")
        return self

    def _keys(self) -> Iterator[tuple[str, list[str]]]:
        yield "env", [variable.name for variable in self.env]
        yield "volumes", [volume.name for volume in self.volumes]
        yield "volumeMounts", [mount.mount_path for mount in self.volume_mounts]
        yield "hostAliases", [alias.ip for alias in self.host_aliases]
        yield "imagePullSecrets", [secret.name for secret in self.image_pull_secrets]


class Proxy(ApiModel):
    """The proxy of everything that leaves the cluster."""

    http: Annotated[str, Field(pattern=_URL)] = ""
    https: Annotated[str, Field(pattern=_URL)] = ""
    no_proxy: tuple[str, ...] = ()
    """In addition to what is in the cluster."""


class CaBundle(ApiModel):
    """The certificates that all clients of the trainer trust, instead of those of the image."""

    config_map: OptionalName = ""
    secret: OptionalName = ""
    key: Annotated[str, Field(pattern=r"^[-A-Za-z0-9_.]+$")] = "ca.crt"

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.config_map and self.secret:
            raise ValueError("configMap and secret are both set; remove one")
        return self


class PodProfile(PodSettings):
    """What an installation sets in all pods of runs, and in addition in those of preparation and of training."""

    proxy: Proxy = Proxy()
    ca_bundle: CaBundle = CaBundle()
    prepare: PodSettings = PodSettings()
    train: PodSettings = PodSettings()

    @model_validator(mode="after")
    def _check_mounts(self) -> Self:
        """Refuse a mount of no volume: the API server would, run after run."""
        for section in (self.prepare, self.train):
            known = {volume.name for volume in (*self.volumes, *section.volumes)}
            for mount in (*self.volume_mounts, *section.volume_mounts):
                if mount.name not in known:
                    raise ValueError(f"volumeMounts: {mount.name!r} is no volume of the pod; add it to volumes")
        return self


IMAGE_USER: Final = 65532
"""User and group of the images."""
DEFAULT_PROFILE: Final = PodProfile(
    security_context=PodSecurityContext(
        run_as_non_root=True,
        run_as_user=IMAGE_USER,
        run_as_group=IMAGE_USER,
        fs_group=IMAGE_USER,
        seccomp_profile={"type": "RuntimeDefault"},
    )
)
"""The default of the chart's `pods`."""
