"""The values' schema and table say what the comments of values.yaml say."""

import pytest

from qlora_codegen.helm_values import ValuesError, build_values_schema, read_values, render_values_table

VALUES = """\
# A remark on the file.

group:
  # @schema {minimum: 1}
  # -- How many
  # of them.
  number: 2
  # @schema {enum: [a, b]}
  # -- Which one.
  letter: a
# @schema {items: {type: string}}
# -- Their names, with | between.
names: []
# @schema {additionalProperties: {type: string}}
# -- Labels.
labels: {team: ml}
# @schema {type: [integer, "null"]}
# -- No limit by default.
limit: null
"""


def test_schema_is_strict_and_has_defaults():
    assert build_values_schema(read_values(VALUES)) == {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of qlora-operator",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "group": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "number": {"description": "How many of them.", "default": 2, "type": "integer", "minimum": 1},
                    "letter": {"description": "Which one.", "default": "a", "type": "string", "enum": ["a", "b"]},
                },
            },
            "names": {
                "description": "Their names, with | between.",
                "default": [],
                "type": "array",
                "items": {"type": "string"},
            },
            "labels": {
                "description": "Labels.",
                "default": {"team": "ml"},
                "type": "object",
                "additionalProperties": {"type": "string"},
            },
            "limit": {"description": "No limit by default.", "default": None, "type": ["integer", "null"]},
            "global": {"type": "object"},
        },
    }


def test_table_matches_helm_docs():
    assert list(render_values_table(read_values(VALUES)))[2:] == [
        "| group.number | int | `2` | How many of them. |",
        '| group.letter | string | `"a"` | Which one. One of `a`, `b`. |',
        "| names | list | `[]` | Their names, with \\| between. |",
        '| labels | object | `{"team": "ml"}` | Labels. |',
        "| limit | int or null | `null` | No limit by default. |",
    ]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        pytest.param("lonely: 1\n", "lonely has no description", id="no-description"),
        pytest.param("# -- Above.\n\nfar: 1\n", "far has no description", id="comment-above-a-gap"),
        pytest.param("# -- A limit.\nlimit: null\n", "limit has no default", id="no-type"),
    ],
)
def test_missing_description_is_named(text: str, named: str):
    with pytest.raises(ValuesError, match=named):
        build_values_schema(read_values(text))
