from pathlib import Path

import pytest

from examples.quickstart import make_model

COMMIT = "2b1d0d6f4b7fa9a5ac2a3e1d5a2e1f5a3c1b9d7e"


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_equal_files_have_one_commit_and_others_another(tmp_path):
    commits = [
        make_model.content_hash(write(tmp_path / name, **files))
        for name, files in {
            "one": {"config": "a", "weights": "b"},
            "same": {"weights": "b", "config": "a"},
            "changed": {"config": "a", "weights": "c"},
            "renamed": {"config": "a", "weight": "b"},
        }.items()
    ]
    assert commits[0] == commits[1]
    assert len(set(commits)) == 3
    assert all(len(commit) == 40 and int(commit, 16) for commit in commits)


def test_a_snapshot_is_found_by_its_branch_once_it_is_published(tmp_path):
    repository = tmp_path / "models--organization--name"
    assert make_model.find_snapshot(repository) is None
    snapshot = make_model.publish(write(repository / ".making" / "files", config="a"), repository)
    assert make_model.find_snapshot(repository) == snapshot
    assert snapshot == repository / "snapshots" / (repository / "refs" / "main").read_text()


def test_a_branch_without_its_snapshot_is_made_again(tmp_path):
    write(tmp_path / "refs", main=COMMIT)
    assert make_model.find_snapshot(tmp_path) is None


def test_a_failed_conversion_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(_gguf: Path, target: Path) -> None:
        write(target, config="half")
        raise RuntimeError("the converted model is wrong")

    monkeypatch.setattr(make_model, "download", lambda target: target)
    monkeypatch.setattr(make_model, "convert", fail)
    with pytest.raises(RuntimeError):
        make_model.make_model(tmp_path, note=lambda _: None)
    assert list((tmp_path / "models--HuggingFaceTB--SmolLM2-135M-Instruct").iterdir()) == []


def test_a_model_that_is_there_is_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(make_model, "download", lambda target: target)
    monkeypatch.setattr(make_model, "convert", lambda _gguf, target: write(target, config="a"))
    first = make_model.make_model(tmp_path, note=lambda _: None)
    monkeypatch.setattr(make_model, "download", lambda _: pytest.fail("downloaded again"))
    assert make_model.make_model(tmp_path, note=lambda _: None) == first
