"""experiments/locks/kill.py: the kill test of two locks (issue 35, item 3). Throw-away, not merged; see locks.py.

    python -m experiments.locks.kill base --model runs/locks/base         # held out: right, tokens, J's calibration
    python -m experiments.locks.kill gradients --model runs/locks/base    # 64 batches of 8 train problems × 4, resumable
    python -m experiments.locks.kill report                               # → experiments/locks/summary.json

Each batch of 32 rollouts gives one gradient for each part of an advantage (outcome = reward - mean of its group; GRPO's;
progress credit in J, in nats with a floor of 1e-3 or 1e-4, shuffled in nats). Estimators are sums of parts, so all that
is said of them follows from the inner products of the parts' gradients, K. With m the mean gradient of an estimator, o
the outcome's, and Σ the covariance of one batch of 32:

    own S/N              |m|² / tr Σ                  |m|² from pairs of different batches, so without bias
    S/N to the outcome   (m · o / |o|)² / tr Σ        m · o and |o|² likewise; decided on (fixed before any was seen)
    S/N along it         mean² / variance of g_b · û_-b, û_-b the unit mean outcome gradient of the other batches
    cosine               mean cos(g_b, û_-b)

Ratios are to GRPO; ± is the jackknife over batches, and the two halves of the batches are given, too.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch

from common import Forcing, Segmentation, episode_progress, force_answers, forced_prompt, group_advantages
from common import read_traces, set_likelihood_J
from engine import models
from engine.logprobs import token_logprobs
from engine.sampler import Sampler
from engine.tokens import prompt_ids
from engine.transformers_engine import TransformersEngine
from experiments.locks.locks import left, locks_of, problems
from rl_mrt import episode_credit
from run import training

RULE = Segmentation(49, 1, 32)
PARTS = ("outcome", "GRPO", "linear", "nats", "nats 1e-4", "shuffled")
ESTIMATORS = {
    "outcome": ("outcome",),
    "GRPO": ("GRPO",),
    "GRPO + progress": ("GRPO", "linear"),
    "GRPO + nats": ("GRPO", "nats"),
    "GRPO + nats, floor 1e-4": ("GRPO", "nats 1e-4"),
    "GRPO + shuffled nats": ("GRPO", "shuffled"),
    "nats alone": ("nats",),
}


def log_at_least(floor: float):
    return lambda J: np.log(np.maximum(J, floor))


def sampled(args, sampler, chosen, n: int, seed: int):
    prompts = [prompt_ids(sampler.tokenizer, p["problem"]) for p in chosen]
    seeds = [(seed, p["place"]) for p in chosen]
    groups = read_traces(
        sampler.tokenizer, chosen, prompts, sampler.generate(prompts, args.max_tokens, seeds, n=n), RULE
    )
    set_likelihood_J(sampler, [t for g in groups for t in g])
    return groups


def state(trace, j: int) -> str:
    text = trace.prefix(trace.boundaries[j])
    found = [f"{v} = {s} works" in text for v, (_, s) in zip("xy", locks_of(trace.problem))]
    return "both" if all(found) else "x" if found[0] else "y" if found[1] else "none"


def facts(groups) -> dict:
    """What is said of rollouts."""
    traces = [t for g in groups for t in g]
    ends = [state(t, -1) for t in traces]
    jumps: dict[str, list[float]] = {"none": [], "x": [], "x found": [], "y found": []}
    J_in: dict[str, list[float]] = {"empty": [], "none": [], "x": [], "both": []}
    low = []
    for t in traces:
        states = [state(t, j) for j in range(len(t.boundaries))]
        for j, s in enumerate(states):
            J_in.setdefault("empty" if j == 0 else s, []).append(t.J[j])
            low.append(t.J[j])
        for a, b, gain in zip(states, states[1:], np.diff(np.log(np.maximum(t.J, 1e-6)))):
            key = a if a == b else "x found" if (a, b) == ("none", "x") else "y found" if (a, b) == ("x", "both") else ""
            if key:
                jumps.setdefault(key, []).append(gain)
    good_of = {"x": [], "y": []}
    lines = good = again = tries = 0
    for t in traces:
        text = t.prefix(t.boundaries[-1])
        seen = set()
        for verb, v, x, sq, b, total, target, yes in re.findall(
            r"(try|check) ([xy]) = (\d+): \d+² ≡ ?(\d+), \+ ?(\d+) ≡ ?(\d+) vs ?(\d+): (yes|no)", text
        ):
            B, S = locks_of(t.problem)["xy".index(v)]
            lines += 1
            good_of[v].append((int(b), int(total), int(target)) == (B, (int(x) ** 2 + B) % 61, (S * S + B) % 61))
            good += (int(b), int(total), int(target)) == (B, (int(x) ** 2 + B) % 61, (S * S + B) % 61) and (
                yes == "yes"
            ) == (total == target)
            tries += verb == "try"
            again += verb == "try" and (v, x) in seen
            seen.add((v, x))
    mean = lambda values: float(np.mean(list(values))) if len(values) else None  # noqa: E731
    return {
        "rollouts": len(traces),
        "right": mean([t.reward for t in traces]),
        "right se over problems": float(np.std([np.mean([t.reward for t in g]) for g in groups]) / len(groups) ** 0.5),
        "tokens": mean([len(t.completion.token_ids) for t in traces]),
        "truncated": mean([t.completion.finish_reason == "length" for t in traces]),
        "flat groups": mean([len({t.reward for t in g}) == 1 for g in groups]),
        "all wrong groups": mean([max(t.reward for t in g) == 0 for g in groups]),
        "episodes": mean([len(t.boundaries) - 1 for t in traces]),
        "x found": mean([s in ("x", "both") for s in ends]),
        "both found": mean([s == "both" for s in ends]),
        "right where both found": mean([t.reward for t, s in zip(traces, ends) if s == "both"]),
        "sums right of x": mean(good_of["x"]),
        "sums right of y": mean(good_of["y"]),
        "lines right": good / max(1, lines),
        "tries again of the same": again / max(1, tries),
        "mean J": {k: mean(v) for k, v in J_in.items()},
        "boundaries with J < 1e-3": mean([J < 1e-3 for J in low]),
        "boundaries with J < 1e-4": mean([J < 1e-4 for J in low]),
        "empty prefixes with J < 1e-3": mean([J < 1e-3 for J in J_in["empty"]]),
        "nats of an episode": {k: [mean(v), float(np.median(v)) if v else None, len(v)] for k, v in jumps.items()},
    }


def base(args) -> None:
    """Held-out problems, and J against sampled forced answers."""
    tokenizer, model = models.load_tokenizer(args.model), models.load_model(args.model, "cpu")
    sampler = Sampler(TransformersEngine(model), tokenizer)
    groups = sampled(args, sampler, problems("test", args.problems), 4, 7)
    found = {"test": facts(groups)}
    rng = np.random.default_rng(0)
    picked = [(t, j) for g in groups for t in g for j in rng.permutation(len(t.boundaries))[:3]]
    prompts = [forced_prompt(tokenizer, t, t.boundaries[j]) for t, j in picked]
    answers = force_answers(sampler, [t.problem for t, _ in picked], prompts, Forcing(8, 8), [(9, i) for i in range(len(picked))])
    rows: dict[str, list] = {}
    for (t, j), row in zip(picked, answers):
        s = "empty" if j == 0 else state(t, j)
        text = t.prefix(t.boundaries[j])
        ideal = 1 / np.prod([len(left(text, v, S)) for v, (_, S) in zip("xy", locks_of(t.problem))])
        share = np.mean([a.verdict == "right" for a in row])
        boxed = np.mean([a.boxed is not None for a in row])
        name = s if s != "none" else "none, fewer than 15 left of x" if ideal > 1 / 450 else "none, 15 or more left of x"
        rows.setdefault(name, []).append((t.J[j], share, ideal, boxed))
        bin_ = f"J in 1e{int(np.floor(np.log10(max(t.J[j], 1e-6))))}…" if t.J[j] < 0.1 else "J ≥ .5" if t.J[j] >= 0.5 else "J in .1 to .5"
        rows.setdefault(bin_, []).append((t.J[j], share, ideal, boxed))
    found["calibration"] = {
        name: dict(zip(("J", "sampled", "of an ideal μ", "boxed", "prefixes", "se of sampled"),
                       [*map(float, np.mean(v, 0)), len(v), float(np.std([r[1] for r in v]) / len(v) ** 0.5)]))
        for name, v in sorted(rows.items())
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "base.json").write_text(json.dumps(found, indent=1, ensure_ascii=False))
    print(json.dumps(found, indent=1, ensure_ascii=False))
    for t in [g[0] for g in groups[: args.show]]:
        print(t.problem["problem"], t.problem["answer"], t.reward, np.round(t.J, 4).tolist(), "\n", t.completion.text, "\n")


def parts_of(groups, rng) -> dict[str, list[np.ndarray]]:
    """{part of an advantage: its tokens' values for each trace}."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in PARTS}
    nats = log_at_least(1e-3)
    for group in groups:
        rewards = torch.tensor([t.reward for t in group], dtype=torch.float64)
        tokens = [len(t.completion.token_ids) for t in group]
        found["outcome"] += [np.full(n, a) for n, a in zip(tokens, (rewards - rewards.mean()).tolist())]
        found["GRPO"] += [np.full(n, a) for n, a in zip(tokens, group_advantages(rewards[None])[0].tolist())]
        found["linear"] += episode_credit(group)
        found["nats"] += episode_credit(group, nats)
        found["nats 1e-4"] += episode_credit(group, log_at_least(1e-4))
        shuffle = lambda J: np.cumsum([nats(J)[0], *rng.permutation(episode_progress(nats(J)))])  # noqa: E731
        found["shuffled"] += episode_credit(group, shuffle)
    return found


def openings(groups, parts) -> dict[str, list[float]]:
    """Mean advantages of the token that opens a useful episode, an idle one, the answer, for each part."""
    found: dict[str, list] = {}
    traces = [t for g in groups for t in g]
    for i, t in enumerate(traces):
        tried: set = set()
        for start, end in zip(t.boundaries, t.boundaries[1:]):
            new = set(re.findall(r"try ([xy] = \d+)", t.prefix(end)[len(t.prefix(start)) :])) - tried
            found.setdefault("useful" if new else "idle", []).append([parts[p][i][start] for p in PARTS])
            tried |= new
        if t.finished:
            found.setdefault("answer", []).append([parts[p][i][t.boundaries[-1]] for p in PARTS])
    return {k: [*np.sum(v, 0).tolist(), len(v)] for k, v in found.items()}


def gradients(args) -> None:
    tokenizer, model = models.load_tokenizer(args.model), models.load_model(args.model, "cpu")
    sampler = Sampler(TransformersEngine(model), tokenizer)
    args.out.mkdir(parents=True, exist_ok=True)
    size = sum(p.numel() for p in model.parameters())
    file = args.out / "gradients.npy"
    shape = (args.batches, len(PARTS), size)
    stored = np.lib.format.open_memmap(file, "r+" if file.exists() else "w+", np.float32, shape)
    chosen = args.pose("train", 8 * args.batches)
    for first in range(0, args.batches, args.at_once):
        done = args.out / f"facts-{first}.json"
        if done.exists():
            continue
        many = sampled(args, sampler, chosen[8 * first : 8 * (first + args.at_once)], 4, 100 + first)
        rows = []
        for k in range(len(many) // 8):
            groups = many[8 * k : 8 * k + 8]
            traces = [t for g in groups for t in g]
            parts = parts_of(groups, np.random.default_rng((5, first + k)))
            examples = [(t.prompt + t.completion.token_ids, len(t.prompt), np.zeros((1, len(t.completion.token_ids)))) for t in traces]
            tokens = sum(len(t.completion.token_ids) for t in traces)
            sums = torch.zeros(len(PARTS), size)
            for order, ids, where, _ in training.micro_batches(examples, range(len(traces)), 8192, "cpu"):
                logprobs, _ = token_logprobs(model, ids, where)
                for p, name in enumerate(PARTS):
                    weights = torch.tensor(np.concatenate([parts[name][i] for i in order]), dtype=torch.float32)
                    if not weights.any():
                        continue
                    loss = -(weights * logprobs).sum() / tokens
                    grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
                    sums[p] += torch.cat([g.flatten() for g in grads])
            stored[first + k] = sums.numpy()
            rows.append(openings(groups, parts))
            print(f"batch {first + k}: right {np.mean([t.reward for t in traces]):.3f}", flush=True)
        stored.flush()
        done.write_text(json.dumps({"facts": facts(many), "openings": rows}, ensure_ascii=False))


def measures(K: np.ndarray, keep: np.ndarray, alpha: float = 1.0) -> dict[str, dict[str, float]]:
    """From K [parts, parts, batches, batches], over the batches kept."""
    K = K[:, :, keep][:, :, :, keep]
    n = len(keep)
    combos = np.array([[float(p in names) * (1 if p in PARTS[:2] else alpha) for p in PARTS] for names in ESTIMATORS.values()])
    E = np.einsum("ep,pqbc,fq->efbc", combos, K, combos)
    off = lambda M: (M.sum() - np.trace(M)) / (n * (n - 1))  # noqa: E731
    o = list(ESTIMATORS).index("outcome")
    oo, found = E[o, o], {}
    others = oo.sum() - 2 * oo.sum(1) + np.diag(oo)  # |Σ_{c≠b} o_c|²
    for e, name in enumerate(ESTIMATORS):
        own, cross = E[e, e], E[e, o]
        signal, noise = off(own), np.trace(own) / n - off(own)
        p = (cross.sum(1) - np.diag(cross)) / np.sqrt(others)
        found[name] = {
            "own S/N": signal / noise,
            "S/N to the outcome": max(0, off(cross)) ** 2 / max(1e-30, off(oo)) / noise,
            "S/N along it": p.mean() ** 2 / p.var(ddof=1),
            "cosine": float(np.mean(p / np.sqrt(np.diag(own)))),
            "cosine of the means": off(cross) / np.sqrt(max(1e-30, off(oo) * signal)),
            "noise, GRPO's": noise,
            "signal to the outcome, GRPO's": off(cross),
        }
    for column in ("noise, GRPO's", "signal to the outcome, GRPO's"):
        unit = found["GRPO"][column]
        for row in found.values():
            row[column] /= unit
    return found


def report(args) -> None:
    g = np.load(args.out / "gradients.npy", mmap_mode="r")
    n = args.batches
    flat = torch.from_numpy(np.array(g[:n])).transpose(0, 1).reshape(len(PARTS) * n, -1)
    K = (flat.double() @ flat.double().T).numpy().reshape(len(PARTS), n, len(PARTS), n).transpose(0, 2, 1, 3)
    everything, whole = np.arange(n), None
    whole = measures(K, everything)
    deleted = [measures(K, np.delete(everything, b)) for b in everything]
    halves = [measures(K, everything[i::2]) for i in (0, 1)]
    columns = ["own S/N", "S/N to the outcome", "S/N along it", "cosine", "cosine of the means", "noise, GRPO's", "signal to the outcome, GRPO's"]

    def jackknife(f):
        values = np.array([f(d) for d in deleted])
        return float(np.sqrt((n - 1) / n * ((values - values.mean()) ** 2).sum()))

    np.save(args.out / "K.npy", K)
    table, ratios = {}, {}
    for name in ESTIMATORS:
        table[name] = {c: [float(whole[name][c]), jackknife(lambda d: d[name][c])] for c in columns}
        ratios[name] = {}
        for c in columns[:4]:
            f = lambda d: float(d[name][c] / d["GRPO"][c])  # noqa: E731
            log = jackknife(lambda d: np.log(max(f(d), 1e-9)))
            r = f(whole)
            logs = np.array([np.log(max(f(d), 1e-9)) for d in deleted])
            ratios[name][c] = {"ratio": r, "less the jackknife's bias": float(np.exp(n * np.log(r) - (n - 1) * logs.mean())), "se": jackknife(f), "95 %": [r * np.exp(-1.96 * log), r * np.exp(1.96 * log)], "halves": [f(h) for h in halves]}
    chunks = [json.loads(f.read_text()) for f in sorted(args.out.glob("facts-*.json"))]
    means = {k: float(np.mean([c["facts"][k] for c in chunks])) for k, v in chunks[0]["facts"].items() if isinstance(v, float)}
    opens = {}
    for kind in ("useful", "idle", "answer"):
        total = np.sum([row[kind] for c in chunks for row in c["openings"] if kind in row], 0)
        per = dict(zip(PARTS, total[:-1] / total[-1]))
        opens[kind] = {name: float(sum(per[p] for p in names)) for name, names in ESTIMATORS.items()}
    sweep = {}
    for alpha in (0.1, 0.25, 0.5, 1, 2, 4):
        at = measures(K, everything, alpha)
        sweep[str(alpha)] = {e: {c: float(at[e][c] / at["GRPO"][c]) for c in columns[:4]} for e in list(ESTIMATORS)[2:]}
    gains = {k: [r for c in chunks if (r := c["facts"]["nats of an episode"].get(k)) and r[2]] for k in ("none", "x", "x found", "y found", "both")}
    gains = {k: {"mean": float(np.average([r[0] for r in v], weights=[r[2] for r in v])), "episodes": sum(r[2] for r in v)} for k, v in gains.items()}
    J = {k: float(np.mean([c["facts"]["mean J"][k] for c in chunks])) for k in ("empty", "none", "x", "both")}
    base_file = args.out / "base.json"
    summary = {
        "rollouts": n * 32, "max_tokens": args.max_tokens, "train rollouts": means,
        "held out": json.loads(base_file.read_text()) if base_file.exists() else None,
        "value and jackknife error": table, "to GRPO": ratios, "opens": opens,
        "mean J": J, "nats of an episode": gains, "to GRPO, other weights of progress": sweep,
    }
    if (informed := args.out / "informed.json").exists():
        summary["how informed μ is, held out"] = json.loads(informed.read_text())
    args.summary.write_text(json.dumps(summary, indent=1, ensure_ascii=False))
    for name in ESTIMATORS:
        print(f"{name:26s}", "  ".join(f"{c} {v:.4f} ± {s:.4f}" for c, (v, s) in table[name].items()))
    for name in ESTIMATORS:
        print(f"{name:26s}", "  ".join(f"{c} {v['ratio']:.2f} [{v['95 %'][0]:.2f}, {v['95 %'][1]:.2f}] halves {v['halves'][0]:.2f} {v['halves'][1]:.2f};" for c, v in ratios[name].items()))
    print(json.dumps({k: summary[k] for k in ("mean J", "nats of an episode", "to GRPO, other weights of progress")}, indent=1, ensure_ascii=False))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("base", "gradients", "report"))
    parser.add_argument("--model", default="runs/locks/base")
    parser.add_argument("--out", type=Path, default=Path("runs/locks/kill"))
    parser.add_argument("--summary", type=Path, default=Path("experiments/locks/summary.json"))
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--show", type=int, default=2)
    args = parser.parse_args()
    args.pose = problems
    {"base": base, "gradients": gradients, "report": report}[args.what](args)


if __name__ == "__main__":
    main()
