"""What an installation sets in the pods of runs, in the words of core/v1: the chart's `pods`.

What the operator itself sets has no field here, or a name that is refused: the pod of a run would not work without it.
"""

from collections.abc import Iterator
from ipaddress import ip_address
from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from qlora_api.base import ApiModel
from qlora_api.pod_names import (
    MAX_ENTRIES,
    MAX_TEXT,
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


IpAddress = Annotated[str, Field(max_length=45), AfterValidator(_check_address)]
_Text = Annotated[str, Field(max_length=MAX_TEXT)]
_Key = Annotated[str, Field(min_length=1, max_length=253)]


class LocalObjectReference(ApiModel):
    """An object of the namespace of the run."""

    name: Name = Field(description="Name of the Secret.")


class KeySelector(ApiModel):
    """A key of a ConfigMap or Secret of the namespace of the run."""

    name: Name = Field(description="Name of the ConfigMap or Secret.")
    key: _Key = Field(description="One of its keys.")
    optional: bool = Field(default=False, description="Whether the pod starts without it.")


class FieldSelector(ApiModel):
    """A field of the pod."""

    field_path: _Key = Field(description="Path of the field, such as spec.nodeName.")


class EnvironmentSource(ApiModel):
    """Where the value of a variable is from: one of three."""

    config_map_key_ref: KeySelector | None = Field(default=None, description="A key of a ConfigMap.")
    secret_key_ref: KeySelector | None = Field(default=None, description="A key of a Secret.")
    field_ref: FieldSelector | None = Field(default=None, description="A field of the pod.")

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("valueFrom has not exactly one source; write one, such as configMapKeyRef")
        return self


class EnvironmentVariable(ApiModel):
    """A variable of the trainer's container."""

    name: VariableName = Field(description="Name of the variable.")
    value: _Text | None = Field(default=None, description="Its value.")
    value_from: EnvironmentSource | None = Field(default=None, description="Where its value is from.")

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.value is not None and self.value_from:
            raise ValueError(f"{self.name} has value and valueFrom; remove one")
        return self


class PodToleration(Toleration):
    """A toleration as in a spec, where the API server checks the texts and how the fields go together."""

    key: LabelKey | None = Field(default=None, description="Taint key; absent with operator Exists: all taints.")
    value: LabelValue | None = Field(default=None, description="Taint value.")

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

    ip: IpAddress = Field(description="Address.")
    hostnames: tuple[_Key, ...] = Field(min_length=1, max_length=MAX_ENTRIES, description="Names of the address.")


class DnsOption(ApiModel):
    """An option of the resolver."""

    name: _Key = Field(description="Name of the option, such as ndots.")
    value: Annotated[str, Field(max_length=253)] | None = Field(default=None, description="Its value.")


class DnsConfig(ApiModel):
    """Settings of the resolver, in addition to those of dnsPolicy."""

    nameservers: tuple[IpAddress, ...] = Field(
        default=(), max_length=MAX_NAMESERVERS, description="Addresses of DNS servers."
    )
    searches: tuple[_Key, ...] = Field(default=(), max_length=MAX_SEARCHES, description="Search domains.")
    options: tuple[DnsOption, ...] = Field(default=(), max_length=MAX_ENTRIES, description="Options of the resolver.")


class Volume(ApiModel):
    """A volume of the pod; its source is as in core/v1, and the pod must be admitted with it."""

    name: VolumeName = Field(description="Name of the volume.")
    config_map: Object | None = Field(default=None, description="A ConfigMap.")
    secret: Object | None = Field(default=None, description="A Secret.")
    projected: Object | None = Field(default=None, description="Several sources in one folder.")
    downward_api: Object | None = Field(default=None, alias="downwardAPI", description="Fields of the pod.")
    persistent_volume_claim: Object | None = Field(default=None, description="A PersistentVolumeClaim.")
    empty_dir: Object | None = Field(default=None, description="An empty folder of the pod.")
    ephemeral: Object | None = Field(default=None, description="A claim of the pod.")
    nfs: Object | None = Field(default=None, description="An NFS export.")
    csi: Object | None = Field(default=None, description="A volume of a CSI driver.")
    image: Object | None = Field(default=None, description="An OCI image.")
    host_path: Object | None = Field(default=None, description="A folder of the node.")

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if len(self.model_dump(exclude_none=True)) != 2:
            raise ValueError(f"the volume {self.name!r} has not exactly one source; write one, such as configMap")
        return self


class VolumeMount(ApiModel):
    """Where the trainer's container has a volume."""

    name: _Key = Field(description="Name of the volume.")
    mount_path: MountPath = Field(description="Where it is mounted.")
    sub_path: Annotated[str, Field(max_length=1024)] | None = Field(
        default=None, description="Path within the volume; absent: all of it."
    )
    read_only: bool = Field(default=True, description="Whether it cannot be written to.")


class PodSecurityContext(ApiModel):
    """The pod's security context; a field that is left out is for the platform to choose."""

    run_as_non_root: bool | None = Field(default=None, description="Whether the kubelet refuses to run it as root.")
    run_as_user: int | None = Field(default=None, ge=1, description="User id.")
    run_as_group: int | None = Field(default=None, ge=0, description="Group id.")
    fs_group: int | None = Field(default=None, ge=0, description="Group that owns the volumes.")
    fs_group_change_policy: Literal["Always", "OnRootMismatch"] | None = Field(
        default=None, description="When the owner of the files of a volume is changed."
    )
    supplemental_groups: Annotated[tuple[int, ...], Field(max_length=MAX_ENTRIES)] | None = Field(
        default=None, description="Further group ids, such as of a share."
    )
    seccomp_profile: Object | None = Field(default=None, description="The seccomp profile.")
    se_linux_options: Object | None = Field(default=None, description="The SELinux context.")
    app_armor_profile: Object | None = Field(default=None, description="The AppArmor profile.")


class PodSettings(ApiModel):
    """Fields of the pods of runs."""

    labels: Labels = Field(default_factory=dict, description="Labels of the pods.")
    annotations: Annotations = Field(default_factory=dict, description="Annotations of the pods.")
    node_selector: NodeSelector = Field(
        default_factory=dict, description="Labels of the nodes; those of spec.resources replace them in training pods."
    )
    tolerations: tuple[PodToleration, ...] = Field(
        default=(), max_length=MAX_ENTRIES, description="Taints that the pods tolerate, besides those of the operator."
    )
    priority_class_name: OptionalName = Field(default="", description="The PriorityClass.")
    runtime_class_name: OptionalName = Field(default="", description="The RuntimeClass, such as nvidia.")
    scheduler_name: OptionalName = Field(default="", description="The scheduler, such as volcano.")
    image_pull_secrets: tuple[LocalObjectReference, ...] = Field(
        default=(), max_length=MAX_ENTRIES, description="Secrets of the run's namespace to pull the image with."
    )
    host_aliases: tuple[HostAlias, ...] = Field(
        default=(), max_length=MAX_ENTRIES, description="Lines of /etc/hosts, for names that DNS lacks."
    )
    dns_policy: Literal["", "ClusterFirst", "Default", "None"] = Field(
        default="", description="DNS of the cluster, of the node, or only that of dnsConfig."
    )
    dns_config: DnsConfig = Field(default=DnsConfig(), description="Settings of the resolver, besides dnsPolicy.")
    env: tuple[EnvironmentVariable, ...] = Field(
        default=(), max_length=MAX_ENTRIES, description="Variables of the trainer's container."
    )
    volumes: tuple[Volume, ...] = Field(
        default=(), max_length=MAX_ENTRIES, description="Volumes of the pods, in the words of core/v1."
    )
    volume_mounts: tuple[VolumeMount, ...] = Field(
        default=(), max_length=MAX_ENTRIES, description="Where the trainer's container has them."
    )
    security_context: PodSecurityContext = Field(
        default=PodSecurityContext(), description="The pods' security context."
    )

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

    http: Annotated[str, Field(pattern=_URL, max_length=1024)] = Field(default="", description="HTTP_PROXY.")
    https: Annotated[str, Field(pattern=_URL, max_length=1024)] = Field(default="", description="HTTPS_PROXY.")
    no_proxy: tuple[_Key, ...] = Field(
        default=(), max_length=256, description="Hosts that need no proxy, in addition to those of the cluster."
    )


class CaBundle(ApiModel):
    """The certificates that all clients of the trainer trust, instead of those of the image."""

    config_map: OptionalName = Field(default="", description="A ConfigMap of the run's namespace.")
    secret: OptionalName = Field(default="", description="Or a Secret.")
    key: Annotated[str, Field(pattern=r"^[-A-Za-z0-9_.]+$", max_length=253)] = Field(
        default="ca.crt", description="The key with the certificates."
    )

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.config_map and self.secret:
            raise ValueError("configMap and secret are both set; remove one")
        return self


class PodProfile(PodSettings):
    """What an installation sets in all pods of runs, and in addition in those of preparation and of training."""

    proxy: Proxy = Field(default=Proxy(), description="The proxy of everything that leaves the cluster.")
    ca_bundle: CaBundle = Field(default=CaBundle(), description="Certificates to trust instead of the image's.")
    prepare: PodSettings = Field(default=PodSettings(), description="In addition, in pods of preparation.")
    train: PodSettings = Field(default=PodSettings(), description="In addition, in training pods.")

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
