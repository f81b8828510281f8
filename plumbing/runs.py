"""runs.py: what a run of any script has: messages, files, flags, a folder, tables and pictures.

Apart from common.py because nothing in it is about MRT.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import yaml
from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parents[1]

# ============================================================================================ messages and files


def fail(message: str) -> NoReturn:
    """Bad input: one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def read_jsonl(path: Path) -> list[dict]:
    """The records of a JSON-lines file; a malformed line ends the run with its number."""
    if not path.is_file():
        fail(f"{path}: no such file")
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                fail(f"{path}, line {number}: not JSON ({error.msg})")
            except UnicodeDecodeError as error:
                fail(f"{path}, line {number}: not UTF-8 ({error.reason})")
            if not isinstance(row, dict):
                fail(f"{path}, line {number}: expected an object, found {type(row).__name__}")
            rows.append(row)
    if not rows:
        fail(f"{path}: empty, expected one JSON object a line")
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
    """As `write_text`; a number that is not finite becomes null, JSON has none."""
    value = json.loads(json.dumps(value), parse_constant=lambda _: None)
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def key(name: str) -> int:
    """An integer for a problem's id, to seed its samples with."""
    return zlib.crc32(name.encode())


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def resolve_model(model: str) -> str:
    """`tiny` is the folder beside this file; anything else is left as it is."""
    return str(ROOT / "tiny") if model == "tiny" else model


def short_name(path: str) -> str:
    """What a model, a data set or a list of either is called in the names of runs: NAME for runs/NAME/model."""
    path = path.strip("/").removesuffix("/model").removesuffix(".jsonl")
    return path.replace(",", "+").split("/")[-1].replace(":", "")


def is_tiny(model: str) -> bool:
    """The embedded model, or one trained from it: `build_model` of tiny.py marks its configuration."""
    config = Path(resolve_model(model)) / "config.json"
    try:
        return config.is_file() and "embedded_reasoner" in json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        fail(f"--model {model}: its config.json is not JSON")


# ============================================================================================ flags and the folder


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that mean the same in every script."""
    data = parser.add_argument_group("model and data")
    data.add_argument("--model", default="tiny", help="Hub id, folder or tiny (the embedded reasoner)")
    data.add_argument("--dataset", help="Hub id, .jsonl file, tiny or tiny:N (N candidates); default: tiny for the "
                      "embedded model, else the paper's")  # fmt: skip
    data.add_argument("--split", help="split of the data set")
    data.add_argument(
        "--chat-template-kwargs",
        type=json_object,
        metavar="JSON",
        help="""arguments of the chat template, such as '{"enable_thinking": false}'""",
    )
    data.add_argument("--limit", type=positive_int, help="use only the first problems")
    run = parser.add_argument_group("run")
    run.add_argument(
        "--engine",
        choices=("auto", "vllm", "transformers"),
        default="auto",
        help="what samples; auto: vLLM if it is installed and finds a device",
    )
    run.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
                     help="arithmetic; auto: bfloat16 on a GPU, float32 on a CPU")  # fmt: skip
    run.add_argument("--seed", type=whole_number, default=0)
    run.add_argument("--out", type=Path, help="folder of the run; default: runs/ and a name made of the settings")
    run.add_argument("--config", type=Path, help="YAML file of defaults; flags override it")
    again = run.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on where the run in --out stopped")
    again.add_argument("--overwrite", action="store_true", help="discard the run in --out and start again")


def json_object(text: str) -> dict:
    with contextlib.suppress(ValueError):
        if isinstance(value := json.loads(text), dict):
            return value
    raise argparse.ArgumentTypeError(f"{text} is not a JSON object")


def whole_number(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")
    return int(text)


def positive_int(text: str) -> int:
    return whole_number(text, 1)


def numbers(flag: str, text: str) -> list[int]:
    """The positive whole numbers of a list like 1,2,4, in order, each once."""
    try:
        return sorted({positive_int(part) for part in str(text).split(",")})
    except argparse.ArgumentTypeError as error:
        fail(f"{flag}: {error}")


def non_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def parse_flags(parser: argparse.ArgumentParser, defaults: dict[str, tuple], argv: list[str] | None = None):
    """Parses flags over the settings of a --config file, if one is given, over the script's defaults.

    defaults: flag → (default with the embedded model, default with any other, where the second comes from).
    """
    actions = {action.dest: action for action in parser._actions}
    for name, (small, large, source) in defaults.items():
        actions[name].help = f"{actions[name].help or ''} (default: {small} for tiny, else {large}; {source})".strip()
    known, _ = parser.parse_known_args(argv)
    if known.config:
        from_file = []
        for key, value in read_config(known.config).items():
            name = str(key).replace("_", "-")
            action = actions.get(name.replace("-", "_"))
            if action is None:
                fail(f"--config {known.config}: no such flag --{name}")
            if action.nargs == 0 and not isinstance(value, bool):
                fail(f"--config {known.config}: {key} is true or false, found {value!r}")
            # As flags before the others they go through the same checks.
            if action.nargs == 0:
                from_file += [f"--{name}"] * value
            elif action.nargs == "+" and isinstance(value, list):
                from_file += [f"--{name}", *map(str, value)]
            elif value is not None:
                from_file.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
        argv = from_file + (sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)
    for name, (small, large, _) in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, small if is_tiny(args.model.split(",")[0]) else large)
    if getattr(args, "warmup", 0.0) >= 1:
        fail(f"--warmup {args.warmup}: is a share of the run, below 1")
    if getattr(args, "compare", None) and args.out and config_of(args.out):
        fail(f"--out {args.out}: holds a run; name another folder for the comparison")
    if not 0 < getattr(args, "top_p", 1.0) <= 1:
        fail(f"--top-p {args.top_p}: must be above 0 and at most 1")
    return args


def script_name() -> str:
    """Whose run a folder holds."""
    return Path(sys.argv[0]).name


def config_of(run: Path) -> dict | None:
    """config.json of the run in a folder; None if there is none (a model's folder has another config.json)."""
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        return config if isinstance(config["settings"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def lasting(config: dict) -> dict:
    """The settings that a run shares with what continues it, as JSON holds them."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in config.items()}
    return {k: v for k, v in settings.items() if k not in ("resume", "overwrite", "config", "out")}


LOCK = ".lock"  # in the folder of a run; the operating system lets go of it when its owner ends, however it ends
held: list[FileLock] = []


def own(out: Path) -> None:
    """This process (of several, the first) alone writes to a folder until it ends; ends the program if another does."""
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        held.append(FileLock(out / LOCK, timeout=0, is_singleton=True))
        held[-1].acquire()
    except Timeout:
        fail(f"--out {out}: another process is writing there")
    except OSError as error:
        fail(f"--out {out}: cannot be written: {first_line(error)}")


def check_out(out: Path, config: dict, resume: bool, overwrite: bool) -> bool:
    """Ends the program if the run may not be written to `out`; is there one to continue? Changes nothing."""
    if out.exists() and not out.is_dir():
        fail(f"--out {out}: is not a folder")
    if not out.exists() or not any(path.name != LOCK for path in out.iterdir()):
        return False
    there = config_of(out)
    if there is None:
        fail(f"--out {out}: holds something that is not a run of this program; name another folder")
    earlier, now = there["settings"], lasting(config)
    own(out)
    script = there.get("script", script_name())
    if script != script_name():  # such as the training run that holds the model to evaluate
        fail(f"--out {out}: holds a run of {script}; name another folder")
    if overwrite:
        return False
    if not resume:
        fail(f"--out {out}: holds a run already; add --resume to continue it or --overwrite to discard it")
    changed = [k for k in now if now[k] != earlier.get(k)]
    if changed:
        was = ", ".join(f"--{k.replace('_', '-')} {earlier.get(k)} (now {now[k]})" for k in changed)
        fail(f"--out {out}: the run there has other settings: {was}")
    return True


def check_out_of_many(out: Path) -> None:
    """Ends the program if the folder for the runs of several models is itself a run."""
    if config_of(out):
        fail(f"--out {out}: holds a run of one model; name another folder for several")


def read_config(path: Path) -> dict:
    """The settings of a --config file; what cannot be read or is not `name: value` ends the program."""
    try:
        text = path.read_text(encoding="utf-8")
        settings, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        fail(f"--config {path}: {first_line(error)}")
    if not isinstance(settings, dict):
        fail(f"--config {path}: expected lines of `name: value`")
    names = [str(name.value).replace("_", "-") for name, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    for name in names:
        if names.count(name) > 1:
            fail(f"--config {path}: {name} is set twice")
    return settings


def run_names(runs: list[Path]) -> dict[Path, str]:
    """A short name for each of several runs: the folder's, else that of the folder it is in, else the whole path."""
    for name in (lambda run: run.name, lambda run: run.parent.name, str):
        if len({name(run) for run in runs}) == len(set(runs)):
            break
    return {run: name(run) for run in runs}


def open_run(out: Path, config: dict, resume: bool, overwrite: bool) -> Path:
    """Creates the folder of a run and its `config.json`, or makes the one there ready to be continued."""
    if check_out(out, config, resume, overwrite):
        for lines in out.rglob("*.jsonl"):  # a crash may have cut the last line
            write_text(lines, "".join(whole_lines(lines)))
        return out
    out.mkdir(parents=True, exist_ok=True)
    own(out)
    for path in out.iterdir():  # of the run to overwrite
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    about = {"script": script_name(), "versions": versions(), "device": device_name(), "command": sys.argv}
    write_json(out / "config.json", {"settings": lasting(config), **about})
    return out


def same_inputs(run: Path, problems: list[dict], model: str) -> None:
    """Ends a run that is continued with other problems under the same ids, or with other weights in --model's folder
    than it began with (`inputs.json`); problems may be added."""
    file, folder = run / "inputs.json", Path(resolve_model(model))
    there = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"weights": {}, "problems": {}}
    now = {p["id"]: f"{key(json.dumps([p['problem'], p['answer']])):08x}" for p in problems}
    changed = [name for name, digest in now.items() if there["problems"].get(name, digest) != digest]
    if changed:
        fail(f"--out {run}: the run there has other problems ({len(changed)} of {len(now)}, such as {changed[0]})")
    weights = {path.name: checksum(path) for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])}
    if weights != there["weights"] and file.exists():
        fail(f"--out {run}: the run there began with other weights in {model}")
    write_json(file, {"weights": weights, "problems": {**there["problems"], **now}})


def checksum(path: Path) -> str:
    value = 0
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            value = zlib.crc32(part, value)
    return f"{value:08x}"


def json_line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def append_jsonl(path: Path, rows: list[dict]) -> None:
    """Appends one line a row."""
    with path.open("a", encoding="utf-8") as out:
        out.write("".join(map(json_line, rows)))


def load_records(run: Path) -> list[dict]:
    """The records of a run; lines of one problem (samples added later) are joined, a line cut by a crash is dropped."""
    records: dict[str, dict] = {}
    for line in whole_lines(run / "records.jsonl"):
        row = json.loads(line)
        records.setdefault(row["id"], {**row, "samples": []})["samples"] += row["samples"]
    return list(records.values())


def cell(metric: dict, digits: int = 3, sign: str = "") -> str:
    """A mean with its interval, for a table."""
    return f"{metric['mean']:{sign}.{digits}f} [{metric['low']:{sign}.{digits}f}, {metric['high']:{sign}.{digits}f}]"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "".join(f"| {' | '.join(row)} |\n" for row in [header, ["---"] * len(header), *rows])


class Clock:
    """Progress of long work: a line with the speed and the time left."""

    def __init__(self, total: int, what: str, sampler):
        self.total, self.what, self.sampler = total, what, sampler
        self.began, self.tokens = time.time(), sampler.sampled_tokens

    def tell(self, done: int) -> None:
        seconds = time.time() - self.began
        rate = (self.sampler.sampled_tokens - self.tokens) / max(seconds, 1e-9)
        left = duration(seconds * (self.total - done) / max(1, done))
        print(f"{done} of {self.total} {self.what}  {rate:,.0f} tokens/s  {left} left", flush=True)


def unrecorded(run: Path, problems: list[dict], size: int, sampler) -> Iterator[list[int]]:
    """The places of the problems that `records.jsonl` lacks, in batches; tells the progress after each."""
    recorded = {r["id"] for r in load_records(run)} if (run / "records.jsonl").exists() else set()
    todo = [i for i, p in enumerate(problems) if p["id"] not in recorded]
    clock = Clock(len(todo), "problems", sampler)
    for start in range(0, len(todo), size):
        some = todo[start : start + size]
        yield some
        clock.tell(start + len(some))


def pyplot():
    """matplotlib without a screen, imported when a figure is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def token_axis(axis) -> None:
    """A logarithmic axis of tokens, with plain numbers at powers of two."""
    from matplotlib import ticker

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(ticker.LogLocator(base=2, numticks=8))
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axis.xaxis.set_minor_locator(ticker.NullLocator())


def line(axis, x, cells: list[dict], color=None, label=None, style="-", band=True) -> None:
    """A line through means, with the band of their intervals."""
    (drawn,) = axis.plot(x, [c["mean"] for c in cells], style, color=color, label=label, markersize=3, linewidth=1.2)
    if band:
        low, high = ([c[end] for c in cells] for end in ("low", "high"))
        axis.fill_between(x, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)


def save_figure(figure, path: Path) -> Path:
    figure.savefig(path.with_suffix(".tmp.png"), dpi=160)
    pyplot().close(figure)
    return path.with_suffix(".tmp.png").replace(path)


def versions() -> dict[str, str]:
    """Versions of what a result depends on, and the commit of this checkout where git knows it."""
    import transformers

    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    found["transformers"] = transformers.__version__
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found["commit"] = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    return found


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
