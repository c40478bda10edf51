"""`qlora serve-snippet` and `qlora report`: what becomes of a published run elsewhere."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_api.v1alpha1 import OutputStatus
from qlora_cli.cluster.client import ClusterError
from qlora_cli.cluster.jobs import ClusterJob
from qlora_cli.commands import report, serve_snippet
from qlora_cli.commands.serve_snippet import resolve_served_model
from qlora_cli.local.output_store import OutputError
from tests.make import DIGEST, make_prepared, make_result
from tests.unit.cli.fake_cluster import SUCCEEDED, make_job, make_training

ADAPTER = make_result().adapter
MERGED = f"{ADAPTER.removesuffix('/adapter')}/merged/original"
COMMIT = "a" * 40


def published(merged: str | None = None, **change: Any) -> ClusterJob:
    prepared, result = make_prepared(), make_result()
    output = OutputStatus(
        digest=DIGEST, prefix=prepared.prefix, adapter=result.adapter, report=result.report, merged=merged
    )
    return make_job(SUCCEEDED.model_copy(update={"output": output, "model": prepared.model}), **change)


@pytest.mark.parametrize(
    ("lora", "rank"), [({}, 16), ({"rank": 4}, 8), ({"rank": 33}, 64), ({"rank": 16, "init": "pissa"}, 32)]
)
def test_max_lora_rank_is_the_lowest_that_vllm_accepts(lora: dict[str, Any], rank: int):
    assert resolve_served_model(published(lora=lora)).max_rank == rank


def test_vllm_gets_the_base_at_its_commit_and_the_adapter_from_a_folder():
    assert serve_snippet.write_vllm(resolve_served_model(published())) == (
        f"aws s3 sync {ADAPTER} ./support-bot\n"
        "vllm serve HuggingFaceTB/SmolLM2-135M-Instruct \\\n"
        f"  --revision {COMMIT} \\\n"
        "  --enable-lora \\\n"
        "  --max-lora-rank 16 \\\n"
        "  --lora-modules support-bot=./support-bot \\\n"
        "  --generation-config ./support-bot\n"
    )


def test_vllm_gets_what_else_an_adapter_needs():
    job = published(
        model={"uri": "s3://models/base"}, lora={"init": "loftq"}, dataset={"chatTemplate": "{{ messages }}"}
    )
    written = serve_snippet.write_vllm(resolve_served_model(job))
    assert written.startswith("aws s3 sync s3://models/base ./model\naws s3 sync ")
    assert "--revision" not in written
    assert "--chat-template ./support-bot/chat_template.jinja" in written
    assert written.endswith("--quantization=bitsandbytes\n")


STOPS = '{"eos_token_id": [1, 5]}'


def served_with(generation_config: str | None, **change: Any) -> serve_snippet.ServedModel:
    return replace(resolve_served_model(published(**change)), generation_config=generation_config)


@pytest.mark.parametrize("server", serve_snippet.Server)
def test_adapter_without_generation_config_is_served_with_that_of_its_base(server: serve_snippet.Server):
    assert "--generation-config" not in serve_snippet.WRITERS[server](served_with(""))
    assert "--generation-config" in serve_snippet.WRITERS[server](served_with(STOPS))


def test_kserve_reads_the_stop_tokens_where_it_downloads_the_adapter():
    service = yaml.safe_load(serve_snippet.write_kserve(served_with(STOPS, lora={"init": "loftq"})))
    assert service["spec"]["template"]["containers"][0]["env"] == [
        {
            "name": "VLLM_ADDITIONAL_ARGS",
            "value": "--generation-config=/mnt/lora/support-bot --quantization=bitsandbytes",
        }
    ]


def test_kubeai_gets_the_stop_tokens_as_a_file():
    """It loads adapters into a running vLLM: their files are not there when that starts."""
    spec = yaml.safe_load(serve_snippet.write_kubeai(served_with(STOPS)))["spec"]
    assert spec["files"] == [{"path": "/config/generation_config.json", "content": STOPS}]
    assert "--generation-config=/config" in spec["args"]
    assert "files" not in yaml.safe_load(serve_snippet.write_kubeai(served_with(None)))["spec"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(None, "", id="older-release"),
        pytest.param(b'{\n "eos_token_id": [1, 5]\n}', STOPS, id="present"),
        pytest.param(b"[]", OutputError, id="no-object"),
        pytest.param(b"{", OutputError, id="no-json"),
        pytest.param(b" " * 70_000, OutputError, id="too-large"),
    ],
)
def test_generation_config_is_read_from_the_output(tmp_path: Path, content: bytes | None, expected: Any):
    (tmp_path / "adapter_config.json").write_text("{}")
    if content is not None:
        (tmp_path / "generation_config.json").write_bytes(content)
    if expected is OutputError:
        with pytest.raises(OutputError):
            serve_snippet.read_generation_config(tmp_path.as_uri(), None)
    else:
        assert serve_snippet.read_generation_config(tmp_path.as_uri(), None) == expected


def test_generation_config_in_a_claim_is_not_read():
    with pytest.raises(OutputError, match="in a volume of the cluster"):
        serve_snippet.read_generation_config("pvc://claim/adapter", None)


def test_kserve_gets_a_service_with_the_adapter():
    service = yaml.safe_load(serve_snippet.write_kserve(resolve_served_model(published(lora={"rank": 64}))))
    assert service["spec"]["model"] == {
        "uri": f"hf://HuggingFaceTB/SmolLM2-135M-Instruct:{COMMIT}",
        "name": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "lora": {"adapters": [{"name": "support-bot", "uri": ADAPTER}], "maxRank": 64},
    }


def test_kubeai_gets_a_model_with_the_adapter():
    model = yaml.safe_load(serve_snippet.write_kubeai(resolve_served_model(published())))
    assert model["metadata"] == {"name": "support-bot-base"}
    assert model["spec"]["adapters"] == [{"name": "support-bot", "url": ADAPTER}]
    assert model["spec"]["args"] == ["--enable-lora", "--max-lora-rank=16", f"--revision={COMMIT}"]


@pytest.mark.parametrize("server", serve_snippet.Server)
def test_full_model_is_served_without_adapter(server: serve_snippet.Server):
    full = published(method="full", quantization={"bits": 16})
    written = serve_snippet.WRITERS[server](resolve_served_model(full))
    assert ADAPTER in written
    assert "lora" not in written


@pytest.mark.parametrize(
    ("lora", "why"),
    [
        ({"dora": True}, "it is a DoRA adapter"),
        ({"modulesToSave": ["lm_head"]}, "it replaces entire modules"),
        ({"rankPattern": {"q_proj": 8}}, "its modules differ in rank or alpha"),
        ({"rank": 1024}, "its rank is above 512"),
    ],
)
def test_adapter_that_vllm_cannot_load_is_served_merged(lora: dict[str, Any], why: str):
    with pytest.raises(ClusterError, match=f"{why}.*qlora merge {ADAPTER}"):
        resolve_served_model(published(lora=lora))
    assert resolve_served_model(published(MERGED, lora=lora)).model == MERGED


def test_unpublished_run_cannot_be_served():
    with pytest.raises(ClusterError, match="support-bot is Training and has not published a result"):
        resolve_served_model(make_job(make_training(5)))


def test_report_is_downloaded_with_all_files(tmp_path: Path):
    (tmp_path / "there").mkdir()
    for name in ("report.html", "report.json", "evaluation.jsonl"):
        (tmp_path / "there" / name).write_text('{"job": "support-bot"}')
    there = (tmp_path / "there").as_uri()
    assert report.read_report_json(report.Report("support-bot", there, None), None) == {"job": "support-bot"}
    here = report.download_report(there, tmp_path / "here", None)
    assert sorted(path.name for path in here.iterdir()) == ["evaluation.jsonl", "report.html", "report.json"]


def test_deleted_report_is_an_error(tmp_path: Path):
    with pytest.raises(OutputError, match=r"has no report\.html"):
        report.download_report(tmp_path.as_uri(), tmp_path / "here", None)


def test_run_without_report_says_why():
    assert report.find_report(published()) == f"{ADAPTER.removesuffix('/adapter')}/report"
    with pytest.raises(ClusterError, match="support-bot is Training and has no report: Training it is"):
        report.find_report(make_job(make_training(5)))
