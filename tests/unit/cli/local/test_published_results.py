"""Results in a folder: found from above and from inside, the newest of several."""

import tracemalloc
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from weakref import ReferenceType, ref

import pytest
from typer.testing import CliRunner

from qlora_api.report import Confidence, Interval, Intervals, ResultManifest, RunReport, ServingCheck
from qlora_api.units import MIB
from qlora_api.v1alpha1 import Plan
from qlora_cli.__main__ import app
from qlora_cli.commands import report as report_command
from qlora_cli.commands.report import download_report
from qlora_cli.local import published_results
from qlora_cli.local.output_store import OutputError, OutputStore, open_output_store
from qlora_cli.local.published_results import find_result, is_result
from qlora_trainer.storage.listed_files import describe_files
from tests.make import DIGEST, NOW, make_prepared, make_result, make_spec

SAME = Interval(low=1, high=2)
ALIKE = Intervals(loss=SAME, perplexity=SAME, token_accuracy=SAME)
OLD, NEW = "a" * 16, "b" * 16


def make_report(job: str) -> RunReport:
    return RunReport(
        job=job,
        namespace="ml",
        digest=DIGEST,
        spec=make_spec(),
        plan=Plan(device="cpu", nodes=1, gpus_per_node=0, micro_batch_size=4, gradient_accumulation=2, total_steps=1),
        prepared=make_prepared(),
        choices={},
        history=(),
        adapter_step=0,
        evaluation=make_result().evaluation,
        confidence=Confidence(level=0.95, resamples=1, seed=0, base=ALIKE, adapter=ALIKE, change=ALIKE),
        samples=(),
        serving=ServingCheck(vllm=True, max_lora_rank=16),
        started_at=NOW,
        finished_at=NOW,
        training_seconds=1,
        tokens_per_second=1,
        peak_memory_bytes=1,
        versions={},
    )


def write_result(output: Path, digest: str = NEW, day: int = 2, job: str = "support-bot") -> Path:
    folder = output / "support-bot" / digest
    for part in ("adapter", "report"):
        (folder / part).mkdir(parents=True)
    (folder / "report/report.json").write_text(make_report(job).model_dump_json(by_alias=True))
    (folder / "report/report.html").write_text("<p>")
    manifest = ResultManifest(
        digest=digest,
        job=job,
        namespace="ml",
        base_model="hf://a/b",
        base_commit="d" * 40,
        dataset_uri="s3://data/rows.jsonl",
        dataset_digest="d" * 64,
        trainer_version="0.1.0",
        created_at=NOW + timedelta(days=day),
        result=make_result(),
        files=describe_files(folder),
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json(by_alias=True))
    return folder


@pytest.mark.parametrize("below", ["", "support-bot", f"support-bot/{NEW}", f"support-bot/{NEW}/adapter"])
def test_result_is_found_from_above_and_from_inside(tmp_path: Path, below: str) -> None:
    folder = write_result(tmp_path)
    found = find_result(str(tmp_path / below), None, pytest.fail)
    assert (found.uri, found.adapter) == (folder.as_uri(), f"{folder.as_uri()}/adapter")


def test_newest_of_several_results_is_taken_and_named(tmp_path: Path) -> None:
    write_result(tmp_path, OLD, day=3)
    write_result(tmp_path, NEW, day=2)
    notes: list[str] = []
    assert find_result(str(tmp_path), None, notes.append).uri.endswith(OLD)
    assert notes == [f"{tmp_path} has 2 results; this is the newest, support-bot/{OLD}"]


def test_folder_without_result_is_refused_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"has no published result, .* give the output of a run"):
        find_result(str(tmp_path), None, pytest.fail)


def test_name_of_a_foreign_result_becomes_no_path(tmp_path: Path) -> None:
    write_result(tmp_path, job="../../elsewhere")
    with pytest.raises(OutputError, match="no QLoRAJob has such a name"):
        find_result(str(tmp_path), None, pytest.fail)


def test_name_of_a_qlorajob_is_no_folder_unless_it_has_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bot").mkdir()
    assert (is_result("bot"), is_result("./bot"), is_result("s3://bucket/out")) == (False, True, True)
    write_result(tmp_path / "out")
    assert is_result("out")


def test_report_and_serve_snippet_read_a_folder(tmp_path: Path) -> None:
    folder = write_result(tmp_path)
    reported = CliRunner().invoke(app, ["report", str(tmp_path), "--no-open"])
    assert (reported.exit_code, reported.stderr) == (0, "")
    assert reported.stdout.endswith(f"report  {folder}/report/report.html\n")
    served = CliRunner().invoke(app, ["serve-snippet", str(tmp_path)])
    assert f"--lora-modules support-bot={folder}/adapter" in served.stdout
    refused = CliRunner().invoke(app, ["serve-snippet", str(tmp_path), "--for", "kserve"])
    assert (refused.exit_code, "upload it and give its s3:// URI" in refused.stderr) == (1, True)


def test_report_that_is_a_link_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("typer.launch", opened.append)
    page = write_result(tmp_path) / "report/report.html"
    assert CliRunner().invoke(app, ["report", str(tmp_path), "--open"]).exit_code == 0
    assert opened == [page.as_uri()]
    program = tmp_path / "program.desktop"
    program.write_text("[Desktop Entry]")
    page.unlink()
    page.symlink_to(program)
    refused = CliRunner().invoke(app, ["report", str(tmp_path), "--open"])
    assert (refused.exit_code, len(opened)) == (1, 1)
    assert "report.html is no file; copy the result again" in " ".join(refused.output.split())


@pytest.mark.parametrize("command", [["report", "--no-open"], ["serve-snippet"]], ids=" ".join)
def test_report_that_was_changed_after_it_was_published_is_refused(tmp_path: Path, command: list[str]) -> None:
    result = write_result(tmp_path / "out")
    report = result / "report/report.json"
    report.write_text(report.read_text().replace("hf://", "hf://evil-"))
    ended = CliRunner().invoke(app, [*command, str(tmp_path / "out")])
    assert ended.exit_code == 1
    assert "report/report.json does not have the SHA-256 of the result's manifest.json" in ended.output
    assert "evil" not in ended.output


def test_page_that_was_changed_after_it_was_published_is_not_opened(tmp_path: Path) -> None:
    (write_result(tmp_path / "out") / "report/report.html").write_text("<script>")
    ended = CliRunner().invoke(app, ["report", "--no-open", str(tmp_path / "out")])
    assert ended.exit_code == 1
    assert "report/report.html does not have the SHA-256" in ended.output


def test_report_that_the_manifest_does_not_list_is_refused(tmp_path: Path) -> None:
    manifest = write_result(tmp_path / "out") / "manifest.json"
    found = ResultManifest.model_validate_json(manifest.read_text())
    manifest.write_text(found.model_copy(update={"files": ()}).model_dump_json(by_alias=True))
    with pytest.raises(OutputError, match=r"report/report\.json is not listed in the result's manifest\.json"):
        find_result(str(tmp_path / "out"), None, print)


def test_generation_config_that_the_manifest_does_not_list_is_not_served(tmp_path: Path) -> None:
    (write_result(tmp_path / "out") / "adapter/generation_config.json").write_text('{"eos_token_id": 666}')
    ended = CliRunner().invoke(app, ["serve-snippet", "--for", "vllm", str(tmp_path / "out")])
    assert "adapter/generation_config.json is not listed" in ended.output


def test_long_name_of_a_foreign_result_is_no_name(tmp_path: Path) -> None:
    write_result(tmp_path / "out", job="a" * 300)
    with pytest.raises(OutputError, match="no QLoRAJob has such a name"):
        find_result(str(tmp_path / "out"), None, print)


def test_result_that_was_uploaded_beside_leftovers_is_read_from_its_own_folder(tmp_path: Path) -> None:
    """As `publish` does where an interrupted attempt left other files."""
    result = write_result(tmp_path / "out")
    own = result / ("c" * 16)
    own.mkdir()
    for part in ("adapter", "report"):
        (result / part).rename(own / part)
    (result / "report").mkdir()
    (result / "report/report.json").write_text(make_report("leftover").model_dump_json(by_alias=True))
    manifest = result / "manifest.json"
    found = ResultManifest.model_validate_json(manifest.read_text())
    listed = tuple(file for file in describe_files(result) if file.path.startswith("c"))
    manifest.write_text(found.model_copy(update={"files": listed}).model_dump_json(by_alias=True))
    for given in (tmp_path / "out", result):
        read = find_result(str(given), None, pytest.fail)
        assert (read.uri, read.report.job) == (own.as_uri(), "support-bot")
    shown = CliRunner().invoke(app, ["report", str(tmp_path / "out"), "--no-open"])
    assert shown.stdout.endswith(f"report  {own}/report/report.html\n")


def test_changed_report_is_not_left_in_the_folder_of_the_download(tmp_path: Path) -> None:
    (write_result(tmp_path / "out") / "report/report.html").write_text("<script>")
    target = tmp_path / "here"
    ended = CliRunner().invoke(app, ["report", "--no-open", "--to", str(target), str(tmp_path / "out")])
    assert (ended.exit_code, target.exists()) == (1, False)
    assert "report/report.html does not have the SHA-256" in ended.output


def test_manifest_that_is_none_hides_no_other_result(tmp_path: Path) -> None:
    folder = write_result(tmp_path, OLD)
    (write_result(tmp_path, NEW) / "manifest.json").write_text('{"files": [{}]}')
    notes: list[str] = []
    assert find_result(str(tmp_path), None, notes.append).uri == folder.as_uri()
    assert notes[0] == f"support-bot/{NEW}/manifest.json is not what a run publishes; give another result"


def test_manifests_of_many_results_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        write_result(tmp_path, f"{number:016}", day=number)
    kept: list[ReferenceType[ResultManifest]] = []
    read = published_results._read_manifest

    def read_one(files: OutputStore, path: str) -> ResultManifest:
        kept.append(ref(read(files, path)))
        return found if (found := kept[-1]()) else read(files, path)

    monkeypatch.setattr(published_results, "_read_manifest", read_one)
    assert find_result(str(tmp_path), None, lambda _: None).uri.endswith(f"{19:016}")
    assert sum(one() is not None for one in kept) <= 1


def test_report_is_not_read_into_memory_for_its_digest(tmp_path: Path) -> None:
    result = tmp_path / "out/support-bot" / NEW
    write_result(tmp_path / "out")
    with (result / "report/evaluation.jsonl").open("wb") as stream:
        stream.truncate(64 * MIB)
    manifest = result / "manifest.json"
    found = ResultManifest.model_validate_json(manifest.read_text())
    manifest.write_text(found.model_copy(update={"files": describe_files(result)}).model_dump_json(by_alias=True))
    digests = find_result(str(result), None, pytest.fail).digests
    tracemalloc.start()
    try:
        download_report(f"{result.as_uri()}/report", tmp_path / "here", None, digests)
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()
    assert (tmp_path / "here/evaluation.jsonl").stat().st_size == 64 * MIB


def test_report_that_is_too_large_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = write_result(tmp_path / "out")
    monkeypatch.setattr(report_command, "MAX_BYTES", 3)
    ended = CliRunner().invoke(app, ["report", "--no-open", "--to", str(tmp_path / "here"), str(result)])
    assert (ended.exit_code, (tmp_path / "here").exists()) == (1, False)
    assert "report has more than 3 bytes, which no report has; look at it there" in ended.output


@pytest.mark.parametrize("to", [["--to", "here"], []], ids=["named", "default"])
def test_report_is_not_written_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: list[str]) -> None:
    """The working folder, or what is in the named one, may be somebody else's, and the page too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report_command, "_find_page", pytest.fail)
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/report.html").write_text("mine")
    if to:
        (tmp_path / "here").mkdir()
        (tmp_path / "here/report.html").symlink_to(tmp_path / "victim/report.html")
    else:
        (tmp_path / "support-bot-report").symlink_to(tmp_path / "victim")
    result = write_result(tmp_path / "out")
    located = report_command.Report("support-bot", f"{result.as_uri()}/report", None)
    monkeypatch.setattr(report_command, "_locate", lambda *_: replace(located, folder=_as_bucket(located.folder)))
    monkeypatch.setattr(report_command, "open_output_store", lambda *_: open_output_store(located.folder, None))
    ended = CliRunner().invoke(app, ["report", "--no-open", "support-bot", *to])
    assert ended.exit_code == 1, ended.output
    assert "is a link; remove it" in ended.output
    assert (tmp_path / "victim/report.html").read_text() == "mine"


def _as_bucket(uri: str) -> str:
    return uri.replace("file:///", "s3://bucket/")
