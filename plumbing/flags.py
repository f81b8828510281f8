"""Flags that mean the same in every script, a --config file of defaults, and what a server says about its model."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import sys
from pathlib import Path

import yaml

from plumbing.runs import config_of, fail, first_line, is_served, is_tiny
from plumbing.served_engine import find_model


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that mean the same in every script."""
    data = parser.add_argument_group("model and data")
    data.add_argument("--model", help="Hub id, folder, tiny (the embedded reasoner; default) or a served name")
    dataset = (
        "Hub id, file, tiny or tiny:30 (10, 20 or 30 candidates); default: tiny, or the paper's with another model"
    )
    data.add_argument("--dataset", help=dataset)
    data.add_argument("--split", help="split of the data set, or a part of one like test[100:200]")
    data.add_argument("--limit", type=positive_int, help="use only so many problems, from the first")
    data.add_argument("--problem-column", help="column of the problem, or outer.inner; default: one of the usual names")
    data.add_argument("--answer-column", help="column of the gold answer, likewise")
    data.add_argument("--skip-unusable", action="store_true", help="leave out rows of a file that cannot be used")
    template = """arguments of the chat template, such as '{"enable_thinking": false}'"""
    data.add_argument("--chat-template-kwargs", type=json_object, metavar="JSON", help=template)
    markers = "phrases, one a line, that open an episode besides the published ones"
    data.add_argument("--markers", type=Path, metavar="FILE", help=markers)
    run = parser.add_argument_group("run")
    run.add_argument(
        "--engine",
        type=engine_name,
        default="auto",
        help="what samples: vllm, transformers, or the address of a server like http://127.0.0.1:8000/v1, its key in "
        "OPENAI_API_KEY (default: vllm if it is installed and finds a device)",
    )
    run.add_argument("--tokenizer", help="that of a served model: Hub id or folder (default: what the server loaded)")
    run.add_argument("--concurrency", type=positive_int, default=64, help="requests to a server at a time (64)")
    dtype = "precision; auto: bfloat16 on a GPU, float32 on a CPU"
    run.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help=dtype)
    run.add_argument("--seed", type=whole_number, default=0)
    run.add_argument("--out", type=Path, help="folder of the run; default: runs/ and a name made from the settings")
    run.add_argument("--config", type=Path, help="YAML file of defaults; flags override it")
    again = run.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on where the run in --out stopped")
    again.add_argument("--overwrite", action="store_true", help="discard the run in --out and start again")


def shared_flags(parser: argparse.ArgumentParser, title: str, names: str):
    """Adds a group with the named flags of `SHARED`; returns the group's `add_argument` for the script's own."""
    add = parser.add_argument_group(title).add_argument
    for name in names.split():
        kind, text = SHARED[name]
        add(f"--{name}", type=kind, help=text)
    return add


def engine_name(text: str) -> str:
    if text in ("auto", "vllm", "transformers"):
        return text
    if not re.fullmatch(r"https?://[^@?#\s]+", text):  # not repeated: it may hold a key
        raise argparse.ArgumentTypeError("must be auto, vllm, transformers or a URL like http://127.0.0.1:8000/v1")
    return text.rstrip("/")


def json_object(text: str) -> dict:
    with contextlib.suppress(ValueError):
        if isinstance(value := json.loads(text), dict):
            return value
    raise argparse.ArgumentTypeError(f"{text} is not a JSON object")


def whole_number(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")
    return int(text)


def load_markers(file: Path) -> list[str]:
    """The markers of a file with one a line; spaces around them count, blank lines do not."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--markers {file}: cannot be read: {first_line(error)}")
    markers = list(dict.fromkeys(line for line in lines if line.strip()))
    if not markers:
        fail(f"--markers {file}: holds no marker")
    return markers


def positive_int(text: str) -> int:
    return whole_number(text, 1)


def numbers(flag: str, text: str) -> list[int]:
    """The positive whole numbers of a list like 1,2,4, in order, each once."""
    try:
        return sorted({positive_int(part) for part in str(text).split(",")})
    except argparse.ArgumentTypeError as error:
        fail(f"{flag}: {error}")


def quarters(max_tokens: int) -> list[int]:
    """The budgets that are looked at by default, as in Section 7."""
    return sorted({max(1, max_tokens * part // 4) for part in (1, 2, 3, 4)})


def non_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


# Flags that mean the same in every script that has them; their defaults are in the scripts' DEFAULTS.
SHARED = {
    "num-samples": (positive_int, "traces per problem"),
    "max-tokens": (positive_int, "budget of a completion, thought and answer"),
    "temperature": (non_negative, "for traces and forced answers"),
    "top-p": (float, "sample from the likeliest tokens with this mass"),
    "forced-answers": (positive_int, "sampled answers for each J(μ|prefix)"),
    "answer-tokens": (positive_int, "token limit of a forced answer"),
    "max-episodes": (positive_int, "in longer thoughts neighbouring episodes are joined"),
    "budgets": (str, "token budgets C0, such as 512,1024 (default unless another is named: quarters of --max-tokens)"),
    "batch-problems": (positive_int, "problems sampled and recorded together"),
    "lr": (non_negative, "learning rate"),
    "warmup": (non_negative, "share of the run in which the learning rate rises"),
    "weight-decay": (non_negative, "weight decay of AdamW"),
    "max-grad-norm": (non_negative, "gradients of a larger norm are clipped to it; 0: never"),
    "max-tokens-per-batch": (positive_int, "tokens of a micro-batch, including padding"),
    "checkpoint-every": (positive_int, "steps between checkpoints"),
    "eval-dataset": (str, "held-out problems; default: tiny's own, none for other data"),
    "eval-split": (str, "split of --eval-dataset"),
    "eval-problems": (positive_int, "at most this many held-out problems"),
}


def parse_flags(parser: argparse.ArgumentParser, defaults: dict[str, tuple], argv: list[str] | None = None):
    """Parses flags over the settings of a --config file, if one is given, over the script's defaults.

    defaults: flag → (default with the embedded model, default with any other, where the second comes from).
    """
    actions = {action.dest: action for action in parser._actions}
    for name, (small, large, source) in defaults.items():
        values = f"{small}" if small == large else f"{small} for tiny, else {large}"
        actions[name].help = f"{actions[name].help or ''} (default: {values}; {source})".strip()
    known, _ = parser.parse_known_args(argv)
    if known.config:
        from_file = []
        for setting, value in read_config(known.config).items():
            name = str(setting).replace("_", "-")
            action = actions.get(name.replace("-", "_"))
            if action is None:
                fail(f"--config {known.config}: no such flag --{name}")
            if action.nargs == 0 and not isinstance(value, bool):
                fail(f"--config {known.config}: {setting} is true or false, found {value!r}")
            # Passed as flags before the others, they go through the same checks.
            if action.nargs == 0:
                from_file += [f"--{name}"] * value
            elif action.nargs == "+" and isinstance(value, list):
                from_file += [f"--{name}", *map(str, value)]
            elif value is not None:
                from_file.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
        argv = from_file + (sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)
    args.context = None
    if is_served(args.engine) and not any(getattr(args, flag, None) for flag in ("compare", "from_run", "dry_run")):
        ask_server(args)
    args.model = args.model or "tiny"
    for name, (small, large, _) in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, small if is_tiny(args.tokenizer or args.model.split(",")[0]) else large)
    args.markers = load_markers(args.markers) if args.markers else []
    if "budgets" in args:
        compared = getattr(args, "compare", None)  # then the records say how long thoughts may be
        given = numbers("--budgets", args.budgets) if args.budgets else []
        args.budgets = given or ([] if compared else quarters(args.max_tokens))
    if getattr(args, "warmup", 0.0) >= 1:
        fail(f"--warmup {args.warmup}: is a share of the run, below 1")
    if getattr(args, "compare", None) and args.out and config_of(args.out):
        fail(f"--out {args.out}: holds a run; name another folder for the comparison")
    if not 0 < getattr(args, "top_p", 1.0) <= 1:
        fail(f"--top-p {args.top_p}: must be above 0 and at most 1")
    return args


def changed(args: argparse.Namespace, **settings) -> argparse.Namespace:
    """A copy with other values of some settings."""
    return argparse.Namespace(**{**vars(args), **settings})


def with_model(args: argparse.Namespace, model: str) -> argparse.Namespace:
    """The settings for another model, which a server at --engine has to serve, too."""
    other = changed(args, model=model, tokenizer=None)
    if is_served(args.engine):
        ask_server(other)
    return other


def each_in_its_folder(args: argparse.Namespace, names: list[str], settings: list[dict]) -> list[argparse.Namespace]:
    """The settings of several runs, each in its own folder in --out; a single run uses --out itself."""
    if len(names) == 1:
        return [changed(args, **settings[0])]
    if config_of(args.out):
        fail(f"--out {args.out}: holds a run of one model; name another folder for several")
    for name in names:
        if names.count(name) > 1:
            fail(f"--model {args.model}: two of the runs would have the same folder {args.out / name}")
    return [changed(args, out=args.out / name, **values) for name, values in zip(names, settings)]


def ask_server(args) -> None:
    """Sets --model, --tokenizer and the context of a served model to what the server at --engine says."""
    models = [find_model(args.engine, model) for model in (args.model.split(",") if args.model else [None])]
    args.model = ",".join(name for name, _, _ in models)
    if not args.tokenizer and models[0][1].startswith("/") and not Path(models[0][1]).is_dir():
        fail(f"--engine {args.engine}: has loaded {models[0][1]}, which is not here; name its --tokenizer")
    args.tokenizer = args.tokenizer or models[0][1]
    args.context = min((context for _, _, context in models if context), default=None)


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
