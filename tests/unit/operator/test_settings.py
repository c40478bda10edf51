"""The environment, read once."""

from datetime import timedelta

import pytest

from qlora_api.gpu_prices import GpuPrices
from qlora_api.logs.formatters import Format
from qlora_api.runconfig import Platform, S3Config
from qlora_operator.models import Retention
from qlora_operator.resources import Installation
from qlora_operator.settings import LeaderElectionSettings, Settings, SettingsError, read_settings

IMAGE = {"QLORA_TRAINER_IMAGE": "trainer:1"}


def test_defaults() -> None:
    assert read_settings(IMAGE) == Settings(Installation("trainer:1"))


def test_everything() -> None:
    settings = read_settings(
        IMAGE
        | {
            "QLORA_IMAGE_PULL_POLICY": "Always", "QLORA_PROGRESS_URL": "http://operator:8080",
            "QLORA_PROGRESS_PORT": "9000", "QLORA_HEALTH_PORT": "9001", "QLORA_NAMESPACES": "ml, research,",
            "QLORA_WORKERS": "4", "QLORA_HUB_MIRROR": "s3://hub", "QLORA_HUB_ENDPOINT": "https://hub",
            "QLORA_S3_ENDPOINT": "http://s3", "QLORA_S3_REGION": "eu", "QLORA_S3_ADDRESSING": "path",
            "QLORA_S3_CHECKSUMS": "when_required", "QLORA_LOG_LEVEL": "debug", "QLORA_LOG_FORMAT": "text",
            "QLORA_IMAGE_PULL_SECRETS": "registry, mirror", "KUBECONFIG": "/kube",
            "POD_NAMESPACE": "qlora", "POD_NAME": "operator-x7b", "QLORA_LEASE": "my-release",
            "QLORA_RESYNC_SECONDS": "30", "QLORA_TTL": "7d", "QLORA_RETENTION": "90d",
            "QLORA_GPU_PRICES": '{"currency": "EUR", "gpuPrices": {"NVIDIA-A10": "1.10"}}',
        }
    )  # fmt: skip
    s3 = S3Config(endpoint="http://s3", region="eu", addressing="path", checksums="when_required")
    platform = Platform(s3=s3, hub_endpoint="https://hub", hub_mirror="s3://hub")
    retention = Retention(ttl=timedelta(days=7), jobs=timedelta(days=90))
    assert settings == Settings(
        Installation("trainer:1", "Always", "http://operator:8080", platform, ("registry", "mirror"), retention),
        ("ml", "research"), 4, 9000, 9001, "debug", Format.TEXT, "/kube", timedelta(seconds=30),
        LeaderElectionSettings("qlora", "operator-x7b", "my-release"),
        GpuPrices(currency="EUR", gpu_prices={"NVIDIA-A10": "1.10"}),
    )  # fmt: skip


def test_a_pod_without_a_name_cannot_agree_with_others() -> None:
    with pytest.raises(SettingsError, match="POD_NAME"):
        read_settings(IMAGE | {"POD_NAMESPACE": "qlora"})


def test_empty_values_of_the_chart_are_defaults() -> None:
    empty = dict.fromkeys(
        ("QLORA_S3_ENDPOINT", "QLORA_S3_ADDRESSING", "QLORA_NAMESPACES", "QLORA_HUB_MIRROR", "QLORA_TTL"), ""
    )
    assert read_settings(IMAGE | empty) == Settings(Installation("trainer:1"))


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("QLORA_TRAINER_IMAGE", ""), ("QLORA_WORKERS", "0"), ("QLORA_WORKERS", "many"),
        ("QLORA_HEALTH_PORT", "70000"), ("QLORA_LOG_LEVEL", "loud"),
        ("QLORA_LOG_FORMAT", "xml"), ("QLORA_IMAGE_PULL_POLICY", "Sometimes"),
        ("QLORA_RESYNC_SECONDS", "0"), ("QLORA_S3_ADDRESSING", "sideways"), ("QLORA_S3_CHECKSUMS", "never"),
        ("QLORA_TTL", "1 week"), ("QLORA_TTL", "0s"), ("QLORA_RETENTION", "90"), ("QLORA_RETENTION", "99999999d"),
        ("QLORA_GPU_PRICES", "2.50"), ("QLORA_GPU_PRICES", '{"gpuPrices": {"A10": 2.5}}'),
        ("QLORA_GPU_PRICES", '{"currency": "dollars"}'),
    ],
)  # fmt: skip
def test_an_error_names_the_variable(variable: str, value: str) -> None:
    with pytest.raises(SettingsError, match=variable):
        read_settings(IMAGE | {variable: value})
