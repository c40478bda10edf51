"""Nothing runs that a model, an adapter or a folder of downloads brings along, and nobody is asked whether it may."""

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NoReturn

import botocore.session
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from qlora_api import names
from qlora_api.local_requests import MergeRequest
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import LoraSpec
from qlora_trainer.errors import RunError
from qlora_trainer.inference.compatibility import check_adapter_config
from qlora_trainer.merge_job import merge_published
from qlora_trainer.model.adapter import lora_config
from qlora_trainer.model.architecture import load_tokenizer
from qlora_trainer.storage.snapshots import text_files
from tests.make import make_spec
from tests.unit.security.test_hostile_manifests import render
from tests.unit.trainer.conftest import THIRD_PARTY_WARNINGS
from tests.unit.trainer.families import family_config
from tests.unit.trainer.tiny import make_tokenizer, write_model
from tests.unit.trainer.trained import PLAIN, RESOLVER, write_published
from tests.unit.trainer.tuned import NF4

pytestmark = [pytest.mark.filterwarnings(warning) for warning in THIRD_PARTY_WARNINGS]

EVIL: Final = "import pathlib\npathlib.Path(__file__).with_name('PWNED').touch()\nclass Evil: pass\n"


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where transformers asks a person whether to run code."""

    def ask(question: str = "") -> NoReturn:
        pytest.fail(f"asked: {question}")

    monkeypatch.setattr(builtins, "input", ask)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("result")
    write_model(folder / "model")
    return write_published(folder / "0123", folder / "model", PLAIN, NF4)


def change_json(file: Path, **changes: Any) -> Callable[[], Any]:
    """Change a file, and return what undoes it."""
    original = file.read_text() if file.exists() else None
    file.write_text(json.dumps(json.loads(original or "{}") | changes))
    return file.unlink if original is None else lambda: file.write_text(original)


def test_adapter_of_the_trainer_is_accepted(adapter: Path) -> None:
    check_adapter_config(adapter)


# PEFT prepares patterns for experts that all-linear then does not ask for.
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("targets", [("q_proj",), ("all-linear",)])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gemma3"])
def test_settings_that_peft_rewrites_are_accepted(tmp_path: Path, family: str, targets: tuple[str, ...]) -> None:
    """PEFT changes the settings of models whose experts transformers stacks in one weight."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(family_config(family))
    lora = LoraSpec(rank=4, dropout=0, targets=targets)
    get_peft_model(model, lora_config(lora, model)).peft_config["default"].save_pretrained(tmp_path)
    check_adapter_config(tmp_path)


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param({"peft_type": "SHADOW", "shadow_model": "evil/model"}, id="model-of-the-hub"),
        pytest.param({"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": "evil/tokenizer"}, id="tokenizer"),
        pytest.param({"peft_type": "XLORA", "adapters": {"0": "evil/adapter"}}, id="adapter-of-the-hub"),
        pytest.param({"peft_type": None}, id="no-type"),
        pytest.param({"auto_mapping": {"parent_library": "evil", "base_model_class": "Evil"}}, id="auto-mapping"),
        pytest.param({"megatron_config": {}, "megatron_core": "evil"}, id="module-to-import"),
        pytest.param({"megatron_core": "evil"}, id="module-to-import-later"),
        pytest.param({"init_lora_weights": "corda", "corda_config": {"cache_file": "evil.pt"}}, id="pickle"),
        pytest.param({"corda_config": {"covariance_file": "/work/evil.pt"}}, id="another-pickle"),
        pytest.param({"init_lora_weights": "eva"}, id="initialization"),
        pytest.param({"init_lora_weights": "pissa_niter_999999999"}, id="endless-initialization"),
        pytest.param({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 10**9}}, id="loftq"),
        pytest.param({"layer_replication": [[0, 10**9]]}, id="layers-without-bound"),
        pytest.param({"target_modules": "(a+)+$"}, id="regular-expression"),
        pytest.param({"target_modules": ["(a+)+$"]}, id="list-of-expressions"),
        pytest.param({"exclude_modules": "(a+)+$"}, id="excluding-expression"),
        pytest.param({"rank_pattern": {"(a+)+": 4}}, id="rank-expression"),
        pytest.param({"alpha_pattern": {"(.*)*x": 4}}, id="alpha-expression"),
        pytest.param({"layers_pattern": ["(a+)+"], "layers_to_transform": [0]}, id="layers-expression"),
        pytest.param({"arrow_config": {"top_k": 10**9}}, id="router"),
        pytest.param({"trainable_token_indices": [0]}, id="tokens"),
        pytest.param({"bias": "all"}, id="biases"),
    ],
)
def test_adapter_with_a_setting_of_somebody_else_is_refused(adapter: Path, setting: dict[str, Any]) -> None:
    undo = change_json(adapter / "adapter_config.json", **setting)
    try:
        with pytest.raises(
            RunError, match=r"^the adapter's adapter_config\.json: \w+ is .*; use the adapter"
        ) as refusal:
            check_adapter_config(adapter)
    finally:
        undo()
    assert refusal.value.reason is Reason.INVALID_SPEC
    assert any(f": {name} is " in refusal.value.message for name in setting)


TOKENIZERS: Final = [
    pytest.param(
        {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}, id="auto-map"
    ),
    pytest.param({"tokenizer_class": "EvilTokenizer", "auto_map": ["evil.Evil", None]}, id="old-auto-map"),
    pytest.param({"tokenizer_class": "AutoProcessor", "auto_map": {"AutoProcessor": "evil.Evil"}}, id="processor"),
    pytest.param({"tokenizer_class": "AutoProcessorFast", "auto_map": {"AutoProcessor": "evil.Evil"}}, id="fast"),
    pytest.param(
        {"tokenizer_class": "AutoImageProcessor", "auto_map": {"AutoImageProcessor": "evil.Evil"}}, id="image"
    ),
    pytest.param({"tokenizer_class": "AutoTokenizer", "auto_map": {}}, id="itself"),
    pytest.param({"tokenizer_class": "LlamaForCausalLM"}, id="model"),
    pytest.param({"tokenizer_class": "pipeline"}, id="function"),
    pytest.param({"tokenizer_class": "utils"}, id="module"),
]


@pytest.mark.parametrize("settings", TOKENIZERS)
def test_tokenizer_with_code_or_another_class_is_refused_without_a_question(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text(EVIL)
    change_json(tmp_path / "tokenizer_config.json", **settings)
    change_json(tmp_path / "processor_config.json", auto_map={"AutoProcessor": "evil.Evil"})
    with pytest.raises(RunError) as refusal:
        load_tokenizer(tmp_path)
    assert refusal.value.reason is Reason.MODEL_UNSUPPORTED
    assert refusal.value.message.startswith("spec.model.uri: its tokenizer cannot be loaded: ")
    assert not (tmp_path / "PWNED").exists()


def test_merge_refuses_an_adapter_with_code_before_it_merges(adapter: Path, tmp_path: Path) -> None:
    (adapter / "evil.py").write_text(EVIL)
    undo = change_json(
        adapter / "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map={"AutoTokenizer": [None, "evil.Evil"]},
    )
    request = MergeRequest(adapter=f"file://{adapter}", target=str(tmp_path / "merged"))
    try:
        with pytest.raises(RunError, match="its tokenizer cannot be loaded"):
            merge_published(request, RESOLVER, tmp_path / "work")
    finally:
        undo()
        (adapter / "evil.py").unlink()
    assert not (adapter / "PWNED").exists()
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "name",
    [
        "modeling_evil.py", "custom_generate/generate.py", "requirements.txt", "adapter_config.json", "evil.json",
        "additional_chat_templates/evil.jinja", "pytorch_model.bin", "model.onnx", "model.gguf", "training_args.bin",
        "scheduler.pt", "onnx/config.json", "trainer_state.json", ".netrc", "..model", "sub/tokenizer.model",
        "README.md", "pytorch_model.bin.index.json", "special.jinja",
    ],
)  # fmt: skip
def test_file_that_transformers_need_not_read_is_not_fetched(name: str) -> None:
    assert text_files([name]) == ()


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
        "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
        "spiece.model", "model.safetensors.index.json", "tokenizer.4.0.0.json", "sentencepiece.bpe.model",
    ],
)  # fmt: skip
def test_file_of_a_model_or_tokenizer_is_fetched(name: str) -> None:
    assert text_files([name]) == (name,)


def pods() -> list[dict[str, str]]:
    """Return the variables of the prepare pod and of the training pod."""
    jobs = [child for child in render(make_spec()) if child["kind"] == "Job"]
    containers = [job["spec"]["template"]["spec"]["containers"][0] for job in jobs]
    return [{entry["name"]: entry["value"] for entry in container["env"]} for container in containers]


@pytest.mark.parametrize("index", [0, 1], ids=["prepare", "train"])
def test_pod_reads_no_settings_from_folders_of_downloads(index: int) -> None:
    variables = pods()[index]
    ignored = {"AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "HF_TOKEN_PATH", "NETRC"}
    assert {name: variables[name] for name in ignored} == dict.fromkeys(ignored, "/dev/null")
    # Downloads go to folders of the work folder: hub, snapshots, adapters, rows.
    assert variables["HOME"] == f"{names.WORK_MOUNT}/home"


def test_planted_aws_settings_are_ignored_and_a_workload_identity_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """IRSA gives a pod a role and a file with a token; credential_process would run a command, and came first."""
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/config").write_text(
        "[default]\ncredential_process = touch /tmp/PWNED\nendpoint_url = http://evil\n"
    )
    (tmp_path / "token").write_text("token")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, pods()[0][name])
    session = botocore.session.Session()
    assert session.full_config == {"profiles": {}}
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/trainer")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    identity = botocore.session.Session().get_component("credential_provider").load_credentials()
    assert identity.method == "assume-role-with-web-identity"
