"""Problems and given responses: files, the Hub, and the embedded reasoner's own."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from engine import first_line, plural
from engine.models import ROOT, TINY, reach_hub
from engine.thoughts import KNOWN_MARKS, ThinkMarks
from grading.box import extract_answer
from grading.verdict import check_golds
from run.files import check_text, fail, parse_lines

PROBLEM_COLUMNS = ("problem", "question", "prompt", "messages", "turns")
ANSWER_COLUMNS = ("final_answer", "expected_answer", "ground_truth", "reward_model.ground_truth", "answer", "solution")
NOT_ANSWERS = ("proof", "notfound", "not found", "see solution", "n/a", "none", "unknown")  # NuminaMath has them
FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")


class Columns(NamedTuple):
    """Where rows have problem and gold answer, None: in the first of the usual columns that is filled; and whether
    those that cannot be used are left out."""

    problem: str | None = None
    answer: str | None = None
    skip_unusable: bool = False


def load_problems(dataset: str, split: str, limit: int | None = None, columns: Columns = Columns()) -> list[dict]:
    """`[{problem, answer, id}]` from `tiny`, `tiny:30` (only that difficulty), a file or the Hub. `split` may name
    a part of a split, as the library datasets does: test[100:200]; a file has no splits.

    A file is .jsonl, .json (a list, an object with one, or lines), .csv or .parquet, or one of these with .gz. A column
    may be `outer.inner`. `answer` is the bare gold answer (after GSM8K's `####`, or in a solution's last box), or a
    list, any of which is right. Unusable rows of a file end the run with one message about all of them, unless
    `skip_unusable`; those of a Hub data set (NuminaMath has proofs) are left out and counted.
    """
    name, part = part_of_split(split)
    if is_tiny_dataset(dataset):
        if not (problems := tiny_problems(dataset, name)[part][:limit]):
            fail(f"--split {split}: holds no problem")
        return problems
    from_file = dataset.removesuffix(".gz").endswith(FILE_TYPES) or Path(dataset).exists()
    if from_file and name != split:
        fail(f"--split {split}: {dataset} is a file, which has no splits to take a part of")
    rows = read_rows(Path(dataset)) if from_file else load_from_hub(dataset, name, part)
    if not from_file:
        columns = columns._replace(skip_unusable=True)
    else:
        tell_limit(dataset, len(rows), limit, "rows")
    problems = [problem for problem, _ in usable_rows(dataset, rows, limit, columns)]
    if (different := len(set(map(text_and_answer, problems)))) < len(problems):
        rows_are = f"{len(problems)} rows are {plural(different, 'problem')}"
        print(f"{dataset}: {rows_are}; rows of one problem count as its samples")
    return with_distinct_ids(dataset, problems)


def tell_limit(name: object, count: int, limit: int | None, what: str) -> None:
    """Says that --limit leaves some out, where it does."""
    if limit and limit < count:
        print(f"{name}: the first {limit} of {count} {what} (--limit)")


def text_and_answer(problem: dict) -> str:
    """What rows of one problem share, whatever their ids."""
    return json.dumps([problem.get("messages", problem["problem"]), problem["answer"]])


def with_distinct_ids(name: str, problems: list[dict]) -> list[dict]:
    """The problems; an id that an earlier one has gets a number. Later ones, and so --limit, change no id."""
    number, taken = Counter(), set()
    for problem in problems:
        own = problem["id"]
        while problem["id"] in taken:
            number[own] += 1
            problem["id"] = f"{own}-{number[own]}"
        taken.add(problem["id"])
    if number:
        print(f"{name}: ids repeat; from the second time a number is added to each")
    return problems


def part_of_split(split: str) -> tuple[str, slice]:
    """(name, rows) of a split like test or test[100:200]."""
    name, bracket, part = split.partition("[")
    start, colon, end = part.removesuffix("]").partition(":")
    if bracket and not (colon and part.endswith("]") and all(place.isdecimal() or not place for place in (start, end))):
        fail(f"--split {split}: expected a name, or a part of a split like test[100:200]")
    return name, slice(int(start) if start else None, int(end) if end else None)


def columns_of(args) -> Columns:
    return Columns(args.problem_column, args.answer_column, args.skip_unusable)


def problems_of(args) -> list[dict]:
    """The problems that the flags name."""
    return load_problems(args.dataset, args.split, args.limit, columns_of(args))


def held_out_of(args) -> list[dict]:
    """The held-out problems of a training; none without --eval-dataset, unless it trains on tiny's problems."""
    if not args.eval_dataset and not is_tiny_dataset(args.dataset):
        return []
    return load_problems(args.eval_dataset or args.dataset, args.eval_split, args.eval_problems, columns_of(args))


def load_responses(file: Path, limit: int | None = None, columns=Columns()) -> tuple[list[dict], list[list[str]]]:
    """(problems, the responses to each) of a file with the columns of `load_problems` and `response` or `responses`.

    A response is text or a chat, whose last assistant message counts. Rows of one problem need not be adjacent.
    """
    problems: dict[str, dict] = {}
    responses: dict[str, list[str]] = {}
    for problem, texts in usable_rows(str(file), read_rows(file), None, columns, responses_of):
        problems.setdefault(text_and_answer(problem), problem)
        responses.setdefault(text_and_answer(problem), []).extend(texts)
    tell_limit(file, len(problems), limit, "problems")
    return with_distinct_ids(str(file), list(problems.values())[:limit]), list(responses.values())[:limit]


# ================================================================================================== rows of a file


def read_rows(path: Path) -> list[dict]:
    """The rows of a file; a row that cannot be read ends the run with its line number."""
    if not path.is_file():
        fail(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
    kind = Path(path.name.removesuffix(".gz")).suffix
    try:
        data = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
        if kind == ".parquet":
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
        elif kind == ".csv":
            csv.field_size_limit(sys.maxsize)
            rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
        else:
            if data.startswith((b"\xff\xfe", b"\xfe\xff")):
                fail(f"{path}: is UTF-16, expected UTF-8")
            rows = json_document(data) if kind == ".json" else None
            rows = parse_lines(path, data) if rows is None else rows
    except Exception as error:  # of whichever library; parse_lines ends the program itself
        fail(f"{path}: cannot be read: {first_line(error)}")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or None in row or (kind == ".csv" and None in row.values()):
            fail(f"{path}, row {number}: expected {'as many cells as columns' if kind == '.csv' else 'an object'}")
    if not rows:
        fail(f"{path}: empty, expected rows with a problem and an answer")
    return rows


def json_document(data: bytes) -> list | None:
    """The list that a JSON file is or holds; None if it is not a single JSON value."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except ValueError:
        return None
    if isinstance(value, dict):
        lists = [field for field in value.values() if isinstance(field, list)]
        return lists[0] if len(lists) == 1 and all(isinstance(row, dict) for row in lists[0]) else [value]
    return value if isinstance(value, list) else None


# ================================================================================================== cells of a row


def usable_rows(name: str, rows: Any, limit: int | None, columns: Columns, more_of=lambda row: None) -> list[tuple]:
    """[({problem, answer, id}, more_of(row))] of the first `limit` rows that can be used."""
    of_problem = (columns.problem,) if columns.problem else PROBLEM_COLUMNS
    of_answer = (columns.answer,) if columns.answer else ANSWER_COLUMNS
    there = list(getattr(rows, "column_names", dict.fromkeys(column for row in rows for column in row)))
    names = {column.lower() for column in there}
    if not all(any({c.lower(), c.lower().split(".")[0]} & names for c in usual) for usual in (of_problem, of_answer)):
        fail(
            f"--dataset {name}: needs one column of {'|'.join(of_problem)} and one of {'|'.join(of_answer)} "
            f"(--problem-column and --answer-column name others); found {', '.join(there)}"
        )
    used, why_not = [], {}
    numbered = enumerate(rows, 1)
    while part := list(islice(numbered, None if limit is None else limit - len(used))):
        found = []
        for number, row in part:
            try:
                refuse_images(row)
                chat, answer = chat_of(row, of_problem), gold_of(row, of_answer)
                problem = {"problem": chat[-1]["content"], "answer": answer, "id": str(row.get("id", number - 1))}
                read = problem | ({"messages": chat} if len(chat) > 1 else {}), more_of(row)
                check_text(read)
                found.append((number, read))
            except ValueError as error:
                why_not[number] = error
        errors = check_golds([problem["answer"] for _, (problem, _) in found])
        why_not |= {number: error for (number, _), error in zip(found, errors) if error}
        used += [read for (_, read), error in zip(found, errors) if not error]
    if several := sum(isinstance(problem["answer"], list) for problem, _ in used):
        print(f"{name}: {plural(several, 'row')} with several answers; any of them is right")
    if why_not:
        rows_told = [f"row {number}: {why_not[number]}" for number in sorted(why_not)]
        ten = "; ".join(rows_told[:10]) + "; ..." * (len(rows_told) > 10)
        left_out = f"{plural(len(rows_told), 'row')} that cannot be used: {ten}"
        if not columns.skip_unusable:
            fail(f"{name}, {rows_told[0]}" if len(rows_told) == 1 else f"{name}: {left_out}")
        print(f"{name}: left out {left_out}")
    if not used:
        fail(f"--dataset {name}: no usable problem")
    return used


def refuse_images(row: dict) -> None:
    """ValueError for a row whose problem is shown in a picture, too."""
    for name, value in row.items():
        if re.fullmatch(r"(decoded_)?images?(_\d+)?", str(name).lower()) and value not in (None, "", [], {}):
            raise ValueError(f"column {name} holds an image, which no model here sees")


def value_at(row: dict, column: str) -> Any:
    """What a row holds in `column` or in `outer.inner`, in whatever case; None if it is empty or missing."""
    outer, _, inner = column.partition(".")
    value = row.get(column, next((row[name] for name in row if name.lower() == outer.lower()), None))
    if inner and column not in row:
        return value_at(value, inner) if isinstance(value, dict) else None
    return None if isinstance(value, str) and not value.strip() else value


def chat_of(row: dict, columns: Iterable[str]) -> list[dict]:
    """The messages in the first of the columns that is filled, up to the last of the user, which is the problem."""
    column = next((column for column in columns if value_at(row, column) is not None), None)
    value = value_at(row, column) if column else None
    if column == "turns" and isinstance(value, list):  # as LiveBench has it
        if len(value) != 1:
            raise ValueError(f"column turns holds {len(value)} turns, expected one")
        value = value[0]
    messages = value if isinstance(value, list) else [{"role": "user", "content": value}]
    if system := value_at(row, "system") or value_at(row, "system_prompt"):  # in a column of its own
        messages = [{"role": "system", "content": system}, *messages]
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    if "user" not in roles:
        raise ValueError(f"column {column or '|'.join(columns)} holds no text")
    last = len(roles) - roles[::-1].index("user")
    chat = [
        {"role": role, "content": text_of(m)[1]} for role, m in zip(roles[:last], messages) if m.get("content") != ""
    ]
    if not chat or chat[-1]["role"] != "user" or not all(m["role"] and m["content"].strip() for m in chat):
        raise ValueError(f"column {column} holds no text, or a message without any")
    return chat


def text_of(message: dict) -> tuple[str, str]:
    """(thought, text) of a chat's message; a thought is apart in `reasoning_content`, `reasoning` or parts of the
    content. ValueError if there is more than text: pictures, calls of tools."""
    content, thought = message.get("content"), message.get("reasoning_content") or message.get("reasoning") or ""
    parts, said, apart = content if isinstance(content, list) else [{"text": content or ""}], [], []
    for part in parts:
        part = part if isinstance(part, dict) else {}
        if part.get("type") in ("thinking", "reasoning", "reasoning_text"):
            apart.append(part.get("thinking") or part.get("reasoning") or part.get("text") or "")
        else:
            said.append(part.get("text"))
    if message.get("tool_calls") or not all(isinstance(text, str) for text in (thought, *said, *apart)):
        raise ValueError("a message that is not only text, which no model here reads")
    return thought or "".join(apart), "".join(said)


def responses_of(row: dict) -> list[str]:
    """The texts of a row's responses; an empty one counts, too."""
    listed = value_at(row, "responses")
    values = listed if isinstance(listed, list) else [value_at(row, "response") or row.get("response")]
    thoughts = [value_at(row, name) for name in ("reasoning_content", "reasoning")]  # beside a single response
    if len(values) == 1 and any(thoughts) and not isinstance(values[0], (list, dict)):
        values = [{"content": values[0], "reasoning": thoughts[0] or thoughts[1]}]
    texts = [value if isinstance(value, str) else last_answer(value) for value in values]
    if not texts or None in texts:
        raise ValueError(f"column response holds no text; found {', '.join(row)}")
    return [text.replace("\r\n", "\n") for text in texts if text is not None]


def last_answer(chat: Any) -> str | None:
    """The last message of the assistant in a chat, or a single message, after its thought where that is apart; a
    thought without more was cut."""
    messages = [m for m in (chat if isinstance(chat, list) else [chat]) if isinstance(m, dict)]
    said = [m for m in messages if m.get("role", "assistant") == "assistant" and not m.get("tool_calls")]
    if not said:
        return None
    thought, text = text_of(said[-1])
    if not thought and not text:
        raise ValueError("the last answer is null or empty")
    return f"<think>\n{thought}" + f"</think>\n{text}" * bool(text) if thought else text


def gold_of(row: dict, columns: Iterable[str]) -> str | list[str]:
    """The gold answer, or a list of them, any of which is right; ValueError if there is none."""
    column = next((column for column in columns if value_at(row, column) not in (None, [])), None)
    if column is None:
        raise ValueError("no answer")
    value = plain_value(value_at(row, column))
    is_solution = column.lower() == "solution"
    golds = [gold_answer(str(plain_value(v)), is_solution) for v in (value if isinstance(value, list) else [value])]
    return golds[0] if len(golds) == 1 else golds


def plain_value(value: Any) -> Any:
    """A gold answer out of bytes, JSON text (`"7"`, `["7", "8"]`, `{"value": 7}`) or an object with one value. Text
    like [1, 2], which is an interval, stays. ValueError for other objects."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise ValueError("the answer is bytes, and not UTF-8") from None
    if isinstance(value, str) and value.strip()[:1] in ('"', "[", "{"):
        with contextlib.suppress(ValueError):
            read = json.loads(value)
            texts = isinstance(read, list) and bool(read) and all(isinstance(item, str) for item in read)
            value = read if texts or isinstance(read, (str, dict)) else value
    if isinstance(value, dict):
        if len(value) != 1 or isinstance(next(iter(value.values())), (dict, list)):
            names = ", ".join(map(str, value)) or "nothing"
            raise ValueError(f"the answer is an object with {names}; --answer-column OUTER.INNER names a field")
        return plain_value(next(iter(value.values())))
    return value


def gold_answer(text: str, is_solution: bool) -> str:
    """The bare answer in the text of an answer column; ValueError if there is none."""
    if "####" in text:
        text = text.rsplit("####", 1)[1].strip().partition("\n")[0]
    elif is_solution or "\\boxed" in text:
        boxed = extract_answer(text)
        if boxed is None:
            raise ValueError("the solution holds no \\boxed{} answer")
        text = boxed
    elif "The answer is: " in text:  # MetaMath
        text = text.rsplit("The answer is: ", 1)[1]
    text = text.strip()
    if text.lower() in NOT_ANSWERS:
        raise ValueError(f"{text!r} is not an answer")
    return text


# ================================================================================================== responses

_STARTS = r"<[｜|]begin[▁_]of[▁_](?:sentence|text)[｜|]>|<s>|<bos>|<\|im_start\|>(?:assistant)?|<\|start\|>assistant"
_ENDS = r"<\|(?:return|end|im_end)\|>|<[｜|]end[▁_]of[▁_]sentence[｜|]>"
_HARMONY = r"(?:<\|end\|>\s*)?(?:<\|start\|>assistant\s*)?<\|channel\|>\s*final\s*<\|message\|>"


def marks_told(responses: list[str], marks: ThinkMarks | None = None) -> str:
    """How many responses end their thought by which mark, where there are several."""
    closings = [closing for _, closing in KNOWN_MARKS] + ([marks.closing] if marks else [])
    ends = re.compile("|".join(map(re.escape, closings)))
    found = Counter(mark[0] for text in responses if (mark := ends.search(text)))
    return ", ".join(f"{count} by {mark}" for mark, count in found.most_common()) if len(found) > 1 else ""


def split_response(text: str, marks: ThinkMarks | None = None) -> tuple[bool, str, str | None]:
    r"""(is the thought opened by a mark?, the thought, the answer or None if the thought does not end).

    The marks are those given or any of `KNOWN_MARKS`, after any BOS token and white space; neither the thought nor the
    answer includes one: `</think>\boxed{7}\n</think>` has the answer `\boxed{7}`.
    """
    own = [(marks.opening, marks.closing)] if marks else []
    openings, closings = ("|".join(map(re.escape, side)) for side in zip(*own, *KNOWN_MARKS))
    opening = re.match(rf"\s*(?:(?:{_STARTS})\s*)*({openings})?\n?", text)
    opened = bool(opening and opening[1])
    start = opening.end() if opening and (opened or opening[0].strip()) else 0
    closing = re.compile(f"{closings}|{_HARMONY}").search(text, start)
    if closing is None:
        return opened, text[start:], None
    answer = re.sub(rf"(?:\s*(?:{closings}|{_ENDS}))+\s*$", "", text[closing.end() :])
    return opened, text[start : closing.start()], answer


# ================================================================================================== the Hub and tiny


def load_from_hub(dataset: str, split: str, part: slice):
    """Rows of `owner/name` or `owner/name:subset`; a data set's only split is used whatever its name."""
    reach_hub()
    import datasets

    name, _, subset = dataset.partition(":")
    try:
        splits: Any = datasets.load_dataset(name, subset or None)
    except Exception as error:
        fail(f"--dataset {dataset}: neither a file nor a data set that the Hub provides: {first_line(error)}")
    if split not in splits and len(splits) > 1:
        fail(f"--dataset {dataset}: has no split {split}; it has {', '.join(splits)}")
    rows = splits[split] if split in splits else next(iter(splits.values()))
    return rows.select(range(len(rows))[part])


def tiny_problems(dataset: str, split: str) -> list[dict]:
    """An embedded reasoner's problems: `tiny`, all levels in turn, or `tiny:30`, one level (its candidates)."""
    folder, _, subset = dataset.partition(":")
    with gzip.open(ROOT / folder / "problems.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    subset = subset or "mixed"
    for flag, name, available in (
        (f"--dataset {dataset}", subset, sorted({name for row in rows for name in row["place"]})),
        (f"--split {split}", split, list(dict.fromkeys(row["split"] for row in rows))),
    ):
        if name not in available:
            fail(f"{flag}: the {folder} problems have {', '.join(available)}")
    rows = [row for row in rows if row["split"] == split and subset in row["place"]]
    rows.sort(key=lambda row: row["place"][subset])
    return [{name: row[name] for name in ("problem", "answer", "id", "level")} for row in rows]


def is_tiny_dataset(dataset: str) -> bool:
    return dataset.partition(":")[0] in TINY
