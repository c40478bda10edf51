"""Control characters and invisible ones become escapes that Python, JSON, YAML and bash read back."""

import json
import subprocess
import sys
import unicodedata

import pytest
import yaml

from qlora_api.escapes import cut_escaped, escape_json, escape_line, escape_text, shell_command

UNPRINTABLE = [
    chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) in {"Cc", "Cf", "Cs", "Zl", "Zp"}
]
IGNORABLE = "\u034f\u115f\u1160\u17b4\u180b\u3164\ufe0f\uffa0\U000e0100"
"""Of other categories, and invisible all the same: Default_Ignorable_Code_Point."""
HONEST = (
    "naïve Σ 漢字 \U0001f600 C:\\temp ⟦label⟧",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",  # a family
    "\u2764\ufe0f 1\ufe0f\u20e3",  # a red heart, a keycap
    "\U0001f469\U0001f3fd\u200d\U0001f680",  # an astronaut
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",  # Persian: I want
    "\u0915\u094d\u200d\u0937",  # Hindi, a half letter
)


@pytest.mark.parametrize("escape", [escape_text, escape_line, escape_json])
def test_no_unprintable_character_is_left(escape):
    left = [hex(ord(character)) for character in UNPRINTABLE if character in escape(f"a{character}b")]
    assert left == ([] if escape is escape_line else ["0x9", "0xa"])


@pytest.mark.parametrize(
    "character", ["\x1b", "\n", "\u202e", "\U000e0041", "\U0001f468\u200d\U0001f469", "é", "\\x41"]
)
@pytest.mark.parametrize("max_bytes", [None, 40])
def test_cut_line_ends_in_no_part_of_an_escape(character: str, max_bytes: int | None):
    """Wherever it is cut, what is left is the start of the text, as it would be escaped alone."""
    text = f"{character}x" * 20
    line = escape_line(text)
    starts = {escape_line(text[:length]) for length in range(len(text) + 1)}
    for limit in range(len(line) + 2):
        cut = cut_escaped(line, limit, max_bytes)
        assert len(cut) <= limit
        assert len(cut.encode()) <= (max_bytes or len(line) * 4)
        assert cut in starts or character == "\\x41"
        assert not cut.endswith(("\u200d", "\\", "\\x1", "\\u202", "\\U000e004"))


@pytest.mark.parametrize("character", IGNORABLE)
def test_ignorable_character_is_escaped(character: str):
    assert escape_text(f"a{character}b") == f"a{ascii(character)[1:-1]}b"


@pytest.mark.parametrize("text", HONEST)
def test_honest_text_is_unchanged(text: str):
    assert (escape_text(text), escape_line(text), escape_json(text)) == (text, text, text)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("\x1b[31m", r"\x1b[31m"),
        ("\x9b31m", r"\u009b31m"),
        ("a\r\nb\tc", r"a\r\nb\tc"),
        ("a\u202eb\U000e0041", r"a\u202eb\U000e0041"),
        ("a\ud800b", r"a\ud800b"),
        ("a\u200db", r"a\u200db"),
        ("\U0001f600\ufe01\ufe02", "\U0001f600\ufe01\\ufe02"),
    ],
)
def test_line_has_escapes(text: str, line: str):
    assert escape_line(text) == line


def test_text_keeps_its_lines():
    assert escape_text("a\r\n\tb\nc\rd\x0b") == "a\r\n\tb\nc\\rd\\x0b"


def test_json_keeps_its_content():
    content = {character: [f"a{character}b"] for character in UNPRINTABLE}
    document = escape_json(json.dumps(content, ensure_ascii=False, indent=1))
    assert json.loads(document) == content


def test_escapes_are_those_of_yaml():
    characters = "".join(character for character in UNPRINTABLE if not "\ud800" <= character <= "\udfff")
    assert yaml.safe_load(f'"{escape_line(characters)}"') == characters


WORDS = (
    "plain", "two words", "", "$(touch canary)", "`touch canary`", "a;touch canary", "a'b\"c", "a\ntouch canary\n",
    "*", "~", "-x", "!!", "a\\", "\x1b[31m'\\", "\u202e\u0085\U000e0041", "\r\t\x7f", "${IFS}", "#", "a=b&c|d>e<f",
)  # fmt: skip


def test_shell_gets_the_words(tmp_path):
    command = shell_command("printf", r"%s\0", *WORDS)
    assert "\n" not in command
    assert escape_text(command) == command
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, check=True, cwd=tmp_path, env={"LC_ALL": "C.UTF-8"}
    )
    assert done.stdout.decode().split("\0")[:-1] == list(WORDS)
    assert list(tmp_path.iterdir()) == []
