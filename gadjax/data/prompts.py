"""Prompt files: .txt, .jsonl and .csv -> a list of strings, or one line that says what is wrong."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gadjax.errors import InputError, short_repr
from gadjax.io.untrusted import open_file, parse_json

MAX_LINE = 1 << 20  # bytes; a longer line is some other file
MAX_PROMPT = 1 << 17  # bytes; in JSON six times as many, which with its key is still a line
BOM = b"\xef\xbb\xbf"


def read_prompts(path: Path, column: str = "prompt") -> list[str]:
    """The prompts of a UTF-8 file in its order, without outer white space.

    .txt: one per line; .jsonl: objects with the key `column`; .csv: comma separated, with `column`
    in the header. Blank lines are skipped, a byte order mark at the start of a line (files that
    were joined have several) too. Lines end in LF or CRLF and in nothing else. A prompt that stands
    there twice is there twice. Inside a prompt every character is text for the tokenizer, also what
    does not print (control characters, marks of direction, U+2028), but for NUL, which tells of a
    file in UTF-16.

    Raises: InputError (`file:line: found ...; expected ...`) for a file that cannot be read, is no
    regular one, has another suffix, is not UTF-8, holds no prompt, a line of more than 1 MiB, a
    lone CR in a .txt (or in a .csv outside of quotes), a broken record, a record whose prompt is
    missing, blank or no text, and a prompt that `check_prompt` refuses.
    """
    return [prompt for (prompt,) in read_records(path, [column])]


def read_records(path: Path, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """As `read_prompts`, the texts of several columns; a .txt has one."""
    path = Path(path)
    if path.suffix.lower() not in READERS:
        expected = ", ".join(READERS)
        raise InputError(f"{path}: found suffix {path.suffix!r}; expected one of {expected}")
    records = list(READERS[path.suffix.lower()](path, columns))
    if not records:
        raise InputError(f"{path}: found no prompt; expected at least one")
    return records


def check_prompt(text: str, where: str) -> None:
    """Raises: InputError for NUL, half of a surrogate pair, and more than 128 KiB in UTF-8."""
    if "\0" in text:
        raise InputError(f"{where}: found a NUL character; expected text (in files UTF-8)")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        # JSON and the shell can write half of a character; no tokenizer takes it.
        raise InputError(
            f"{where}: found half of a surrogate pair; expected whole characters"
        ) from error
    if size > MAX_PROMPT:
        raise InputError(f"{where}: found {size} bytes of text; expected at most {MAX_PROMPT}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text with its line end)."""
    number = 0
    with open_file(path, "a file of prompts") as file:
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise InputError(
                    f"{path}:{number}: found a line of more than {MAX_LINE} bytes; "
                    "expected shorter lines"
                )
            try:
                yield number, line.removeprefix(BOM).decode()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}:{number}: found byte 0x{error.object[error.start]:02x}, "
                    "which is not UTF-8; expected text in UTF-8"
                ) from error


def _read_txt(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for number, line in _lines(path):
        if not (text := line.strip()):
            continue
        if "\r" in text:  # the line ends of an old Macintosh, which would join all prompts
            raise InputError(f"{path}:{number}: found a lone CR; expected lines that end in LF")
        check_prompt(text, f"{path}:{number}")
        yield (text,)


def _read_jsonl(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = parse_json(line.encode())
        except ValueError as error:
            reason = getattr(error, "msg", error)  # without a place in the line
            raise InputError(
                f"{where}: found broken JSON ({reason}); expected one object per line"
            ) from error
        if not isinstance(record, dict):
            raise InputError(f"{where}: found {short_repr(record)}; expected an object")
        for column in columns:
            if column not in record:
                found = short_repr(list(record))
                raise InputError(f"{where}: found keys {found}; expected {column!r}")
        yield tuple(_prompt(record[column], where, column) for column in columns)


def _read_csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    # Strict: otherwise a quote that is never closed swallows the rest of the file in silence.
    rows = csv.reader((line for _, line in _lines(path)), strict=True)
    header: list[str] = []
    while True:
        where = f"{path}:{rows.line_num + 1}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{where}: found broken CSV ({error}); expected a record") from error
        if not row:
            continue
        if not header:
            header = row
            for column in columns:
                if header.count(column) != 1:
                    raise InputError(
                        f"{where}: found columns {short_repr(header)}; expected {column!r} once"
                    )
            continue
        # A comma in a prompt without quotes would otherwise cut the prompt there.
        if len(row) != len(header):
            raise InputError(
                f"{where}: found {len(row)} fields; expected {len(header)} as in the header "
                "(text with a comma must be quoted)"
            )
        yield tuple(_prompt(row[header.index(column)], where, column) for column in columns)


def _prompt(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: found {short_repr(value)} as {column!r}; expected text")
    check_prompt(value := value.strip(), where)
    return value


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv}
