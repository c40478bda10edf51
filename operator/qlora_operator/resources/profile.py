"""Adds what the installation sets to the pod of a run; what the operator sets takes precedence."""

from collections.abc import Iterable, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from qlora_api.names import MAIN_ADDRESS_ENV, PROGRESS_URL_ENV, Role
from qlora_api.pod_names import CA_MOUNT, CA_VARIABLES, CA_VOLUME
from qlora_api.pod_profile import CaBundle, PodProfile, PodSettings, Proxy
from qlora_api.v1alpha1 import Toleration
from qlora_operator.models import Manifest

_LIST_KEYS: Final = {
    "imagePullSecrets": "name", "hostAliases": "ip", "env": "name", "volumes": "name", "volumeMounts": "mountPath",
}  # fmt: skip
"""Lists of which an entry replaces an earlier one with the same key, as in core/v1's strategic merge."""
_INSTALLATION_ONLY: Final = (
    "priorityClassName", "runtimeClassName", "schedulerName", "dnsPolicy", "hostAliases", "dnsConfig",
    "securityContext",
)  # fmt: skip
"""Fields that only the installation sets."""
_CLUSTER_NAMES: Final = (
    "localhost", "127.0.0.1", "::1", ".svc", ".cluster.local", "169.254.169.254", "metadata.google.internal",
)  # fmt: skip
"""What no proxy is asked for: the pod itself, Services, and the node's metadata, from which roles have credentials."""


def apply_profile(template: Manifest, profile: PodProfile, role: Role) -> Manifest:
    """Return a pod template with the settings of its installation.

    The operator's labels, variables, volumes, mounts and node labels, and those of the run's spec, take precedence.
    """
    settings = merge_settings(profile, profile.prepare if role is Role.PREPARE else profile.train)
    pod, metadata = template["spec"], template["metadata"]
    [container] = pod["containers"]
    container = container | {
        "env": _env(settings, profile, container["env"]),
        "volumeMounts": [*container["volumeMounts"], *settings.get("volumeMounts", []), *_ca_mounts(profile.ca_bundle)],
    }
    return template | {
        "metadata": metadata
        | {"labels": {**settings.get("labels", {}), **metadata["labels"]}}
        | ({"annotations": settings["annotations"]} if settings.get("annotations") else {}),
        "spec": pod | _pod_fields(settings, profile, pod) | {"containers": [container]},
    }


def training_placement(profile: PodProfile) -> tuple[Mapping[str, str], tuple[Toleration, ...]]:
    """Return the node labels and the tolerations that an installation gives to training pods."""
    train = profile.train
    return {**profile.node_selector, **train.node_selector}, (*profile.tolerations, *train.tolerations)


def merge_profiles(installation: PodProfile, added: PodProfile) -> PodProfile:
    """Return the settings of an installation with those of a class, which override them.

    Raises:
        ValueError: Each is valid, but not both together.

    """
    if added == PodProfile():
        return installation
    bundle = added.ca_bundle
    return PodProfile(
        proxy=_merge_proxies(installation.proxy, added.proxy),
        ca_bundle=bundle if bundle.config_map or bundle.secret else installation.ca_bundle,
        prepare=_merge_layers(installation, installation.prepare, added, added.prepare),
        train=_merge_layers(installation, installation.train, added, added.train),
    )


def _merge_proxies(installation: Proxy, added: Proxy) -> Proxy:
    return Proxy(
        http=added.http or installation.http,
        https=added.https or installation.https,
        no_proxy=tuple(dict.fromkeys((*installation.no_proxy, *added.no_proxy))),
    )


def _merge_layers(*layers: PodSettings) -> PodSettings:
    return PodSettings.model_validate(merge_settings(*layers))


def merge_settings(*layers: PodSettings) -> dict[str, Any]:
    """Return the fields of a pod; a later layer adds to mappings and lists, and overrides other values."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in _fields(layer).items():
            if isinstance(value, dict) and key != "dnsConfig":
                merged[key] = merged.get(key, {}) | value
            elif isinstance(value, list):
                merged[key] = _merge_lists([*merged.get(key, []), *value], _LIST_KEYS.get(key))
            else:
                merged[key] = value
    return merged


def _fields(settings: PodSettings) -> dict[str, Any]:
    """Return the fields that are not empty."""
    fields = {name: getattr(settings, name) for name in PodSettings.model_fields}
    dumped = PodSettings.model_validate(fields).model_dump(mode="json", by_alias=True, exclude_none=True)
    dumped["dnsConfig"] = _not_empty(dumped["dnsConfig"])
    return _not_empty(dumped)


def _not_empty(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value not in ("", {}, [])}


def _merge_lists(entries: Iterable[dict[str, Any]], key: str | None) -> list[dict[str, Any]]:
    if key is None:
        known = list(entries)
        return [entry for number, entry in enumerate(known) if entry not in known[:number]]
    return list({entry[key]: entry for entry in entries}.values())


def _pod_fields(settings: dict[str, Any], profile: PodProfile, pod: Manifest) -> Manifest:
    secrets = [*pod.get("imagePullSecrets", []), *settings.get("imagePullSecrets", [])]
    fields = {
        "nodeSelector": {**settings.get("nodeSelector", {}), **pod.get("nodeSelector", {})},
        "tolerations": _tolerations(settings.get("tolerations", []), pod["tolerations"]),
        "imagePullSecrets": _merge_lists(secrets, "name"),
        "volumes": [*pod["volumes"], *settings.get("volumes", []), *_ca_volumes(profile.ca_bundle)],
    }
    return {name: settings[name] for name in _INSTALLATION_ONLY if name in settings} | _not_empty(fields)


def _tolerations(added: list[dict[str, Any]], own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add those with a key first, and those without last: the first match decides when a dead node is left."""
    keyed = [toleration for toleration in added if toleration.get("key")]
    return [*keyed, *own, *(toleration for toleration in added if not toleration.get("key"))]


def _env(settings: dict[str, Any], profile: PodProfile, own: list[dict[str, str]]) -> list[dict[str, Any]]:
    bundle = profile.ca_bundle
    path = f"{CA_MOUNT}/{bundle.key}" if bundle.config_map or bundle.secret else ""
    authorities = [{"name": name, "value": path} for name in CA_VARIABLES if path]
    return [*own, *authorities, *_proxy_env(profile.proxy, own), *settings.get("env", [])]


def _proxy_env(proxy: Proxy, own: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the variables in both spellings: curl reads http_proxy in lower case only, some tools upper case only."""
    if not (proxy.http or proxy.https):
        return []
    values = {variable["name"]: variable.get("value", "") for variable in own}
    hosts = (urlsplit(values.get(PROGRESS_URL_ENV, "")).hostname or "", values.get(MAIN_ADDRESS_ENV, ""))
    excluded = dict.fromkeys(filter(None, (*_CLUSTER_NAMES, *hosts, *proxy.no_proxy)))
    variables = {"HTTP_PROXY": proxy.http, "HTTPS_PROXY": proxy.https, "NO_PROXY": ",".join(excluded)}
    return [
        {"name": spelled, "value": value}
        for name, value in variables.items()
        for spelled in (name, name.lower())
        if value
    ]


def _ca_volumes(bundle: CaBundle) -> list[dict[str, Any]]:
    """Return the volume of the CA bundle; not optional: no client could connect, and a pod waits until it exists."""
    items = [{"key": bundle.key, "path": bundle.key}]
    if bundle.config_map:
        return [{"name": CA_VOLUME, "configMap": {"name": bundle.config_map, "items": items}}]
    if bundle.secret:
        return [{"name": CA_VOLUME, "secret": {"secretName": bundle.secret, "items": items}}]
    return []


def _ca_mounts(bundle: CaBundle) -> list[dict[str, Any]]:
    mount = {"name": CA_VOLUME, "mountPath": CA_MOUNT, "readOnly": True}
    return [mount] if bundle.config_map or bundle.secret else []
