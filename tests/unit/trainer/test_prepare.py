"""Prepare: facts and digest of a run, and what it rejects, with reason and field, before a GPU is requested."""

import json
from pathlib import Path

import pytest

from qlora_api.names import SecretRole
from qlora_api.prepared import Prepared
from qlora_api.reasons import Reason
from qlora_api.runconfig import Platform
from qlora_trainer.data import shards
from qlora_trainer.errors import RunError
from qlora_trainer.prepare import prepare
from qlora_trainer.storage import store
from qlora_trainer.storage.credentials import load_secrets
from tests.hub import COMMIT, FakeHub, Repository
from tests.unit.trainer.data.test_chat_template import BARE
from tests.unit.trainer.families import write_family
from tests.unit.trainer.tiny import instruction_rows, make_spec, make_tokenizer, prepare_config, write_model, write_rows

HUB_MODEL = "hf://org/tiny"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


@pytest.fixture
def uris(tmp_path, model_folder) -> tuple[str, str, str]:
    rows = write_rows(tmp_path / "rows.jsonl", instruction_rows())
    return f"file://{model_folder}", rows, f"file://{tmp_path / 'output'}"


def rejected(spec, tmp_path: Path, platform: Platform | None = None) -> RunError:
    with pytest.raises(RunError) as caught:
        prepare(prepare_config(spec, platform=platform), work=tmp_path / "work")
    return caught.value


def test_prepare_writes_facts_and_shards(uris, tmp_path):
    notes: list[str] = []
    prepared = prepare(prepare_config(make_spec(*uris)), notes.append, work=tmp_path / "work")
    assert prepared.model.architecture == "LlamaForCausalLM"
    assert json.loads(prepared.model.config)["hidden_size"] == 64
    assert prepared.model.parameters == 384 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64
    assert (prepared.dataset.training_rows, prepared.dataset.evaluation_rows) == (32, 8)
    folder = Path(prepared.prefix.removeprefix("file://"))
    rows = shards.read_token_rows(folder / shards.TRAINING)
    assert sum(len(row.input_ids) for row in rows) == prepared.dataset.training_tokens
    assert Prepared.model_validate_json((folder / shards.FACTS).read_text()) == prepared
    assert not list(folder.parent.glob(".probe*"))
    assert any("is writable" in note for note in notes)


def test_prepare_records_module_sizes_of_a_family_without_a_described_shape(uris, tmp_path, monkeypatch):
    write_family("olmo2", tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr("qlora_trainer.rehearsal.PROVEN_TYPES", frozenset({"olmo2"}))  # a rehearsal takes long
    spec = make_spec(f"file://{tmp_path / 'model'}", *uris[1:])
    model = prepare(prepare_config(spec), work=tmp_path / "work").model
    traced = json.loads(model.config)["traced"]
    assert traced["modules"].startswith(":model.embed_tokens=")
    assert "model.layers.0-1:self_attn.q_proj|self_attn.o_proj=64x64qa," in traced["modules"]
    assert sorted(json.loads(model.config)) == ["model_type", "traced"]


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        pytest.param({"resources": {"memory": "32Gi"}, "deadlines": {"total": "1h"}}, True, id="resources"),
        pytest.param(
            {"checkpoint": {"steps": 1}, "tracking": {"tensorboard": False}}, True, id="checkpoint-and-tracking"
        ),
        pytest.param({"training": {"evaluateEvery": 1}}, True, id="validation"),
        pytest.param({"training": {"evaluateEvery": 1, "keep": "best"}}, False, id="validation-that-selects"),
        pytest.param({"training": {"seed": 1}}, False, id="seed"),
        pytest.param({"lora": {"rank": 8}}, False, id="lora"),
        pytest.param({"dataset": {"maxSamples": 30}}, False, id="data"),
        pytest.param({"training": {"maxLength": 24}}, False, id="max-length-that-truncates"),
        pytest.param({"training": {"loss": "all"}}, False, id="loss"),
        pytest.param({"training": {"maxSteps": 3}}, False, id="steps"),
        pytest.param({"training": {"optimizer": "adamw8bit"}}, False, id="optimizer"),
        pytest.param({"quantization": {"bits": 8}}, False, id="quantization"),
    ],
)
def test_digest_depends_on_what_determines_the_result(uris, tmp_path, changes, same):
    first = prepare(prepare_config(make_spec(*uris)), work=tmp_path)
    second = prepare(prepare_config(make_spec(*uris, **changes), job="other"), work=tmp_path)
    assert (first.digest == second.digest) is same


ALL_BUT_ONE = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


@pytest.mark.parametrize(
    ("spec", "equivalent"),
    [
        pytest.param(
            {"training": {"loss": "auto"}}, {"training": {"loss": "completion"}}, id="default-loss-of-an-answer"
        ),
        pytest.param(
            {"training": {"loss": "auto"}}, {"training": {"loss": "assistant"}}, id="assistant-loss-without-chats"
        ),
        pytest.param({"dataset": {"format": "auto"}}, {"dataset": {"format": "instruction"}}, id="format"),
        pytest.param({}, {"dataset": {"maxSamples": 40}}, id="max-samples-of-all-rows"),
        pytest.param({"training": {"optimizer": "auto"}}, {"training": {"optimizer": "adamw"}}, id="optimizer"),
        pytest.param({}, {"training": {"microBatchSize": 2}}, id="micro-batch"),
        pytest.param({}, {"training": {"packing": False}}, id="packing"),
        pytest.param({}, {"training": {"maxSteps": 4}}, id="max-steps-of-one-epoch"),
        pytest.param(
            {"training": {"maxSteps": 3}}, {"training": {"maxSteps": 3, "epochs": 2}}, id="epochs-limited-by-max-steps"
        ),
        pytest.param({}, {"training": {"warmupRatio": 0.2}}, id="same-number-of-warm-up-steps"),
        pytest.param({}, {"training": {"maxLength": 128, "longRows": "refuse"}}, id="max-length-above-all-rows"),
        pytest.param({"lora": {"targets": ["all-linear"]}}, {"lora": {"targets": ALL_BUT_ONE}}, id="all-linear"),
        pytest.param({}, {"lora": {"targets": ["v_proj", "q_proj"]}}, id="order-of-targets"),
        pytest.param({}, {"lora": {"rankPattern": {"v_proj": 4}}}, id="rank-pattern-equal-to-rank"),
        pytest.param(
            {}, {"lora": {"rank": 2, "rankPattern": {"v_proj": 4, "q_proj": 4}}}, id="rank-pattern-for-all-targets"
        ),
        pytest.param({"quantization": {"bits": 8}}, {"quantization": {"bits": 8, "type": "fp4"}}, id="type-of-4-bits"),
    ],
)
def test_equivalent_manifests_have_the_same_digest(uris, tmp_path, spec, equivalent):
    digests = {
        prepare(prepare_config(make_spec(*uris, **blocks)), work=tmp_path).digest for blocks in (spec, equivalent)
    }
    assert len(digests) == 1


def test_default_chat_loss_and_template_given_explicitly_have_the_same_digest(tmp_path):
    write_model(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = BARE
    tokenizer.save_pretrained(tmp_path / "model")
    turns = [{"role": role, "content": f"{role} says so"} for role in ("user", "assistant") * 2]
    rows = write_rows(
        tmp_path / "chats.jsonl",
        [{"messages": [*turns[:3], {**turns[3], "content": f"{number}"}]} for number in range(8)],
    )

    def digest_of(loss: str, **dataset: str) -> str:
        spec = make_spec(
            f"file://{tmp_path}/model", rows, f"file://{tmp_path}/output", training={"loss": loss}, dataset=dataset
        )
        return prepare(prepare_config(spec), work=tmp_path / "work").digest

    same = {digest_of("auto"), digest_of("assistant"), digest_of("auto", chatTemplate=BARE, format="chat")}
    others = {digest_of("completion"), digest_of("all"), digest_of("auto", chatTemplate=BARE.replace(": ", "> "))}
    assert (len(same), len(same | others)) == (1, 4)


def test_copied_model_has_the_same_commit(uris, tmp_path, model_folder):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "README.md").write_text("another model card")
    first = prepare(prepare_config(make_spec(*uris)), work=tmp_path)
    second = prepare(prepare_config(make_spec(f"file://{copy}", *uris[1:])), work=tmp_path)
    assert first.model.commit == second.model.commit


@pytest.mark.parametrize(
    ("files", "reason", "message"),
    [
        pytest.param(["config.json", "pytorch_model.bin"], Reason.UNSAFE_MODEL_FORMAT, "pytorch_model.bin", id="bin"),
        pytest.param(["config.json", "original/consolidated.00.pth"], Reason.UNSAFE_MODEL_FORMAT, ".pth", id="pth"),
        pytest.param(["config.json"], Reason.MODEL_NOT_FOUND, "no .safetensors", id="no-weights"),
        pytest.param(["model.safetensors"], Reason.MODEL_UNSUPPORTED, "no config.json", id="no-config"),
        pytest.param([], Reason.MODEL_NOT_FOUND, "holds no files", id="empty"),
    ],
)
def test_unusable_model_folder_is_rejected(uris, tmp_path, files, reason, message):
    for name in files:
        path = tmp_path / "other" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    error = rejected(make_spec(f"file://{tmp_path / 'other'}", *uris[1:]), tmp_path)
    assert (error.reason, message in error.message) == (reason, True), error.message
    assert "spec.model.uri" in error.message


def test_code_from_the_repository_is_never_run(uris, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    config = {"model_type": "novel", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('ran')")
    error = rejected(make_spec(f"file://{folder}", *uris[1:]), tmp_path)
    assert error.reason == Reason.MODEL_UNSUPPORTED
    assert "auto_map" in error.message


@pytest.mark.parametrize("target", ["query_key_value", "lm_head"])
def test_unknown_targets_are_rejected(uris, tmp_path, target):
    error = rejected(make_spec(*uris, lora={"targets": ["q_proj", target]}), tmp_path)
    assert error.reason == Reason.MODEL_UNSUPPORTED
    assert f"no linear module {target}" in error.message
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in error.message


def test_broken_rows_are_reported_before_the_model_is_resolved(uris, tmp_path):
    rows = write_rows(tmp_path / "broken.jsonl", [*instruction_rows(4), {"instruction": "x"}])
    error = rejected(make_spec("file:///nowhere", rows, uris[2]), tmp_path)
    assert error.reason == Reason.DATASET_INVALID
    assert "row 5: field 'response' (or 'output') is missing" in error.message


def test_prompts_longer_than_max_length_are_rejected(uris, tmp_path):
    error = rejected(make_spec(*uris, training={"maxLength": 16}), tmp_path)
    assert error.reason == Reason.DATASET_EMPTY
    assert "spec.training.maxLength" in error.message


def test_held_out_rows_from_a_separate_uri(uris, tmp_path):
    held_out = write_rows(tmp_path / "held-out.jsonl", instruction_rows(6))
    spec = make_spec(*uris, dataset={"evaluation": {"uri": held_out}})
    dataset = prepare(prepare_config(spec), work=tmp_path).dataset
    assert (dataset.training_rows, dataset.evaluation_rows) == (34, 6)


def test_unwritable_output_is_rejected(uris, tmp_path):
    (tmp_path / "file").write_text("in the way")
    error = rejected(make_spec(*uris[:2], f"file://{tmp_path / 'file'}"), tmp_path)
    assert "spec.output.uri: cannot write" in error.message


def mount_secret(mount: Path, role: SecretRole, **keys: str) -> None:
    (mount / role).mkdir(parents=True)
    for name, value in keys.items():
        (mount / role / name).write_text(f"{value}\n")


def test_missing_secret_is_named(uris, tmp_path):
    spec = make_spec(*uris, output={"secretRef": {"name": "s3-keys"}})
    mount_secret(tmp_path, SecretRole.OUTPUT)  # an optional volume of a Secret that does not exist is empty
    with pytest.raises(RunError, match="Secret 's3-keys' does not exist in namespace 'ml'") as caught:
        load_secrets(spec, "ml", tmp_path)
    assert caught.value.reason == Reason.SECRET_NOT_FOUND
    assert caught.value.message.startswith("spec.output.secretRef")


def test_role_without_secret_uses_the_output_secret_and_repr_hides_values(uris, tmp_path):
    names = {"output": {"secretRef": {"name": "s3-keys"}}, "model": {"secretRef": {"name": "hub"}}}
    mount_secret(tmp_path, SecretRole.OUTPUT, AWS_ACCESS_KEY_ID="AKIA", AWS_SECRET_ACCESS_KEY="hush")
    mount_secret(tmp_path, SecretRole.MODEL, HF_TOKEN="hf_hush")
    secrets = load_secrets(make_spec(*uris, **names), "ml", tmp_path)
    assert secrets.of(SecretRole.DATASET).get("AWS_SECRET_ACCESS_KEY") == "hush"
    assert secrets.of(SecretRole.MODEL).get("HF_TOKEN") == "hf_hush"
    assert "hush" not in repr(secrets) + repr(secrets.of(SecretRole.MODEL))


def repository(folder: Path, **changes) -> Repository:
    return Repository({file.name: file.read_bytes() for file in folder.iterdir()}, **changes)


def test_hub_model_is_pinned_without_downloading_weights(uris, tmp_path, model_folder):
    with FakeHub({"org/tiny": repository(model_folder)}) as hub:
        config = prepare_config(make_spec(HUB_MODEL, *uris[1:]), platform=Platform(hub_endpoint=hub.endpoint))
        prepared = prepare(config, work=tmp_path / "work")
    assert prepared.model.commit == COMMIT
    weights = (model_folder / "model.safetensors").stat().st_size
    assert 0 < hub.sent["model.safetensors"] < weights, "only the header is requested"


def test_hub_without_ranges_gives_the_same_result(uris, tmp_path, model_folder):
    """A proxy that ignores the Range header sends whole files, of which only the header is read."""
    with FakeHub({"org/tiny": repository(model_folder, ranges=False)}) as hub:
        config = prepare_config(make_spec(HUB_MODEL, *uris[1:]), platform=Platform(hub_endpoint=hub.endpoint))
        assert prepare(config, work=tmp_path / "work").model.commit == COMMIT


@pytest.mark.parametrize(
    ("changes", "token", "reason"),
    [
        pytest.param({"token": "t"}, None, Reason.GATED_MODEL_NO_ACCESS, id="401"),
        pytest.param({"token": "t"}, "wrong", Reason.GATED_MODEL_NO_ACCESS, id="403"),
        pytest.param({"revisions": ("v9",)}, None, Reason.MODEL_NOT_FOUND, id="404-revision"),
        pytest.param({"status": 429}, None, Reason.HUB_RATE_LIMITED, id="429"),
        pytest.param({"status": 500}, None, Reason.HUB_UNAVAILABLE, id="500"),
    ],
)
def test_hub_errors_map_to_reasons(  # noqa: PLR0917 (fixtures and a table)
    uris, tmp_path, model_folder, monkeypatch, changes, token, reason
):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    spec = make_spec(HUB_MODEL, *uris[1:])
    with FakeHub({"org/tiny": repository(model_folder, **changes)}) as hub:
        error = rejected(spec, tmp_path, Platform(hub_endpoint=hub.endpoint))
    assert error.reason == reason, error.message
    assert "spec.model.uri: org/tiny" in error.message
    assert "wrong" not in error.message


def test_gated_model_is_readable_with_the_right_token(uris, tmp_path, model_folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "sesame")
    with FakeHub({"org/tiny": repository(model_folder, token="sesame")}) as hub:
        config = prepare_config(make_spec(HUB_MODEL, *uris[1:]), platform=Platform(hub_endpoint=hub.endpoint))
        assert prepare(config, work=tmp_path / "work").model.commit == COMMIT


def test_unreachable_hub_is_reported(uris, tmp_path):
    error = rejected(make_spec(HUB_MODEL, *uris[1:]), tmp_path, Platform(hub_endpoint="http://127.0.0.1:9"))
    assert error.reason == Reason.HUB_UNAVAILABLE


def test_rows_are_read_from_the_hub(uris, tmp_path):
    content = Path(uris[1].removeprefix("file://")).read_bytes()
    repositories = {"datasets/org/rows": Repository({"data/train.jsonl": content})}
    with FakeHub(repositories) as hub:
        spec = make_spec(uris[0], "hf://datasets/org/rows/data/train.jsonl", uris[2])
        config = prepare_config(spec, platform=Platform(hub_endpoint=hub.endpoint))
        assert prepare(config, work=tmp_path / "work").dataset.training_rows == 32


@pytest.fixture
def mirror(tmp_path, model_folder) -> str:
    folder = tmp_path / "mirror" / "models--org--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots").mkdir()
    (folder / "snapshots" / COMMIT).symlink_to(model_folder, target_is_directory=True)
    return f"file://{tmp_path / 'mirror'}"


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_hub_mirror_is_used_instead_of_the_hub(uris, tmp_path, mirror, revision):
    spec = make_spec(HUB_MODEL, *uris[1:], model={"revision": revision})
    prepared = prepare(prepare_config(spec, platform=Platform(hub_mirror=mirror)), work=tmp_path / "work")
    assert prepared.model.commit == COMMIT


@pytest.mark.parametrize(("name", "revision"), [("org/other", "main"), ("org/tiny", "v9"), ("org/tiny", "f" * 40)])
def test_missing_model_in_the_mirror_is_rejected(uris, tmp_path, mirror, name, revision):
    spec = make_spec(f"hf://{name}", *uris[1:], model={"revision": revision})
    error = rejected(spec, tmp_path, Platform(hub_mirror=mirror))
    assert error.reason == Reason.MODEL_NOT_FOUND
    assert f"has no {name} at revision {revision}" in error.message


def test_model_and_rows_are_read_from_claims(uris, tmp_path, model_folder, monkeypatch):
    monkeypatch.setattr(store, "CLAIMS_MOUNT", str(tmp_path / "claims"))
    (tmp_path / "claims/rows/parts").mkdir(parents=True)
    (tmp_path / "claims/models").symlink_to(model_folder.parent, target_is_directory=True)
    for part in ("b", "a"):
        write_rows(tmp_path / f"claims/rows/parts/{part}.jsonl", instruction_rows(20))
    spec = make_spec(f"pvc://models/{model_folder.name}", "pvc://rows/parts/", uris[2])
    prepared = prepare(prepare_config(spec), work=tmp_path / "work")
    assert prepared.model.uri.startswith("pvc://models/")
    assert (prepared.dataset.training_rows, prepared.dataset.evaluation_rows) == (32, 8)
    error = rejected(make_spec(spec.model.uri, "pvc://rows/none.jsonl", uris[2]), tmp_path)
    assert (error.reason, "none.jsonl" in error.message) == (Reason.DATASET_NOT_FOUND, True)
