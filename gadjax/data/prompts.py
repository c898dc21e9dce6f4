"""Prompt files (.txt, .jsonl, .csv) as untrusted input: a list of strings, or a one-line error."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gadjax.errors import InputError, short_repr
from gadjax.io.untrusted import open_file, parse_json

MAX_LINE = 1 << 20  # bytes; a file with a longer line is no prompt file
MAX_PROMPT = 1 << 17  # bytes; six times as many in JSON, which with its key still fits a line
BOM = b"\xef\xbb\xbf"


def read_prompts(path: Path, column: str = "prompt") -> list[str]:
    """Read the prompts of a UTF-8 file in its order, without leading and trailing white space.

    .txt: one per line; .jsonl: objects with the key `column`; .csv: comma separated, with `column`
    in the header. Blank lines are skipped, and so is a byte order mark at the start of any line
    (concatenated files have several). Lines end in LF or CRLF only. Duplicate prompts are kept.
    Inside a prompt every character is text for the tokenizer, non-printable ones included (control
    characters, direction marks, U+2028), except NUL, the sign of a file in UTF-16.

    Raises:
        InputError: as `file:line: found ...; expected ...`. The file cannot be read, is not a
            regular file, has another suffix, is not UTF-8, or has no prompt; a line is longer than
            1 MiB; a .txt has a lone CR (or a .csv outside of quotes); a record is broken, or its
            prompt is missing, blank or not text; `check_prompt` refuses a prompt.
    """
    return [prompt for (prompt,) in read_records(path, [column])]


def read_records(path: Path, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Read several columns of a prompt file, as `read_prompts`; a .txt has a single column."""
    path = Path(path)
    if path.suffix.lower() not in READERS:
        expected = ", ".join(READERS)
        raise InputError(f"{path}: found suffix {path.suffix!r}; expected one of {expected}")
    records = list(READERS[path.suffix.lower()](path, columns))
    if not records:
        raise InputError(f"{path}: found no prompt; expected at least one")
    return records


def check_prompt(text: str, where: str) -> None:
    """Refuse a prompt with NUL or a lone surrogate, or of more than 128 KiB in UTF-8.

    Raises: InputError naming `where`.
    """
    if "\0" in text:
        raise InputError(f"{where}: found a NUL character; expected text (in files UTF-8)")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        # JSON and the shell can write lone surrogates, which no tokenizer accepts.
        raise InputError(
            f"{where}: found half of a surrogate pair; expected whole characters"
        ) from error
    if size > MAX_PROMPT:
        raise InputError(f"{where}: found {size} bytes of text; expected at most {MAX_PROMPT}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text with its line end)."""
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
        if "\r" in text:  # line ends of classic Mac OS, which would join all prompts
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
            reason = getattr(error, "msg", error)  # without the column
            raise InputError(
                f"{where}: found broken JSON ({reason}); expected one object per line"
            ) from error
        if not isinstance(record, dict):
            raise InputError(f"{where}: found {short_repr(record)}; expected an object")
        for column in columns:
            if column not in record:
                keys = short_repr(list(record))
                raise InputError(f"{where}: found keys {keys}; expected {column!r}")
        yield tuple(_prompt(record[column], where, column) for column in columns)


def _read_csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    # Strict: otherwise an unclosed quote silently includes the rest of the file.
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
        # Otherwise an unquoted comma would truncate the prompt.
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
