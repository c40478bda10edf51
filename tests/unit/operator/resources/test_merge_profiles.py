"""The settings of an installation and of a class together: precedence, and that nothing gets lost."""

from dataclasses import replace
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qlora_api.names import Role
from qlora_api.pod_profile import DEFAULT_PROFILE, PodProfile
from qlora_operator.resources import build_prepare_job, merge_profiles, training_placement
from qlora_operator.resources.profile import apply_profile, merge_settings
from tests.make import INSTALLATION, OWNER, make_spec

KEYS: Final = st.sampled_from(["a", "b", "c"])
VALUES: Final = st.sampled_from(["1", "2", "3"])
MAPPINGS: Final = st.dictionaries(KEYS, VALUES, max_size=3)
SECTION: Final = {
    "labels": MAPPINGS,
    "annotations": MAPPINGS,
    "nodeSelector": MAPPINGS,
    "runtimeClassName": st.sampled_from(["", "nvidia", "amd"]),
    "tolerations": st.lists(st.fixed_dictionaries({"key": KEYS, "value": VALUES}), max_size=2),
    "env": st.lists(st.fixed_dictionaries({"name": KEYS, "value": VALUES}), max_size=2, unique_by=lambda e: e["name"]),
    "dnsConfig": st.one_of(st.just({}), st.fixed_dictionaries({"searches": st.lists(KEYS, max_size=2)})),
    "securityContext": st.fixed_dictionaries({}, optional={"runAsUser": st.integers(1, 3), "fsGroup": st.just(7)}),
}
SECTIONS: Final = st.fixed_dictionaries({}, optional=SECTION)
PROFILES: Final = st.builds(
    lambda general, prepare, train: PodProfile.model_validate({**general, "prepare": prepare, "train": train}),
    SECTIONS,
    SECTIONS,
    SECTIONS,
)
TEMPLATE: Final = build_prepare_job(OWNER, make_spec(), replace(INSTALLATION, pods=PodProfile()))["spec"]["template"]


@given(PROFILES)
def test_class_without_settings_changes_nothing(profile: PodProfile) -> None:
    assert merge_profiles(profile, PodProfile()) == profile


@given(PROFILES)
def test_installation_without_settings_leaves_those_of_the_class(added: PodProfile) -> None:
    merged = merge_profiles(PodProfile(), added)
    for role in Role:
        assert apply_profile(TEMPLATE, merged, role) == apply_profile(TEMPLATE, added, role)
    assert training_placement(merged)[0] == training_placement(added)[0]


@given(PROFILES, PROFILES)
def test_class_overrides_and_nothing_of_the_installation_gets_lost(installation: PodProfile, added: PodProfile) -> None:
    merged = merge_profiles(installation, added)
    for name in ("prepare", "train"):
        before = merge_settings(installation, getattr(installation, name))
        above = merge_settings(added, getattr(added, name))
        together = merge_settings(merged, getattr(merged, name))
        for field, value in above.items():
            if field in {"labels", "annotations", "nodeSelector", "securityContext"}:
                assert together[field] == before.get(field, {}) | value
            elif field == "env":
                assert {entry["name"]: entry["value"] for entry in together[field]} == {
                    entry["name"]: entry["value"] for entry in (*before.get(field, []), *value)
                }
            elif field == "tolerations":
                assert all(entry in together[field] for entry in (*before.get(field, []), *value))
            else:
                assert together[field] == value
        assert {field: together[field] for field in before.keys() - above.keys()} == {
            field: before[field] for field in before.keys() - above.keys()
        }


@given(PROFILES, PROFILES)
def test_merging_twice_is_merging_once(installation: PodProfile, added: PodProfile) -> None:
    once = merge_profiles(installation, added)
    assert merge_profiles(once, added) == once


@pytest.mark.parametrize("section", ["prepare", "train"])
def test_precedence_of_the_four_layers(section: str) -> None:
    """Every layer sets its own key, and all keys of the layers below it."""
    layers = [{"d": "chart"}, {"d": "chart-role"}, {"d": "class"}, {"d": "class-role"}]
    for number in range(4):
        for layer in layers[number:]:
            layer[f"from-{number}"] = layer["d"]
    chart, chart_role, general, role = layers
    installation = PodProfile.model_validate({"labels": chart, section: {"labels": chart_role}})
    added = PodProfile.model_validate({"labels": general, section: {"labels": role}})
    merged = getattr(merge_profiles(installation, added), section)
    assert merged.labels == {"d": "class-role"} | {f"from-{number}": "class-role" for number in range(4)}
    other = merge_profiles(installation, PodProfile.model_validate({"labels": general}))
    assert getattr(other, section).labels["d"] == "class"


@pytest.mark.parametrize(
    ("installation", "added", "expected"),
    [
        pytest.param(
            {"proxy": {"http": "http://a", "noProxy": ["x"]}},
            {"proxy": {"https": "http://b", "noProxy": ["y", "x"]}},
            {"proxy": {"http": "http://a", "https": "http://b", "noProxy": ["x", "y"]}},
            id="proxy",
        ),
        pytest.param(
            {"caBundle": {"configMap": "ca"}}, {"caBundle": {"secret": "ca"}}, {"caBundle": {"secret": "ca"}}, id="ca"
        ),
        pytest.param(
            {"caBundle": {"configMap": "ca"}}, {"labels": {"a": "1"}}, {"caBundle": {"configMap": "ca"}}, id="kept"
        ),
    ],
)
def test_proxy_and_ca_of_installation_and_class(
    installation: dict[str, Any], added: dict[str, Any], expected: dict[str, Any]
) -> None:
    merged = merge_profiles(PodProfile.model_validate(installation), PodProfile.model_validate(added))
    wanted = PodProfile.model_validate(expected)
    assert (merged.proxy, merged.ca_bundle) == (wanted.proxy, wanted.ca_bundle)


def test_default_security_context_stays_unless_the_class_overrides_it() -> None:
    merged = merge_profiles(DEFAULT_PROFILE, PodProfile.model_validate({"securityContext": {"runAsUser": 1000}}))
    assert merged.train.security_context.run_as_user == 1000
    assert merged.train.security_context.run_as_non_root is True


def test_settings_that_contradict_each_other_together_are_refused() -> None:
    installation = PodProfile.model_validate({"dnsPolicy": "None", "dnsConfig": {"nameservers": ["10.0.0.2"]}})
    with pytest.raises(ValidationError, match="dnsPolicy None"):
        merge_profiles(installation, PodProfile.model_validate({"dnsConfig": {"searches": ["example"]}}))
