"""`qlora merge` with the real trainer on a tiny model."""

import pytest
from typer.testing import CliRunner
from typer.testing import Result as Invocation

from qlora_api.local_requests import MergedFolder
from qlora_cli.__main__ import app
from qlora_trainer import merge_job
from tests.unit.cli.make import command_lines
from tests.unit.trainer.test_merge_job import write_shard
from tests.unit.trainer.tiny import write_model
from tests.unit.trainer.trained import PLAIN, write_published
from tests.unit.trainer.tuned import NF4, token_rows

# peft 0.21 reads transformers' old name of is_activation_checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("result")
    write_model(folder / "model")
    write_shard(folder / "0123", token_rows(4))
    return write_published(folder / "0123", folder / "model", PLAIN, NF4)


def qlora(*arguments: object) -> Invocation:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, ["merge", *map(str, arguments)])


def test_progress_the_difference_and_the_place_are_shown(adapter, tmp_path):
    result = qlora(adapter, "--to", tmp_path / "merged", "--base", "dequantised")
    assert result.exit_code == 0, result.output
    assert command_lines(result.stderr)[1:] == [
        "evaluating base and adapter unmerged on 4 held-out rows",
        "merging into the dequantised base, layer by layer",
        "evaluating the merged model",
    ]
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert lines[0] == f"4 held-out rows, {sum(row.label_count for row in token_rows(4))} answer tokens"
    assert lines[-1] == f"merged  {tmp_path}/merged"
    assert [line.split("│")[1].strip() for line in lines[4:-2]] == ["loss", "logits", "first choice"]
    assert (tmp_path / "merged/model.safetensors").is_file()


def test_without_rows_the_screen_says_that_nothing_was_measured(tmp_path):
    write_model(tmp_path / "model")
    adapter = write_published(tmp_path / "alone", tmp_path / "model", PLAIN, NF4)
    result = qlora(adapter, "--to", tmp_path / "merged")
    assert result.stdout.splitlines() == [
        "not measured: no held-out rows next to the adapter",
        f"merged  {tmp_path}/merged",
    ]


def test_json_has_the_figures_and_nothing_else(adapter, tmp_path):
    result = qlora(adapter, "--to", tmp_path / "merged", "-o", "json")
    found = MergedFolder.model_validate_json(result.stdout)
    assert (found.folder, found.merge.base) == (str(tmp_path / "merged"), "original")
    assert found.merge.difference.rows == 4


def test_merge_error_is_one_sentence(adapter, tmp_path):
    result = qlora(tmp_path / "none", "--to", tmp_path / "merged")
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: ADAPTER: file://{tmp_path}/none holds no files; give the folder 'adapter' of a published result\n"
    )
    full = qlora(adapter, "--to", adapter)
    assert (full.exit_code, full.stderr) == (1, f"error: --to: {adapter} is not an empty folder; choose another one\n")


def test_ctrl_c_leaves_nothing(adapter, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_job, "merge_adapter", interrupt)
    result = qlora(adapter, "--to", tmp_path / "merged")
    assert result.exit_code == 130
    assert result.stderr.endswith("stopped; nothing was written\n")
    assert not (tmp_path / "merged").exists()
