"""Messages, and files that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from engine import Refused, first_line

# The scripts import this file first: it loads nothing large, and from then on Ctrl-C is one line.


def fail(message: str) -> NoReturn:
    """Bad input: one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


NEEDED = ("torch", "transformers", "datasets", "math_verify", "matplotlib")
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    fail(f"not installed: {', '.join(missing)}; pip install -r requirements.txt, without a GPU requirements-cpu.txt")


def end_in_one_line(main: Callable[[], None]) -> None:
    """Runs a script; what is refused on the way ends it in one line, exit code 2, and so does a signal that asks it to
    end, exit code 128 + its number."""
    for stream in (sys.stdout, sys.stderr):
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")  # where they cannot write ×
    try:
        on_stop(stop_now)
        main()
    except Refused as why:
        fail(str(why))
    except KeyboardInterrupt as stop:
        code = say_stopped(stop.args[0] if stop.args else signal.SIGINT)
        with contextlib.suppress(OSError):
            print(end="", flush=True)
        os._exit(code)  # now: Python would wait for threads, which may wait for a server
    except BrokenPipeError:  # nobody reads any more, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would try again at its end
        raise SystemExit(say_stopped(signal.SIGPIPE)) from None
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not loaded here
            raise
        fail(f"{first_line(error)} A training needs less with a lower --max-tokens-per-batch; --dry-run estimates it")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail(f"{first_line(error)}; what is recorded is kept, --resume goes on")


def say_stopped(number: int) -> int:
    """The line that a signal ends with; returns the exit code."""
    name = signal.Signals(number).name
    print(f"stopped by {name}; what is recorded is kept, --resume goes on", file=sys.stderr, flush=True)
    return 128 + number


# What asks a process to end: Ctrl-C, a terminal that closes, and what schedulers send before they kill.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def on_stop(handler) -> None:
    """Sets what happens on these signals; SIGHUP stays ignored where `nohup` has done so."""
    for number in STOPPING:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def stop_now(number: int, _frame) -> NoReturn:
    """Ends what is running; the next such signal ends the process, whatever it does then."""
    on_stop(signal.SIG_DFL)
    raise KeyboardInterrupt(number)


if Path(getattr(sys.modules["__main__"], "__file__", None) or "/").absolute().parent == Path(__file__).parents[1]:
    on_stop(lambda number, _frame: os._exit(say_stopped(number)))  # while a script's libraries are loaded


def read_jsonl(path: Path) -> list[dict]:
    """The records of a JSON-lines file; a malformed line ends the run with its number."""
    return parse_lines(path, path.read_bytes())


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


def whole_lines(path: Path) -> bytes:
    """The lines of a file without what a crash, or an editor after it, may have left at its end: cut or empty lines."""
    lines = path.read_bytes().split(b"\n")
    while lines and not is_object(lines[-1]):
        lines.pop()
    return b"".join(line + b"\n" for line in lines)


def is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


@contextlib.contextmanager
def writing(path: Path, more: str = "what is recorded is kept, --resume goes on") -> Iterator[None]:
    """What fails to be written (a full disk, most likely; each library has its own exception for it) ends the run in
    one line with `more`."""
    try:
        yield
    except Exception as error:
        raise Refused(f"{path} cannot be written: {first_line(error)}; {more}") from error


def write_text(path: Path, text: str) -> None:
    """Writes all or nothing: a reader never sees half a file. What is no character, half an emoji, becomes its escape,
    which JSON reads back."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        with temporary.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())  # else a power cut may leave the new name with nothing in it
        temporary.replace(path)


def check_text(value: Any) -> None:
    """ValueError if a text holds half a character: JSON can write one, but no tokenizer reads it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a character (a lone surrogate)") from None


def remove(path: Path) -> None:
    """A file or a folder; of a link the link, never what it points to. Nothing is there afterwards."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    """As `write_text`; a number that is not finite becomes null, as JSON has none."""
    value = json.loads(json.dumps(value), parse_constant=lambda _: None)
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def json_line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def append_jsonl(path: Path, rows: list[dict]) -> None:
    """Appends one line a row, all or nothing: until all are written `NAME.begin` holds the file's old size."""
    begin = path.with_name(path.name + ".begin")
    with writing(path):
        begin.write_text(str(path.stat().st_size if path.exists() else 0))
        with path.open("ab") as out:
            out.write("".join(map(json_line, rows)).encode("utf-8", "backslashreplace"))
        begin.unlink()


def repair(folder: Path) -> None:
    """Removes what a crash left half written: the lines of an unfinished `append_jsonl`, a line that is cut, files and
    folders that had not got their names yet."""
    for begin in folder.rglob("*.jsonl.begin"):
        file, size = begin.with_suffix(""), begin.read_text()
        if file.exists() and size:
            os.truncate(file, int(size))
        begin.unlink()
    for file in folder.rglob("*.jsonl"):
        if (whole := whole_lines(file)) != file.read_bytes():
            write_bytes(file, whole)
    for unfinished in [*folder.glob("*.tmp"), *folder.glob("*/*.tmp")]:
        remove(unfinished)


def digest(*values: Any) -> str:
    """Of values as JSON has them, and of what files hold."""
    hashed = hashlib.sha256()
    for value in values:
        if isinstance(value, Path):
            with value.open("rb") as file:
                while block := file.read(1 << 24):
                    hashed.update(block)
        else:
            hashed.update(json.dumps(value).encode())
    return hashed.hexdigest()[:16]
