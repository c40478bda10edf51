from pathlib import Path

from examples.quickstart import demo, make_data, make_model
from qlora_cli.manifests.loader import parse_manifest
from qlora_cli.manifests.yaml_documents import read_documents
from qlora_planner.validation import CLUSTER_RULES

JOB = Path(demo.__file__).with_name("job.yaml")


def test_the_quickstarts_manifest_is_valid_and_speaks_of_its_own_model_and_files():
    (document,) = read_documents(str(JOB))
    spec = parse_manifest(document, CLUSTER_RULES).spec
    assert spec.model.uri == f"hf://{make_model.MODEL}"
    assert spec.dataset.uri == f"s3://quickstart/{make_data.TRAIN}"
    assert spec.dataset.evaluation.uri == f"s3://quickstart/{make_data.HELD_OUT}"
    assert spec.resources.gpus_per_node == 0


def test_an_editor_finds_the_schema():
    first = JOB.read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=../../crds/qlorajob.schema.json"
    assert (JOB.parent / first.partition("=")[2]).is_file()


def test_the_demos_next_step_is_one_pass_over_the_rows():
    (document,) = read_documents(str(JOB))
    batch = parse_manifest(document, CLUSTER_RULES).spec.training.global_batch_size
    rows = len((make_data.DATA / make_data.TRAIN).read_text().splitlines())
    assert -(-rows // batch) == demo.ALL_STEPS


def test_a_question_is_the_instruction_without_its_headings():
    assert demo.question("### Instruction:\nWhat does `a.b` do?\n\n### Response:\n") == "What does `a.b` do?"
