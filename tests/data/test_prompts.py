"""Prompt files are read whole, or refused in one line that names the file and the line."""

import json

import pytest

from gadjax.data.prompts import MAX_LINE, MAX_PROMPT, read_prompts, read_records
from gadjax.errors import InputError

PROMPTS = ["a red circle", 'a "cross", small', "ein blaues Viereck, groß", "圆"]


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def as_text(suffix, prompts):
    if suffix == ".txt":
        return prompts
    if suffix == ".jsonl":
        return [json.dumps({"id": i, "prompt": text}) for i, text in enumerate(prompts)]
    quoted = ['"' + text.replace('"', '""') + '"' for text in prompts]
    return ["id,prompt", *(f"{i},{text}" for i, text in enumerate(quoted))]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".TXT"])
def test_every_format_gives_the_same_prompts(tmp_path, suffix, mark, end):
    lines = as_text(suffix.lower(), PROMPTS)
    spread = f"{end}{end}".join(lines)  # blank lines between, no line end at the end
    for text in (end.join(lines) + end, spread):
        assert read_prompts(write(tmp_path, f"p{suffix}", mark + text)) == PROMPTS


def test_another_column_and_outer_white_space(tmp_path):
    assert read_prompts(write(tmp_path, "p.jsonl", '{"text": " a "}'), "text") == ["a"]
    assert read_prompts(write(tmp_path, "p.csv", "x,text\n1, a \n"), "text") == ["a"]
    assert read_prompts(write(tmp_path, "p.txt", "\t a  b \n \n")) == ["a  b"]


def test_several_columns(tmp_path):
    expected = [("1", "a"), ("2", "b, c")]
    csv = write(tmp_path, "p.csv", 'text,x,id\na,,1\n"b, c",,2\n')
    assert read_records(csv, ("id", "text")) == expected
    lines = '{"id": "1", "text": "a", "x": "3"}\n{"text": "b, c", "id": "2"}\n'
    assert read_records(write(tmp_path, "p.jsonl", lines), ("id", "text")) == expected
    with pytest.raises(InputError, match=r"p.csv:1: found columns .*; expected 'y' once"):
        read_records(csv, ("id", "y"))
    with pytest.raises(InputError, match=r"p.jsonl:2: found keys \['text', 'id'\]; expected 'x'"):
        read_records(tmp_path / "p.jsonl", ("id", "x"))


def test_a_quoted_csv_field_may_span_lines(tmp_path):
    path = write(tmp_path, "p.csv", 'prompt,id\n"a\nb",1\n" ",2\n')
    with pytest.raises(InputError, match=r"p.csv:4: found ' ' as 'prompt'; expected text$"):
        read_prompts(path)
    assert read_prompts(write(tmp_path, "p.csv", 'prompt,id\n"a\nb",1\n')) == ["a\nb"]


LONG = b"x" * MAX_LINE
BAD = [
    ("p.parquet", b"x", r"p.parquet: found suffix '.parquet'; expected one of .txt, .jsonl, .csv"),
    ("p", b"x", r"p: found suffix ''"),
    ("p.txt", b"", r"p.txt: found no prompt; expected at least one"),
    ("p.txt", b" \r\n\n\t", r"p.txt: found no prompt"),
    ("p.jsonl", b"\n\n", r"p.jsonl: found no prompt"),
    ("p.csv", b"", r"p.csv: found no prompt"),
    ("p.csv", b"prompt\n\n", r"p.csv: found no prompt"),
    ("p.txt", b"a\n\nb\xff\n", r"p.txt:3: found byte 0xff, which is not UTF-8"),
    ("p.txt", "a".encode("utf-16"), r"p.txt:1: found byte 0xff"),
    ("p.csv", b"prompt\na\n\xe9\n", r"p.csv:3: found byte 0xe9"),
    ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "b"\n', r"p.jsonl:2: found broken JSON \("),
    ("p.jsonl", b"[" * 100_000, r"p.jsonl:1: found broken JSON \(more than 64 nested"),
    ("p.jsonl", b"1" * 5_000, r"p.jsonl:1: found broken JSON \(Exceeds the limit"),
    ("p.jsonl", b'\n"a"\n', r"p.jsonl:2: found 'a'; expected an object"),
    ("p.jsonl", b'{"text": "a"}', r"p.jsonl:1: found keys \['text'\]; expected 'prompt'"),
    ("p.jsonl", b'{"prompt": 3}', r"p.jsonl:1: found 3 as 'prompt'; expected text"),
    ("p.jsonl", b'{"prompt": null}', r"p.jsonl:1: found None as 'prompt'; expected text"),
    ("p.jsonl", b'{"prompt": "\\n"}', r"p.jsonl:1: found '\\n' as 'prompt'; expected text"),
    ("p.jsonl", b'{"prompt": "\\ud83d"}', r"p.jsonl:1: found half of a surrogate pair"),
    ("p.csv", b"id,text\n1,a\n", r"p.csv:1: found columns \['id', 'text'\]; expected 'prompt'"),
    ("p.csv", b"prompt,prompt\na,b\n", r"p.csv:1: found columns .*; expected 'prompt' once"),
    ("p.csv", b"prompt\na dog, running\n", r"p.csv:2: found 2 fields; expected 1 as in the he"),
    ("p.csv", b"id,prompt\n\n1\n", r"p.csv:3: found 1 fields; expected 2"),
    ("p.csv", b"id,prompt\n1,\n", r"p.csv:2: found '' as 'prompt'; expected text"),
    ("p.csv", b'prompt\na\n"b\nc\nd\n', r"p.csv:3: found broken CSV \(unexpected end of data\)"),
    ("p.csv", b"prompt\n" + b"x" * 200_000, r"p.csv:2: found broken CSV \(field larger"),
    ("p.txt", b"a\n" + LONG + b"x", r"p.txt:2: found a line of more than 1048576 bytes"),
    ("p.jsonl", LONG * 10, r"p.jsonl:1: found a line of more than 1048576 bytes"),
]


@pytest.mark.parametrize("name, content, message", BAD, ids=range(len(BAD)))
def test_bad_files_are_refused_in_one_line(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(write(tmp_path, name, content))
    text = str(caught.value)
    assert "\n" not in text and "; expected " in text
    assert len(text) < 250 + len(str(tmp_path))


def test_a_file_that_cannot_be_opened_is_refused(tmp_path):
    with pytest.raises(InputError, match="none.txt: found No such file or directory; expected"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputError, match="folder.txt: found a folder; expected a file of prompts"):
        read_prompts(tmp_path / "folder.txt")


def test_the_longest_prompt_and_the_longest_line(tmp_path):
    longest = b"x" * MAX_PROMPT
    assert read_prompts(write(tmp_path, "p.txt", longest)) == [longest.decode()]
    spaces = b" " * (MAX_LINE - 1) + b"x"
    assert read_prompts(write(tmp_path, "p.txt", spaces)) == ["x"]
