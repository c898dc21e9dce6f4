"""Prompts that hold anything: the same from every kind of file, and harmless wherever they show."""

import ast
import csv
import functools
import html
import json
import os
import re
import shlex
import time

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ImageFont

from gadjax.cli.main import main
from gadjax.data.embeddings import Origin, open_embeddings, write_embeddings
from gadjax.data.prompts import MAX_PROMPT, check_prompt, read_prompts
from gadjax.errors import InputError, escape_nonprintable, short_repr
from gadjax.evaluation.metric_catalogue import catalogue
from gadjax.evaluation.oracles import WORLDS
from gadjax.evaluation.report import as_markdown
from gadjax.evaluation.results import Evaluation, Row
from gadjax.formats.model_card import Export, card
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.io.image_grid import grid, wrap_text
from gadjax.io.markdown import escape_markdown

HOSTILE = (
    "# a | b `c` *d* _e_ [f](http://x) ![g](h)",
    "<script>alert(1)</script> &lt; &amp; &#35;",
    "| --- |\n\n## Verification\n\n```\n</td>",
    "\u202eleft to right\u202c \u200f\u200d",
    "\x1b[2J\x1b]0;title\x07\x9b31m\x08\x7f",
    "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven\rnine",
    "trailing \\",
    "__a__ _b_ c_d",
    "\\| \\\\| $x$ ~~y~~ ~z~",
    "1. one",
    "- minus",
    "+ plus",
    "=== ",
    "    four spaces",
    "圆 👩‍👧 é",
    "-->|<!--",
)
# Every character but NUL and halves of pairs, many of those that mean something to someone.
MEANING = st.sampled_from(
    list("|`*_[]<>#~&$\\!-+=1.()\n\r\t\"' ,;:{}") + ["\u2028", "\x85", "\x1b"]
)
CHARACTERS = st.characters(exclude_categories=("Cs",), exclude_characters="\0")
TEXT = st.text(st.one_of(CHARACTERS, MEANING), max_size=40).map(str.strip).filter(bool)
FAST = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path, message):
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@FAST
@given(st.lists(TEXT, min_size=1, max_size=6), st.sampled_from(["\n", "\r\n"]))
def test_what_is_written_comes_back(tmp_path, texts, end):
    records = [json.dumps({"prompt": text}) for text in texts[::2]]
    records += [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts[1::2]]
    jsonl = write(tmp_path / "p.jsonl", end.join(records) + end)
    assert read_prompts(jsonl) == [*texts[::2], *texts[1::2]]
    # A mark at the start of a line is taken for a byte order mark, also inside quotes.
    texts = [text.replace("\n\ufeff", "\n") for text in texts]
    with open(tmp_path / "p.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator=end)
        writer.writerows([["id", "prompt"], *enumerate(texts)])
    assert read_prompts(tmp_path / "p.csv") == texts
    lines = [re.sub("[\r\n]", " ", text).strip().removeprefix("\ufeff").strip() for text in texts]
    if lines := [line for line in lines if line and not line.startswith("\ufeff")]:
        assert read_prompts(write(tmp_path / "p.txt", end.join(lines))) == lines


@FAST
@given(st.binary(max_size=80))
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path, data):
    for name in ("p.txt", "p.jsonl", "p.csv"):
        start = b"prompt\n" if name == "p.csv" else b""
        try:
            found = read_prompts(write(tmp_path / name, start + data))
        except InputError as error:
            assert str(error).isprintable() and "; expected " in str(error)
        else:
            assert found and all(text == text.strip() and text for text in found)


def test_only_a_line_feed_ends_a_line(tmp_path):
    texts = ["a\u2028b", "c\x85d", "e\x0bf\x0cg", "h\x1ci", "\u202ej\u200f"]
    path = write(tmp_path / "p.txt", "\n".join(texts))
    assert read_prompts(path) == texts
    # ... and what is written of them has as many lines for every reader.
    (tmp_path / "out").mkdir()
    null = {"text": np.zeros((2, 3)), "mask": np.ones(2)}
    batch = {name: np.repeat(value[None], len(texts), 0) for name, value in null.items()}
    write_embeddings(tmp_path / "out", texts, [batch], null, origin=Origin("a"))
    assert len((tmp_path / "out" / "prompts.jsonl").read_text().splitlines()) == len(texts)
    assert open_embeddings(tmp_path / "out").prompts == tuple(texts)


def test_marks_doubles_and_empty_ones(tmp_path):
    joined = b"\xef\xbb\xbfa\r\n\r\nb\n\xef\xbb\xbfc\na\n \t\n\xef\xbb\xbf\n"
    assert read_prompts(write(tmp_path / "p.txt", joined)) == ["a", "b", "c", "a"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.txt", "red\rgreen\rblue", "p.txt:1: found a lone CR; expected lines that end in LF"),
        ("p.csv", "prompt\nred\rgreen\n", "p.csv:2: found broken CSV .new-line character"),
        ("p.txt", "a\nred\0circle", "p.txt:2: found a NUL character"),
        ("p.txt", "red".encode("utf-16-le"), "p.txt:1: found a NUL character"),
        ("p.jsonl", '{"prompt": "a\\u0000"}', "p.jsonl:1: found a NUL character"),
        ("p.csv", "prompt\na\n\0\n", "p.csv:3: found a NUL character"),
        ("p.jsonl", '{"prompt": "a\\ud800b"}', "p.jsonl:1: found half of a surrogate pair"),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}', "'prompt' more than once"),
        ("p.jsonl", '{"prompt": {"\x7f\u202e": 1}}', r"found \{'\\x7f\\u202e': 1\} as 'prompt'"),
        ("p.jsonl", '{"prompt": ' + "[" * 60 + "]" * 60 + "}", r"found \[\[\[\[?\.\.\.\]+ as"),
        ("p.jsonl", '{"prompt": "\x1b"}', r"found broken JSON \(Invalid control character"),
        ("p.txt", "ä" * (MAX_PROMPT // 2) + "b", "p.txt:1: found 131073 bytes of text"),
        ("p.jsonl", json.dumps({"prompt": "x" * 10**7}), "p.jsonl:1: found a line of more than"),
        ("p.csv", "prompt\n" + "x" * 10**7, "p.csv:2: found a line of more than"),
        ("p.txt", "x" * 10**7, "p.txt:1: found a line of more than"),
    ],
)
def test_what_no_tokenizer_should_see(tmp_path, name, content, message):
    refused(write(tmp_path / name, content), message)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.txt")
    refused(tmp_path / "p.txt", "found no regular file; expected a file of prompts")
    (tmp_path / "z.txt").symlink_to("/dev/zero")
    refused(tmp_path / "z.txt", "found no regular file")


def test_the_longest_prompt_fits_into_every_file(tmp_path):
    for text in ("\x01" * MAX_PROMPT, "圆" * (MAX_PROMPT // 3), "👩" * (MAX_PROMPT // 4)):
        line = json.dumps({"prompt": text, "file": "x" * 1000})
        assert read_prompts(write(tmp_path / "p.jsonl", line)) == [text]
        assert read_prompts(write(tmp_path / "p.csv", "prompt\n" + text)) == [text.strip()]


def test_tokenizers_take_whatever_is_let_through(tmp_path):
    from gadjax.models.text.tokenizer import Tokenizer, build_word_tokenizer

    tokenizer = Tokenizer(build_word_tokenizer(["red", "circle"]))

    @FAST
    @given(TEXT)
    def check(text):
        check_prompt(text, "here")
        ids, mask = tokenizer(text, 6)
        assert ids.shape == mask.shape == (1, 6) and mask[0, 0] == 1

    check()


# Where they show.


@FAST
@given(st.one_of(TEXT, st.sampled_from(HOSTILE)))
def test_the_escape_undone_is_the_text(text):
    escaped, plain = escape_markdown(text), escape_nonprintable(" ".join(text.split()))
    assert escaped.isprintable() and not set(escaped) & set("<>")
    assert not re.search(r"(?<!\\)(\\\\)*[|`*\[\]#~$]", escaped)
    assert not escaped.startswith(("-", "+", "=", "#")) and not re.match(r"\d+[.)]", escaped)
    assert html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", escaped)) == plain


@functools.cache
def renderer():
    found = pytest.importorskip("markdown_it").MarkdownIt("commonmark")
    return found.enable(["table", "strikethrough"])


PLACES = ("# {}", "- {}", "- name: {}", "{}", "made of {} by")


@FAST
@given(st.one_of(TEXT, st.sampled_from(HOSTILE)))
def test_markdown_shows_the_text_and_nothing_else(text):
    reader = renderer()
    escaped, plain = escape_markdown(text), escape_nonprintable(" ".join(text.split()))
    for place in PLACES:
        expected = reader.parse(place.format("word"))
        found = reader.parse(place.format(escaped))
        assert [t.type for t in found] == [t.type for t in expected], place
        (inline,) = (t for t in found if t.type == "inline")
        assert {t.type for t in inline.children} <= {"text", "text_special"}
        assert "".join(t.content for t in inline.children) == place.format(plain).lstrip("#- ") or (
            place in ("# {}", "- {}", "{}") and "".join(t.content for t in inline.children) == plain
        )
    rows = f"| a | b |\n|---|---|\n| {escaped} | 2 |\n"
    cells = [t for t in reader.parse(rows) if t.type == "inline"]
    assert len(cells) == 4 and cells[3].content == "2"
    assert "".join(t.content for t in cells[2].children) == plain


def test_a_report_stays_a_report():
    images = np.zeros((1, 1, 8, 8, 3), np.float32)
    listed = catalogue(WORLDS["none"])

    def made(text):
        row = Row("student", f"{text}, 4 steps", SamplingConfig(), 4, images, {})
        settings = {"teacher": text, text: 3}
        return as_markdown(Evaluation([row], listed, {"frechet": text}), settings)

    plain = [re.sub("word", "", line) for line in made("word").split("\n")]
    for text in HOSTILE:
        lines = made(text).splitlines()  # also at U+2028 and the like
        assert len(lines) == len(plain) - 1 and all(line.isprintable() for line in lines)
        assert [line[:2] for line in lines] == [line[:2] for line in plain[:-1]]
        assert "<script" not in made(text)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_model_card_stays_a_card(text):
    metric = {"value": 1.0, "low": None, "high": None}
    rows = {"a": {"label": text, "evaluations": 4, "metrics": {text: metric}}}
    export = Export(
        **{"name": text, "sampling": SamplingConfig(4), "times": (3.0,), "step": 1, "part": "ema"},
        config={
            "guidance": 2.0,
            "batch": 8,
            "objective": {"dmd": {"kind": text}},
            "student": {"trained": text},
        },
        **{"teacher": text, "fingerprint": "a", "latent": (8, 8, 4), "pipeline": "P"},
        **{"arguments": {"a": text}, "license": text, "report": {"rows": rows}},
    )
    found = card(export, None)
    lines = found.splitlines()
    assert all(line.isprintable() for line in lines)
    end = lines.index("---", 1)
    front, text_of_card = yaml.safe_load("\n".join(lines[1:end])), "\n".join(lines[end:])
    assert "<script" not in text_of_card.split("```")[0]
    assert front["license"] == front["base_model"] == escape_nonprintable(text)
    headings = [line for line in lines if line.startswith("#")]
    assert headings[1:] == ["## Use", "## Measured", "## Verification"]
    fences = [number for number, line in enumerate(lines) if line.startswith("```")]
    assert len(fences) == 4
    code = ast.walk(ast.parse("\n".join(lines[fences[0] + 1 : fences[1]])))
    calls = [n for n in code if isinstance(n, ast.Call) and hasattr(n.func, "attr")]
    (call,) = (n for n in calls if n.func.attr == "from_pretrained")
    assert call.args[0].value == text
    command = shlex.split("\n".join(lines[fences[2] + 1 : fences[3]]))
    assert command[3] == escape_nonprintable(text) and command[4] == "--prompts"


def test_errors_carry_no_escape_sequences_to_the_terminal(tmp_path, capsys):
    name = "\x1b[2Jred\ncircle\u202e.parquet"
    assert main(["sample", "--model", "x", "--out", str(tmp_path / "o"), "--prompts", name]) == 2
    stderr = capsys.readouterr().err
    assert (
        stderr.count("\n") == 1 and stderr[:-1].isprintable() and "\\x1b[2Jred\\ncircle" in stderr
    )
    assert main(["\x1b[2J"]) == 2
    assert capsys.readouterr().err[:-1].isprintable()
    flags = ["--model", "x", "--out", str(tmp_path / "o"), "--prompts", "asset:shapes_prompts.txt"]
    assert main(["sample", *flags, "--negative", os.fsdecode(b"\xff")]) == 2
    assert "--negative: found half of a surrogate pair" in capsys.readouterr().err
    assert main(["status", "x" * 5000]) == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1 and len(stderr) < 2500


def test_shown_is_short_and_printable():
    deep = outer = []
    for _ in range(5000):
        deep.append(deep := [])
    for value in (outer, {"a" * 1000: {"b": [1] * 1000}}, "\x1b" * 1000, 10**400, float("nan")):
        assert len(short_repr(value)) <= 80 and short_repr(value).isprintable()


def test_any_caption_is_drawn_at_once():
    font, start = ImageFont.load_default(12), time.monotonic()
    longest = ["x" * MAX_PROMPT, "a " * (MAX_PROMPT // 2), "\x1b" * MAX_PROMPT, "圆" * 40_000]
    for text in (*HOSTILE, *longest):
        lines = wrap_text(text, font, 300)
        assert 1 <= len(lines) <= 4 and all(font.getlength(line) <= 300 for line in lines)
        assert all(line.isprintable() for line in lines)
    grid([("row", np.zeros((4, 8, 8, 3)))], longest)
    assert time.monotonic() - start < 20
