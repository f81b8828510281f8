"""Messages, and files that are whole or not there."""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from engine import Refused


def fail(message: str) -> NoReturn:
    """Bad input: one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def end_in_one_line(main: Callable[[], None]) -> None:
    """Runs a script; what is refused on the way ends it in one line, exit code 2."""
    try:
        main()
    except Refused as why:
        fail(str(why))


def read_jsonl(path: Path) -> list[dict]:
    """The records of a JSON-lines file; a malformed line ends the run with its number."""
    if not path.is_file():
        fail(f"{path}: no such file")
    rows = parse_lines(path, path.read_bytes())
    if not rows:
        fail(f"{path}: empty, expected one JSON object a line")
    return rows


def parse_lines(path: Path, data: bytes) -> list[dict]:
    """The objects of JSON lines, which end at newlines alone: text may hold U+2028. `path` is for error messages."""
    rows = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except json.JSONDecodeError as error:
            fail(f"{path}, line {number}: not JSON ({error.msg})")
        except UnicodeDecodeError as error:
            fail(f"{path}, line {number}: not UTF-8 ({error.reason})")
        if not isinstance(row, dict):
            fail(f"{path}, line {number}: expected an object, found {type(row).__name__}")
        rows.append(row)
    return rows


def whole_lines(path: Path) -> list[str]:
    """The lines of a file that end with a newline; a crash can only have cut the last."""
    with path.open("rb") as lines:  # bytes: the cut may be within a character, and text may hold U+2028 and the like
        return [line.decode() for line in lines if line.endswith(b"\n")]


def write_text(path: Path, text: str) -> None:
    """Writes all or nothing: a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    temporary.replace(path)


def write_json(path: Path, value) -> None:
    """As `write_text`; a number that is not finite becomes null, as JSON has none."""
    value = json.loads(json.dumps(value), parse_constant=lambda _: None)
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def json_line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def append_jsonl(path: Path, rows: list[dict]) -> None:
    """Appends one line a row, all or nothing: until all are written `NAME.begin` holds the file's old size."""
    begin = path.with_name(path.name + ".begin")
    begin.write_text(str(path.stat().st_size if path.exists() else 0))
    with path.open("a", encoding="utf-8") as out:
        out.write("".join(map(json_line, rows)))
    begin.unlink()


def repair(folder: Path) -> None:
    """Removes what a crash left half written: the lines of an unfinished `append_jsonl`, a line without an end."""
    for begin in folder.rglob("*.jsonl.begin"):
        file, size = begin.with_suffix(""), begin.read_text()
        if file.exists() and size:
            os.truncate(file, int(size))
        begin.unlink()
    for file in folder.rglob("*.jsonl"):
        write_text(file, "".join(whole_lines(file)))


def checksum(path: Path) -> str:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return f"{value:08x}"
