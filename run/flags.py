"""Flags that mean the same in every script, a --config file of defaults, and what a server says about its model."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml

from engine import first_line
from engine.models import described
from engine.processes import ranks
from engine.served_engine import find_served, is_served
from run.files import check_text, digest, fail
from run.folder import MAY_CHANGE, config_of


class Parser(argparse.ArgumentParser):
    """What it refuses is one line, too."""

    def __init__(self, **more):
        super().__init__(allow_abbrev=False, **more)

    def error(self, message: str) -> NoReturn:
        fail(message.removeprefix("argument "))


def new_parser(doc: str | None, dataset: tuple, split: tuple, limit: tuple) -> argparse.ArgumentParser:
    """A parser with the flags that mean the same in every script; the script's own defaults as in `add_group`."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = add_group(parser, "model and data")
    flag("model", help="Hub id, folder, tiny (the embedded reasoner; default), tiny/backtrack or a served name")
    flag("dataset", *dataset, help="Hub id, file, tiny, tiny:30 (10, 20 or 30 candidates) or tiny/backtrack")
    flag("split", *split, help="split of the data set, or a part of one like test[100:200]")
    flag("limit", *limit, type=positive_int, help="use only so many problems, from the first")
    flag("problem-column", help="column of the problem, or outer.inner; default: one of the usual names")
    flag("answer-column", help="column of the gold answer, likewise")
    flag("skip-unusable", action="store_true", help="leave out rows of a file that cannot be used")
    template = """arguments of the chat template, such as '{"enable_thinking": false}'"""
    flag("chat-template-kwargs", type=json_object, metavar="JSON", help=template)
    marks = "what opens and what ends a thought, where chat template and vocabulary do not say it"
    flag("think-marks", nargs=2, metavar=("OPEN", "CLOSE"), help=marks)
    markers = "phrases, one a line, that open an episode besides the published ones"
    flag("markers", type=Path, metavar="FILE", help=markers)
    parameters = "what a model writes: a thought of episodes, or attempts with explicit backtracks between them"
    both = ("open-ended", "backtracking")
    flag("parameterization", both[0], both[0], "unless the model's own is another", choices=both, help=parameters)
    flag = add_group(parser, "run")
    engine = "what samples: vllm, transformers, or the address of a server like http://127.0.0.1:8000/v1, its key in "
    engine += "OPENAI_API_KEY (default: vllm if it is installed and finds a device)"
    flag("engine", type=engine_name, default="auto", help=engine)
    flag("tokenizer", help="that of a served model: Hub id or folder (default: what the server loaded)")
    flag("concurrency", type=positive_int, default=64, help="requests to a server at a time (64)")
    dtype = "precision; auto: bfloat16 on a GPU, float32 on a CPU"
    flag("dtype", choices=("auto", "bfloat16", "float32"), default="auto", help=dtype)
    flag("seed", type=whole_number, default=0)
    flag("out", type=Path, help="folder of the run; default: runs/ and a name made of what differs from the defaults")
    flag("config", type=Path, help="YAML file of defaults; flags override it")
    flag("resume", action="store_true", help="go on where the run in --out stopped")
    flag("overwrite", action="store_true", help="discard the run in --out and start again")
    plan = "print upper bounds on requests and sampled tokens, and end; with RATE, tokens a second, the time, too"
    flag("dry-run", nargs="?", const=True, default=False, type=positive_int, metavar="RATE", help=plan)
    return parser


def add_group(parser: argparse.ArgumentParser, title: str) -> Callable:
    """Adds a group of flags; returns `flag(name, tiny, other, source, **as of add_argument)`: the defaults with the
    embedded model and with any other, and where the second comes from. Type and help of a name in `SHARED` are there.
    """
    group = parser.add_argument_group(title)

    def flag(name: str, tiny=None, other=None, source: str = "", **more) -> None:
        if name in SHARED:
            more["type"], more["help"] = SHARED[name]
        if source:
            values = f"{tiny}" if tiny == other else f"{tiny} for tiny, else {other}"
            more["help"] = f"{more.get('help', '')} (default: {values}; {source})".strip()
        action: Any = group.add_argument(f"--{name}", **more)
        action.by_model = (tiny, other)

    return flag


def engine_name(text: str) -> str:
    if text in ("auto", "vllm", "transformers"):
        return text
    if not re.fullmatch(r"https?://[^@?#\s]+", text):  # not repeated: it may hold a key
        raise argparse.ArgumentTypeError("must be auto, vllm, transformers or a URL like http://127.0.0.1:8000/v1")
    return text.rstrip("/")


def json_object(text: str) -> dict:
    with contextlib.suppress(ValueError):
        if isinstance(value := json.loads(text), dict):
            check_text(value)
            return value
    raise argparse.ArgumentTypeError(f"{text} is not a JSON object of whole characters")


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


positive_int = partial(whole_number, least=1)


def numbers(flag: str, text: str) -> list[int]:
    """The positive whole numbers of a list like 1,2,4, in order, each once."""
    try:
        return sorted({positive_int(part) for part in str(text).split(",")})
    except argparse.ArgumentTypeError as error:
        fail(f"{flag}: {error}")


def quarters(max_tokens: int) -> list[int]:
    """The budgets that are looked at by default, as in Figure 9."""
    return sorted({max(1, max_tokens * part // 4) for part in (1, 2, 3, 4)})


def non_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def share(text: str) -> float:
    if (value := non_negative(text)) >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not below 1")
    return value


# Flags that mean the same in every script that has them.
SHARED = {
    "num-samples": (positive_int, "traces per problem"),
    "max-tokens": (positive_int, "budget of a completion, thought and answer"),
    "temperature": (non_negative, "for traces and forced answers"),
    "top-p": (float, "sample from the likeliest tokens with this mass"),
    "forced-answers": (positive_int, "sampled answers for each J(μ|prefix)"),
    "answer-tokens": (positive_int, "token limit of a forced answer; less where --max-tokens is"),
    "max-episodes": (positive_int, "in longer thoughts neighbouring episodes are joined"),
    "budgets": (str, "token budgets C0, such as 512,1024 (default: quarters of --max-tokens or of the longest given)"),
    "regret-axis": (str, "tokens of a point of the regret: what the model wrote, or all that μ read and wrote"),
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


def parse_flags(parser: argparse.ArgumentParser, argv: list[str] | None = None):
    """Parses flags over the settings of a --config file, if one is given, over the script's defaults."""
    actions: dict[str, Any] = {action.dest: action for action in parser._actions}
    argv = sys.argv[1:] if argv is None else argv
    known, _ = parser.parse_known_args(argv)
    if known.config:  # passed as flags before the others, its settings go through the same checks
        argv = flags_of(known.config, actions) + argv
    for word in argv:
        try:
            check_text(word)
        except ValueError as why:
            fail(f"{word!a}: {why}")
    args = parser.parse_args(argv)
    if ranks()[1] > 1 and not torch.distributed.is_initialized():
        fail(f"{parser.prog} runs in one process: start it without torchrun")
    args.context = None
    if is_served(args.engine) and not any(getattr(args, flag, None) for flag in ("compare", "from_run", "dry_run")):
        ask_server(args)
    elif is_served(args.engine) and not args.model:
        fail(f"--engine {args.engine}: name the --model that is served there")
    args.model = args.model or "tiny"
    fill_in(args, actions)
    refuse_shared(args)
    return args


def fill_in(args: argparse.Namespace, actions: dict[str, Any]) -> None:
    """The defaults of flags that were not given; in `unusual` those that were and are not the defaults."""
    kinds = [described(args.tokenizer or model) for model in args.model.split(",")]
    about, tiny = kinds[0], "embedded_reasoner" in kinds[0]
    if any(("embedded_reasoner" in other) != tiny for other in kinds):
        fail(
            f"--model {args.model}: the embedded model has other defaults than the others; run them apart and --compare"
        )
    defaults = {name: action.by_model[not tiny] for name, action in actions.items() if hasattr(action, "by_model")}
    defaults |= {name: value for name, value in about.get("flags", {}).items() if name in defaults}
    for name in ("answer_tokens", "extension_tokens"):  # as much less as --max-tokens is than its default
        if args.max_tokens and name in args:
            less = defaults[name] * args.max_tokens // defaults["max_tokens"]
            defaults[name] = min(defaults[name], max(64, less))
    args.unusual = {}
    for name, default in defaults.items():
        if (value := getattr(args, name)) is None:
            setattr(args, name, default)
        elif value is not False and value != default and value != actions[name].default:
            args.unusual[name] = value
    args.markers_file, args.markers = args.markers, load_markers(args.markers) if args.markers else []
    if "budgets" in args:
        # Where there are records or given thoughts, they say how long these are.
        records = any(getattr(args, name, None) for name in ("compare", "traces", "from_run"))
        named = numbers("--budgets", args.budgets) if args.budgets else []
        args.budgets = named or ([] if records else quarters(args.max_tokens))


def refuse_shared(args: argparse.Namespace) -> None:
    """Ends the program for values of shared flags that make no sense."""
    if args.tokenizer and not is_served(args.engine):
        fail(f"--tokenizer {args.tokenizer}: is for a served model; the others have their own")
    if args.resume and args.overwrite:
        fail("--resume and --overwrite: not both")
    if args.think_marks and ("" in map(str.strip, args.think_marks) or len(set(args.think_marks)) < 2):
        fail("--think-marks: needs two different marks")
    if getattr(args, "warmup", 0.0) >= 1:
        fail(f"--warmup {args.warmup}: is a share of the run, below 1")
    if getattr(args, "compare", None) and args.out and config_of(args.out):
        fail(f"--out {args.out}: holds a run; name another folder for the comparison")
    if getattr(args, "lr", 1.0) == 0:
        fail("--lr 0: trains nothing")
    if not 0 < getattr(args, "top_p", 1.0) <= 1:
        fail(f"--top-p {args.top_p}: must be above 0 and at most 1")


def flags_of(config: Path, actions: dict[str, argparse.Action]) -> list[str]:
    """The settings of a --config file as flags."""
    words = []
    for setting, value in read_config(config).items():
        name = str(setting).replace("_", "-")
        action = actions.get(name.replace("-", "_"))
        if action is None:
            fail(f"--config {config}: no such flag --{name}")
        if action.nargs == 0 and not isinstance(value, bool):
            fail(f"--config {config}: {setting} is true or false, found {value!r}")
        if action.nargs == 0:
            words += [f"--{name}"] * value
        elif action.nargs in ("+", 2) and isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


def default_out(args: argparse.Namespace, name: str, *in_name: str) -> Path:
    """runs/NAME with the flags that were given and are not the defaults, so that other settings are another folder.
    `in_name`: flags that the name has, or that --resume may change."""
    for flag, value in args.unusual.items():
        if flag in (*MAY_CHANGE, "model", "dataset", "tokenizer", *in_name):
            continue
        text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
        text = "served" if flag == "engine" and is_served(text) else digest(text)[:6] if len(text) > 40 else text
        name += f"-{flag.replace('_', '-')}" + f"-{text}" * (value is not True)
    name = re.sub(r"[^\w.+]+", "-", name)
    return Path("runs") / (name if len(name) <= 120 else f"{name[:100]}-{digest(name)}")


def changed(args: argparse.Namespace, **settings) -> argparse.Namespace:
    """A copy with other values of some settings."""
    return argparse.Namespace(**{**vars(args), **settings})


def with_model(args: argparse.Namespace, model: str) -> argparse.Namespace:
    """The settings for another model, which a server at --engine has to serve, too."""
    other = changed(args, model=model, tokenizer=None, think_marks=None)
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
    models = [find_served(args.engine, model) for model in (args.model.split(",") if args.model else [None])]
    args.model, weights = ",".join(model.name for model in models), models[0].weights
    if len({model.weights for model in models}) > 1 and not args.tokenizer:
        fail(f"--model {args.model}: other weights have other tokenizers; evaluate one at a time, then --compare")
    if not args.tokenizer and weights.startswith("/") and not Path(weights).is_dir():
        fail(f"--engine {args.engine}: has loaded {weights}, which is not here; name its --tokenizer")
    args.tokenizer = args.tokenizer or weights
    args.context = min((model.context for model in models if model.context), default=None)


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
