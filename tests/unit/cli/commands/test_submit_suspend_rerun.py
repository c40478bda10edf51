"""`qlora submit`, `suspend`, `resume` and `rerun`, and what they write."""

from pathlib import Path

import pytest
import yaml

from qlora_api.names import RETRY_ANNOTATION
from qlora_api.v1alpha1 import Checkpoint, QLoRAJobStatus, RetryStatus
from qlora_cli.cluster.client import AlreadyExistsError, ClusterError, KubeObject
from qlora_cli.cluster.connection import Connection
from qlora_cli.cluster.jobs import parse_job
from qlora_cli.commands import rerun, submit, suspend
from tests.make import NOW, REF, UID
from tests.unit.cli.fake_cluster import (
    FAILED,
    SUCCEEDED,
    SUSPENDED,
    FakeClusterClient,
    FakeTime,
    PlainConsole,
    make_job,
    make_raw,
    make_training,
)


def test_submit_uses_namespace_of_manifest_or_option():
    connection = Connection(FakeClusterClient(), "mine")
    bare = {"metadata": {"name": "a"}}
    assert submit.with_namespace(bare, None, connection)["metadata"] == {"name": "a", "namespace": "mine"}
    own = {"metadata": {"name": "a", "namespace": "theirs"}}
    assert submit.with_namespace(own, None, connection) == own
    with pytest.raises(ClusterError, match="has namespace theirs, but --namespace is mine; leave out one"):
        submit.with_namespace(own, "mine", connection)


def test_submit_with_taken_name_suggests_rerun():
    with pytest.raises(AlreadyExistsError, match=r"ml/taken already exists; choose .* with qlora rerun taken$"):
        submit.create_job(FakeClusterClient(), make_raw("taken"), dry_run=False)


def test_suspending_writes_one_field():
    cluster = FakeClusterClient(make_raw(status=make_training(1)))
    assert suspend.set_suspended(cluster, REF, True).suspended
    assert cluster.writes == [("patch", {"spec": {"suspend": True}})]


@pytest.mark.parametrize(("phase", "rest"), [("Running", False), ("Pending", False), ("Succeeded", True)])
def test_suspend_wait_ends_when_no_pod_runs(phase: str, rest: bool):
    raw = make_raw(status=SUSPENDED)
    cluster, job = FakeClusterClient(raw), parse_job(raw)
    assert suspend.is_stopped(job, cluster)
    cluster.pods_found = [{"metadata": {"name": "a"}, "status": {"phase": phase}}]
    assert suspend.is_stopped(job, cluster) is rest


def test_suspend_of_finished_run_is_refused():
    cluster = FakeClusterClient(make_raw(status=FAILED))
    with pytest.raises(ClusterError, match="ml/support-bot has failed; use qlora rerun to run it again"):
        suspend.set_suspended(cluster, REF, True)
    assert cluster.writes == []


def test_rerun_keeps_what_the_user_wrote():
    raw = {**make_raw(status=FAILED), "metadata": {**make_raw()["metadata"], "labels": {"team": "a"}}}
    cluster, paper = FakeClusterClient(raw), PlainConsole()
    manifest = rerun.make_manifest(parse_job(raw), ["output.ifExists=Overwrite"])
    rerun.delete_and_create(cluster, parse_job(raw), manifest, FakeTime().clock, paper.console)
    output = {**raw["spec"]["output"], "ifExists": "Overwrite"}
    assert manifest == {
        "apiVersion": raw["apiVersion"], "kind": raw["kind"],
        "metadata": {"name": "support-bot", "namespace": "ml", "labels": {"team": "a"}},
        "spec": {**raw["spec"], "output": output},
    }  # fmt: skip
    assert [verb for verb, _ in cluster.writes] == ["check", "delete", "create"]
    assert cluster.writes[1][1] == ("support-bot", UID)
    assert cluster.writes[2][1] == manifest
    assert "status" not in manifest


def test_rerun_of_running_job_needs_force():
    running = make_job(make_training(1))
    with pytest.raises(ClusterError, match=r"support-bot is Training; wait for its end .* or stop it with --force"):
        rerun.check_rerun(running, force=False)
    rerun.check_rerun(running, force=True)


def test_failed_rerun_saves_manifest():
    cluster = FakeClusterClient(make_raw("taken", FAILED))
    job = parse_job(make_raw("taken", FAILED))
    manifest = rerun.make_manifest(job, [])
    with pytest.raises(ClusterError, match="the previous run is deleted, and its manifest was saved to") as error:
        rerun.delete_and_create(cluster, job, manifest, FakeTime().clock, PlainConsole().console)
    kept = Path(str(error.value).rpartition(" ")[2])
    assert yaml.safe_load(kept.read_text()) == manifest
    kept.unlink()


def test_rerun_job_recreated_by_others_is_an_error():
    other = make_raw(status=SUCCEEDED)
    other = {**other, "metadata": {**other["metadata"], "uid": "another"}}
    with pytest.raises(ClusterError, match="somebody else created QLoRAJob ml/support-bot"):
        rerun.wait_until_gone(FakeClusterClient(other), REF, UID, FakeTime().clock)


def test_rerun_deletion_timeout_is_an_error():
    with pytest.raises(ClusterError, match="is still being deleted after 5 minutes"):
        rerun.wait_until_gone(FakeClusterClient(make_raw(status=FAILED)), REF, UID, FakeTime().clock)


REQUEST = {"metadata": {"annotations": {RETRY_ANNOTATION: NOW.isoformat()}}}


def retry(raw: KubeObject, changes: list[str], *, seen: bool = True) -> tuple[FakeClusterClient, str]:
    job = parse_job(raw)
    after = FAILED.model_copy(update={"retry": RetryStatus(request=NOW.isoformat())}) if seen else FAILED
    cluster = FakeClusterClient(raw, make_raw(status=after))
    manifest = rerun.make_manifest(job, changes)
    assert rerun.can_retry_in_place(job, manifest)
    return cluster, rerun.retry_in_place(cluster, job, manifest, NOW, FakeTime().clock)


def test_failed_run_is_retried_in_place():
    cluster, said = retry(make_raw(status=FAILED), [])
    assert cluster.writes == [("patch", REQUEST)]
    assert said == "QLoRAJob ml/support-bot is tried again"


def test_retry_names_the_step_that_it_resumes_from():
    checkpoint = Checkpoint(step=120, uri="s3://adapters/c", time=NOW)
    _, said = retry(make_raw(status=FAILED.model_copy(update={"checkpoint": checkpoint})), [])
    assert said == "QLoRAJob ml/support-bot is tried again; it resumes from step 120"


def test_retry_changes_mutable_fields_with_the_request():
    cluster, _ = retry(make_raw(status=FAILED), ["deadlines.total=48h", "ttl=7d"])
    assert cluster.writes == [("patch", {**REQUEST, "spec": {"deadlines": {"total": "48h"}, "ttl": "7d"}})]


def test_retry_that_no_operator_sees_names_the_way_around():
    _, said = retry(make_raw(status=FAILED), [], seen=False)
    assert said.endswith("if the run stays Failed, use qlora rerun --recreate support-bot")


@pytest.mark.parametrize(
    ("status", "changes"),
    [(SUCCEEDED, []), (FAILED, ["lora.rank=8"]), (FAILED, ["output.ifExists=Overwrite"]), (make_training(1), [])],
)
def test_run_that_succeeded_or_gets_another_recipe_is_not_retried_in_place(status: QLoRAJobStatus, changes: list[str]):
    job = make_job(status)
    assert not rerun.can_retry_in_place(job, rerun.make_manifest(job, changes))
