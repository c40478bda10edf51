"""Names and links in buckets and claims are untrusted and never point outside their folder."""

from pathlib import Path

import boto3
import pytest
from jinja2.exceptions import SecurityError
from moto import mock_aws

from qlora_api.runconfig import S3Config
from qlora_trainer.data.chat_template import ChatTemplate
from qlora_trainer.data.rows import Chat, RowError
from qlora_trainer.errors import RunError
from qlora_trainer.storage import store
from qlora_trainer.storage.credentials import Credentials
from qlora_trainer.storage.local_store import FileStore
from qlora_trainer.storage.s3 import S3Store
from qlora_trainer.storage.store import DATASET_FIELD
from tests.unit.trainer.tiny import make_tokenizer


@pytest.mark.parametrize("key", ["rows/../../../work/x.jsonl", "rows//etc/x.jsonl", "rows/a/../../x.jsonl"])
def test_s3_key_outside_the_target_folder_is_refused(key: str) -> None:
    keys = Credentials({"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"})
    with mock_aws():
        client = boto3.client("s3", region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test")
        client.create_bucket(Bucket="data")
        client.put_object(Bucket="data", Key=key, Body=b"{}")
        with pytest.raises(RunError, match=r"spec\.dataset\.uri: an object below s3://data/rows .*; rename it"):
            S3Store("s3://data/rows/", DATASET_FIELD, keys, S3Config()).list()


@pytest.fixture
def claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a claim next to a Secret, as in a pod."""
    monkeypatch.setattr(store, "CLAIMS_MOUNT", str(tmp_path / "claims"))
    (tmp_path / "claims/rows/data").mkdir(parents=True)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/key").write_text("secret")
    return tmp_path / "claims/rows"


@pytest.mark.parametrize("target", ["../../../secrets/key", "/etc/hostname"])
def test_symlink_out_of_claim_is_refused(claim: Path, target: str) -> None:
    (claim / "data/x.jsonl").symlink_to(target)
    for read in (lambda rows: rows.list(), lambda rows: rows.read("x.jsonl"), lambda rows: rows.path_of("x.jsonl")):
        with pytest.raises(RunError, match=r"x\.jsonl points outside its claim; put the file itself there"):
            read(FileStore("pvc://rows/data/", DATASET_FIELD))


def test_symlink_within_claim_is_followed(claim: Path) -> None:
    """The cache of a hub consists of symbolic links."""
    (claim / "blob").write_text("{}")
    (claim / "data/x.jsonl").symlink_to("../blob")
    rows = FileStore("pvc://rows/data/", DATASET_FIELD)
    assert [entry.path for entry in rows.list()] == ["x.jsonl"]
    assert rows.read("x.jsonl") == b"{}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for n in range(999999999) %}{% endfor %}",
        "{% macro deeper() %}{{ deeper() }}{% endmacro %}{{ deeper() }}",
    ],
)
def test_chat_template_cannot_escape_its_sandbox(source: str) -> None:
    template = ChatTemplate(make_tokenizer(), source)
    with pytest.raises(RowError, match="the chat template rejects it") as refusal:
        template.render_prompt([{"role": "user", "content": "Hello"}], Chat(()))
    assert isinstance(refusal.value.__cause__, SecurityError | OverflowError | RecursionError)
