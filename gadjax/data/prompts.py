"""Prompt files: .txt, .jsonl and .csv -> a list of strings, or one line that says what is wrong."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gadjax.errors import InputError

MAX_LINE = 1 << 20  # bytes; a longer line is some other file
BOM = b"\xef\xbb\xbf"


def read_prompts(path: Path, column: str = "prompt") -> list[str]:
    """The prompts of a UTF-8 file in its order, without outer white space.

    .txt: one per line; .jsonl: objects with the key `column`; .csv: comma separated, with `column`
    in the header. Blank lines are skipped, a byte order mark and CRLF are accepted.

    Raises: InputError (`file:line: found ...; expected ...`) for a file that cannot be read, has
    another suffix, is not UTF-8, holds no prompt, a line of more than 1 MiB, a broken record, or
    a record whose prompt is missing, blank or no text.
    """
    return [prompt for (prompt,) in read_records(path, [column])]


def read_records(path: Path, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """As `read_prompts`, the texts of several columns; a .txt has one."""
    path = Path(path)
    if path.suffix.lower() not in READERS:
        expected = ", ".join(READERS)
        raise InputError(f"{path}: found suffix {path.suffix!r}; expected one of {expected}")
    try:
        records = list(READERS[path.suffix.lower()](path, columns))
    except OSError as error:
        raise InputError(f"{path}: found {error.strerror}; expected a readable file") from error
    if not records:
        raise InputError(f"{path}: found no prompt; expected at least one")
    return records


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text with its line end)."""
    number = 0
    with open(path, "rb") as file:
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise InputError(
                    f"{path}:{number}: found a line of more than {MAX_LINE} bytes; "
                    "expected shorter lines"
                )
            try:
                # A mark may stand at the start of the file only.
                yield number, (line.removeprefix(BOM) if number == 1 else line).decode()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}:{number}: found byte 0x{error.object[error.start]:02x}, "
                    "which is not UTF-8; expected text in UTF-8"
                ) from error


def _read_txt(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return ((line.strip(),) for _, line in _lines(path) if line.strip())


def _read_jsonl(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", type(error).__name__)
            raise InputError(
                f"{where}: found broken JSON ({reason}); expected one object per line"
            ) from error
        if not isinstance(record, dict):
            raise InputError(f"{where}: found {_shown(record)}; expected an object")
        for column in columns:
            if column not in record:
                found = _shown(list(record))
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
                        f"{where}: found columns {_shown(header)}; expected {column!r} once"
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
        raise InputError(f"{where}: found {_shown(value)} as {column!r}; expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can escape half of a character; no tokenizer takes it.
        raise InputError(
            f"{where}: found half of a surrogate pair; expected whole characters"
        ) from error
    return value.strip()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv}
