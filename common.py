"""common.py: the paper. What MRT is made of, top to bottom in the order data flows; the five scripts share it.

    problem → prompt → completion → thought | answer → episodes → forced answers (μ) → J → progress → advantage → loss

1 traces and episodes · 2 forced answers and J(μ) · 3 progress and regret · 4 grading, pass@k, maj@k · 5 the GRPO loss

`# MRT 1` to `# MRT 8` mark where the method stands, here and in the scripts; `grep -n "# MRT" *.py` lists it. The rest
is what any reinforcement learning of a reasoner needs; engine/ samples and scores, grading/ decides what is right.
"Section", "Eq.", "Def.", "Fig.", "Table" and "Appendix" refer to arXiv 2503.07572.
"""

from __future__ import annotations

import math
import zlib
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from engine.sampler import Sampler
from engine.thoughts import final_part, marks_of, opening_after, split_thought, thinks
from engine.tokens import Completion, encode, end_of_thought
from grading.box import extract_answer
from grading.verdict import grade_all
from grading.votes import wins_vote

# The forced-termination phrase of the authors' public code: what turns the model into the meta-prover μ. Its </think>
# stands for the mark that ends a thought of the model at hand.
STOP_PHRASE = (
    "Time is up.\n\nGiven the time I've spent and the approaches I've tried, I should stop thinking and formulate a "
    "final answer based on what I already have.\n</think>\n\n**Step-by-Step Explanation and Answer:**\n\n1. **"
)
ANSWER_CUE = "Final Answer:** \\boxed{"  # ours: where the gold answer's likelihood is read off
EPISODE_MARKERS = (
    "Wait",
    "But wait",
    "Alternatively",
    "Is there another way to think about this?",
    "But let me double-check",
    "But hold on",
)

# ============================================================================================ 1 traces and episodes


@dataclass(frozen=True)
class Segmentation:
    """How a thought is cut into episodes. Published max_steps/group_size: 49/5 Omni-MATH, 45/3 AIME 2024, 99/10 in the
    regret study. `max_episodes`, ours, joins equal numbers of neighbours until at most that many are left."""

    max_steps: int = 49
    group_size: int = 1
    max_episodes: int = 1 << 30
    markers: tuple[str, ...] = EPISODE_MARKERS


def episode_spans(thought: str, rule: Segmentation | Callable = Segmentation()) -> list[tuple[int, int]]:
    """Episodes of a thought as [start, end) character spans: the authors' published rule (Section 5).

    Paragraphs end at a blank line ("\\n\\n"). One that starts with a marker (a plain, case-sensitive `startswith`:
    "Waiting" does, " Wait" does not) opens an episode if it stands more than 2 paragraphs after the last opening. After
    `max_steps` openings the rest is the last episode; then every `group_size` neighbours become one. Spans start at 0,
    end at len(thought) and leave no gap: a separator belongs to the episode before it. An empty thought is one empty
    episode. Pass the thought only: markers in an answer would count. ValueError for max_steps < 0 or group_size < 1.
    For backtracking (run/backtracking.py) `rule` is a function from text to spans.
    """
    if callable(rule):
        return rule(thought)
    if rule.max_steps < 0 or rule.group_size < 1:
        raise ValueError(f"need max_steps >= 0 and group_size >= 1, got {rule.max_steps} and {rule.group_size}")
    starts, opened, position = [0], 0, 0  # opened: the paragraph at which the current episode began
    for index, paragraph in enumerate(thought.split("\n\n")):
        if len(starts) > rule.max_steps:
            break
        if index - opened > 2 and paragraph.startswith(rule.markers):  # MRT 1: an episode z_j begins
            starts.append(position)
            opened = index
        position += len(paragraph) + len("\n\n")
    starts = starts[:: rule.group_size]
    starts = starts[:: math.ceil(len(starts) / rule.max_episodes)]
    return list(zip(starts, [*starts[1:], len(thought)]))


def split_episodes(thought: str, max_steps: int, group_size: int = 1) -> list[str]:
    """The published segmentation, text in, text out: episodes without their trailing newlines, those of a group joined
    by a blank line. ValueError as above."""
    groups = len(episode_spans(thought, Segmentation(max_steps, group_size)))
    texts = [thought[start:end].rstrip("\n") for start, end in episode_spans(thought, Segmentation(max_steps))]
    return ["\n\n".join(texts[i * group_size : (i + 1) * group_size]) for i in range(groups)]


@dataclass
class ForcedAnswer:
    """One answer of μ: what its box holds, and whether that is right, wrong, none (no box) or timeout."""

    boxed: str | None
    verdict: str
    tokens: int
    mean_logprob: float
    text: str


@dataclass
class Trace:
    """A completion read as thought and answer. Episode z_j (from 0) is `token_ids[boundaries[j] : boundaries[j + 1]]`:
    the spans are contiguous and cover the thought, nothing is tokenized twice. `boundaries[0]` is 0, the empty prefix.
    """

    problem: dict  # {problem, answer, id}: `answer` is gold; in rl_mrt.py also its place in the step and its prefix c
    prompt: list[int]
    completion: Completion
    boundaries: list[int]
    finished: bool  # the model itself ended the thought
    answer: str | None  # what is graded: the text after the thought; all of it where the model has no marks of one
    sample: int = 0  # number among the traces of its problem
    verdict: str = "none"  # right, wrong, none (no answer) or timeout
    reward: float = 0.0  # outcome: 1 if the answer is right
    J: list[float] = field(default_factory=list)  # J(μ) at the boundaries, where estimated
    answer_tokens: list[float] = field(default_factory=list)  # mean tokens of the forced answers there
    asked: list[int] = field(default_factory=list)  # tokens of μ's whole prompt there
    forced: list[list[ForcedAnswer]] = field(default_factory=list)  # those answers, where sampled
    prefix_J: float | None = None  # J(μ|c) of a prefix c of the thought at the end of `prompt`, if there is one

    @property
    def ended(self) -> bool:
        """The model ended its turn itself; else it was cut at the token limit."""
        return self.completion.finish_reason == "stop"

    def prefix(self, boundary: int) -> str:
        return self.completion.text[: self.completion.offsets[boundary]]

    def record(self) -> dict:
        """The trace as one line of a records.jsonl: the schema of every script. Scripts add fields, never change one.

        id, problem, gold and what else the data set has · sample · prompt_tokens (with the prefix, in rl_mrt's prefix
        variant) · token_ids, tokens (their number), text, mean_logprob · finish ("stop" or "length") · finished (the
        thought) · boundaries in tokens, characters: the same in `text` · answer (text after the thought), boxed (what
        its box holds), verdict, reward · J, answer_tokens, asked and forced (lists of `ForcedAnswer`) at each
        boundary · prefix_J.
        """
        completion = self.completion
        return {
            **{name: value for name, value in self.problem.items() if name not in ("answer", "place", "prefix")},
            "gold": self.problem["answer"],
            "sample": self.sample,
            "prompt_tokens": len(self.prompt),
            "tokens": len(completion.token_ids),
            "finish": completion.finish_reason,
            "finished": self.finished,
            "boundaries": self.boundaries,
            "characters": [completion.offsets[b] for b in self.boundaries],
            "answer": self.answer,
            "boxed": extract_answer(self.answer or ""),
            "verdict": self.verdict,
            "reward": self.reward,
            "J": self.J,
            "answer_tokens": self.answer_tokens,
            "asked": self.asked,
            "prefix_J": self.prefix_J,
            "forced": [[asdict(answer) for answer in answers] for answers in self.forced],
            "mean_logprob": float(np.mean(completion.logprobs)) if completion.logprobs else None,
            "text": completion.text,
            "token_ids": completion.token_ids,
        }


def read_trace(tokenizer, problem: dict, prompt: list[int], completion: Completion, rule=Segmentation()) -> Trace:
    """Splits a completion where its thought ends (`split_thought`), and the thought into episodes."""
    end, answer, finished = split_thought(tokenizer, prompt, completion)
    return Trace(problem, prompt, completion, token_boundaries(completion, end, rule), finished, answer)


def token_boundaries(completion: Completion, end: int, rule: Segmentation) -> list[int]:
    """Where the episodes of the first `end` tokens begin, and `end`; a token belongs to the episode it starts in."""
    spans = episode_spans(completion.text[: completion.offsets[end]], rule)
    return sorted({min(bisect_left(completion.offsets, start), end) for start, _ in spans} | {0, end})


def flat(groups: list[list[Trace]]) -> list[Trace]:
    """The traces of all groups, in one list."""
    return [trace for group in groups for trace in group]


def read_traces(tokenizer, problems, prompts, rows, rule=Segmentation(), first: int = 0, prefixes=None):
    """The completions of each (problem, prompt) as graded traces, numbered from `first`: [problems][samples].

    `prefixes`: the beginnings of thoughts that the prompts end with. A model without an end-of-thinking marker may
    answer there already, so its completions are graded together with them.
    """
    groups = [
        [read_trace(tokenizer, problem, prompt, completion, rule) for completion in row]
        for problem, prompt, row in zip(problems, prompts, rows)
    ]
    for group, prefix in zip(groups, prefixes or [""] * len(groups)):
        for number, trace in enumerate(group, first):
            trace.sample = number
            if not thinks(tokenizer):
                trace.answer = prefix + trace.completion.text
    grade_traces(flat(groups))
    return groups


# ============================================================================================ 2 forced answers and J(μ)


def forced_prompt(tokenizer, trace: Trace, boundary: int) -> list[int]:
    """The prompt of the meta-prover μ: the prefix of the thought up to a boundary, told that time is up (Def. 4.1).

    As in the authors' code the complete thought gets only the end-of-thinking marker. The stop phrase is appended as
    tokens to the very tokens that were sampled; a thought that the model opens itself is opened at the empty prefix.
    """
    text = trace.prefix(boundary)
    if thinks(tokenizer) and trace.finished and boundary == trace.boundaries[-1]:
        tail = end_of_thought(tokenizer, trace.prompt, text)
    else:
        opening = "" if boundary else opening_after(tokenizer, trace.prompt, trace.completion.text)
        newlines = len(opening + text) - len((opening + text).rstrip("\n"))
        gap = "\n" * max(0, 2 - newlines)  # the phrase is a paragraph of its own
        tail = encode(tokenizer, opening + gap + stop_phrase(tokenizer))
    return trace.prompt + trace.completion.token_ids[:boundary] + tail  # MRT 2: μ, the model forced to answer here


def prompt_or_answer(tokenizer, trace: Trace, j: int) -> list[int] | str:
    """The prompt of μ at boundary j. A model without an end-of-thinking marker has answered when it stops by itself:
    there the text of its answer, of which J is the reward."""
    if trace.finished and not thinks(tokenizer) and j == len(trace.boundaries) - 1:
        return trace.answer or ""
    return forced_prompt(tokenizer, trace, trace.boundaries[j])


def stop_phrase(tokenizer) -> str:
    """The stop phrase with the mark that ends the model's thoughts; without, if it has none."""
    marks = marks_of(tokenizer)
    return STOP_PHRASE.replace("</think>", marks.closing) if marks else STOP_PHRASE.replace("</think>\n", "")


@dataclass(frozen=True)
class Forcing:
    """How answers are forced from μ: n of them at a prefix, of at most `max_tokens`. `ask(tokenizer, trace, j)` gives
    μ's prompt at boundary j, or the text that the trace has already answered with; `cut` trims each sampled answer
    (backtracking keeps only its first attempt)."""

    n: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    ask: Callable = prompt_or_answer
    cut: Callable[[Completion], Completion] | None = None


def reset_J(tokenizer, traces: list[Trace], ask: Callable = prompt_or_answer) -> dict[tuple, list[tuple[Trace, int]]]:
    """Clears J and what was forced, sets J where a trace has itself answered, and returns what is still to be asked:
    {(problem id, prompt): the (trace, number of the boundary) that share it}. Equal prefixes, such as the empty one of
    a problem's traces, are answered once."""
    owners_of: dict[tuple, list[tuple[Trace, int]]] = {}
    answered: list[tuple[Trace, int, str]] = []
    for trace in traces:
        count = len(trace.boundaries)
        trace.J, trace.answer_tokens, trace.forced = [0.0] * count, [0.0] * count, [[] for _ in range(count)]
        trace.asked = [len(trace.prompt) + boundary for boundary in trace.boundaries]
        for j in range(count):
            if isinstance(asked := ask(tokenizer, trace, j), str):
                answered.append((trace, j, asked))
            else:
                trace.asked[j] = len(asked)
                owners_of.setdefault((trace.problem["id"], tuple(asked)), []).append((trace, j))
    grade_all([(extract_answer(text), trace.problem["answer"]) for trace, _, text in answered])
    for trace, j, text in answered:  # `grade_all` remembers its verdicts, so `reward` costs nothing here
        trace.J[j] = reward(trace.problem, text)
    return owners_of


def set_sampled_J(sampler: Sampler, traces: list[Trace], forcing: Forcing, seed: tuple[int, ...]) -> None:
    """Sets each trace's J(μ|z_0:j) at every boundary: the share of right answers among n sampled forced ones, with
    `answer_tokens`, `asked` and `forced`."""
    owners_of = reset_J(sampler.tokenizer, traces, forcing.ask)
    prompts = [list(prompt) for _, prompt in owners_of]
    seeds = [(*seed, zlib.crc32(np.array(prompt, dtype="<i8").tobytes())) for prompt in prompts]
    problems = [owners[0][0].problem for owners in owners_of.values()]
    rows = force_answers(sampler, problems, prompts, forcing, seeds)
    for problem, owners, answers in zip(problems, owners_of.values(), rows):
        for trace, j in owners:
            trace.J[j] = success_rate(problem, answers)  # MRT 3: J(μ|z_0:j) from sampled answers
            trace.answer_tokens[j] = float(np.mean([answer.tokens for answer in answers]))
            trace.forced[j] = answers


def force_answers(sampler: Sampler, problems: list[dict], prompts, forcing: Forcing, seeds) -> list[list[ForcedAnswer]]:
    """Sampled and graded answers to each prompt of μ, [prompts][n]; only what follows the prompt is graded."""
    rows = sampler.generate(prompts, forcing.max_tokens, seeds, forcing.n, forcing.temperature, forcing.top_p)
    rows = [list(map(forcing.cut, row)) for row in rows] if forcing.cut else rows
    return read_answers(sampler.tokenizer, problems, rows)


def set_likelihood_J(sampler: Sampler, traces: list[Trace]) -> None:
    """Sets each trace's J(μ|z_0:j) at every boundary to P(gold answer | stop phrase, "Final Answer:** \\boxed{"): one
    forward pass over a trace and its boundaries, no sampled token.

    It is "the change in the likelihood of eventual success" of the paper's abstract, and μ's success rate itself where
    μ answers in this form at once, as the embedded model does; for a model that explains first it is a proxy. The
    probabilities of several gold answers are added.
    """
    tokenizer, owners_of = sampler.tokenizer, reset_J(sampler.tokenizer, traces)
    heads, tails, asked = [], [], []
    for number, ((_, prompt), owners) in enumerate(owners_of.items()):
        trace, j = owners[0]
        complete = trace.finished and j == len(trace.boundaries) - 1  # there the stop phrase's "1. **" is missing
        gold = trace.problem["answer"]
        for answer in gold if isinstance(gold, list) else [gold]:
            heads.append([*prompt, *encode(tokenizer, ("\n\n**" if complete else "") + ANSWER_CUE)])
            tails.append(encode(tokenizer, answer + "}"))
            asked.append(number)
    # The sum over each prompt's gold answers:
    J = np.bincount(asked, np.exp(sampler.score(heads, tails)), len(owners_of)).clip(max=1)
    lengths = {number: len(head) + len(tail) for number, head, tail in zip(asked, heads, tails)}
    for number, ((_, prompt), owners) in enumerate(owners_of.items()):
        for trace, j in owners:
            trace.J[j] = float(J[number])  # MRT 3: J(μ|z_0:j) from the gold answer's likelihood
            trace.answer_tokens[j] = float(lengths[number] - len(prompt))


def cut_at_budget(trace: Trace, budget: int) -> int:
    """The last paragraph end of the thought within `budget` tokens; the budget itself where there is none."""
    end = min(budget, trace.boundaries[-1])
    return last_paragraph_end(trace.completion.text, trace.completion.offsets, 0, end) or end


def last_paragraph_end(text: str, offsets: list[int], first: int, last: int) -> int | None:
    """The last token place after `first`, up to `last`, at which a paragraph of the text ends."""
    return next((place for place in range(last, first, -1) if text[: offsets[place]].endswith("\n\n")), None)


# ============================================================================================ 3 progress and regret


def episode_progress(J: Sequence[float]) -> np.ndarray:
    """Progress of each of k episodes, from J at the k + 1 boundaries of a thought: [k] (Def. 6.1)."""
    return np.diff(J)  # MRT 4: r_prg(z_j; c) = J(μ | z_j, c) - J(μ | c)


def in_nats(J: Sequence[float]) -> np.ndarray:
    """Ours: ln J, [k + 1], at least ln 1e-3; progress is then what an episode tells about the answer, in nats.

    In J itself ruling out three of 30 candidates is worth .004 and a lucky find .96; here each counts as it informs.
    Not for a J from a few sampled answers, which is often 0.
    """
    return np.log(np.maximum(J, 1e-3))


def normalized_regret(tokens: Sequence[float], accuracies: Sequence[float], budget: float) -> float:
    """Normalised regret of one trace at a budget of C0 tokens (Figure 9): 1 - area / C0, in [0, 1].

    tokens: at each prefix j, its tokens + the mean tokens of its forced answers. accuracies: J there. The curve starts
    at (0, 0), is linear in between, and is cut at C0 or held at its last value up to C0. For budgets beyond training
    append the budget-forced points. Average over traces, then problems.

    Points are sorted by position (stably) first: a longer prefix with shorter answers can come before its
    predecessor. The published notebook keeps the running order, so there a step back counts as negative area; where
    positions never decrease the two agree. ValueError for no points, unequal lengths, accuracies outside [0, 1], and
    tokens or a budget that are negative or not finite.
    """
    x, y = np.asarray(tokens, dtype=float), np.asarray(accuracies, dtype=float)
    if x.ndim != 1 or x.shape != y.shape or x.size == 0 or not 0 < budget < math.inf:
        raise ValueError(f"need as many tokens as accuracies and budget > 0: {x.shape}, {y.shape}, {budget}")
    if not np.all((x >= 0) & (x < np.inf) & (y > -1e-6) & (y < 1 + 1e-6)):  # NaN fails too
        raise ValueError("tokens must be finite and >= 0, accuracies in [0, 1]")
    order = np.argsort(x, kind="stable")
    x, y = np.append(0.0, x[order]), np.append(0.0, y[order])
    inside = int(np.searchsorted(x, budget))  # points before the budget, at least (0, 0)
    last = np.interp(budget, x[inside - 1 : inside + 1], y[inside - 1 : inside + 1])
    return float(1 - np.trapezoid(np.append(y[:inside], last), np.append(x[:inside], budget)) / budget)


def additional_regret(maj: Sequence[tuple[float, float, float, float]]) -> float:
    """Regret against voting early, for one trace (Appendix E), in [0, 1].

    maj: [prefixes, 4] with maj@1, 2, 4, 8. From prefix i one can vote: maj@1, maj@2, maj@4, mean(maj@4, maj@8) at costs
    1, 2, 4, 6; or think: a line from maj@1 at cost 1 to the next prefix's maj@1 at cost 6. The optimum is the larger
    at each cost. Returns Σ_i (area optimum - area thinking) / Σ_i area optimum over the prefixes that have a next one.
    NaN where nothing is left to divide by (one prefix, or never right); the published average over traces skips those.
    ValueError for another shape or values outside [0, 1].
    """
    m = np.asarray(maj, dtype=float)
    if m.ndim != 2 or m.shape[1] != 4 or not np.all((m >= 0) & (m <= 1)):
        raise ValueError(f"need [prefixes, 4] values in [0, 1], got shape {m.shape}")
    cost = np.array([1.0, 2.0, 4.0, 6.0])
    now, later = m[:-1], m[1:, :1]
    vote = np.column_stack([now[:, :3], now[:, 2:].mean(axis=1)])
    think = now[:, :1] + (cost - 1) / 5 * (later - now[:, :1])
    best = np.trapezoid(np.maximum(vote, think), cost, axis=1).sum()
    return float(1 - np.trapezoid(think, cost, axis=1).sum() / best) if best > 0 else math.nan


# ============================================================================================ 4 grading, pass@k, maj@k


def grade(response: str, gold: str | list[str]) -> bool:
    """Is the last box of `response` (what follows the thought) equal to the gold answer? False for no box and for
    hopeless or endless answers; ValueError for a gold that nothing can be compared with. The policy: docs/answers.md.
    """
    return grade_all([(extract_answer(response), gold)]) == ["right"]


def reward(problem: dict, text: str) -> float:
    """The reward of an answer's text, as a trace's outcome and in J from sampled answers: 1 if it is right, else 0.
    CONTRIBUTING.md says how to put another here."""
    return float(grade(text, problem["answer"]))


def grade_traces(traces: list[Trace]) -> None:
    """Sets `verdict` and `reward` of every trace."""
    verdicts = grade_all([(extract_answer(trace.answer or ""), trace.problem["answer"]) for trace in traces])
    for trace, verdict in zip(traces, verdicts):  # `grade_all` remembers them, so `reward` costs nothing here
        trace.verdict, trace.reward = verdict, reward(trace.problem, trace.answer or "")


def read_answers(tokenizer, problems: list[dict], rows: list[list[Completion]]) -> list[list[ForcedAnswer]]:
    """Each problem's forced answers, graded."""
    texts = [[final_part(tokenizer, completion.text) for completion in row] for row in rows]
    boxes = [[extract_answer(text) for text in row] for row in texts]
    verdicts = iter(grade_all([(box, p["answer"]) for p, row in zip(problems, boxes) for box in row]))

    def answer(box: str | None, text: str, c: Completion) -> ForcedAnswer:
        return ForcedAnswer(box, next(verdicts), len(c.token_ids), float(np.mean(c.logprobs)), text)

    return [list(map(answer, *row)) for row in zip(boxes, texts, rows)]


def success_rate(problem: dict, answers: list[ForcedAnswer]) -> float:
    """J of forced answers to a problem: their mean reward."""
    return sum(reward(problem, answer.text) for answer in answers) / len(answers)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, c of them correct, drawn without replacement, hold a correct one:
    1 - C(n-c, k) / C(n, k), unbiased (Chen et al. 2021, arXiv 2107.03374).

    ValueError unless 0 <= c <= n and 1 <= k <= n. The published estimators return 1 for k > n, which makes a run with
    missing samples look perfect.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"need 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def maj_at_k(answers: Sequence[Hashable], gold: Hashable, k: int, weights: Sequence[float] | None = None) -> float:
    """Probability that `gold` wins the vote of k of the n answers, drawn without replacement.

    answers: n canonical strings, None where there is none. weights: n positive vote weights (the paper: 2 ** mean
    token log-prob); None or all equal is plain voting. As in the published code (Section 5, Appendix D) a tie for first
    place that gold shares counts 1/2, however many share it; None never competes; without a vote for gold the score is
    0. At k = 1 this is the mean accuracy. Plain votes are counted exactly, unequal ones as in `weighted_vote`.
    ValueError for k outside 1..n, gold None, or weights that are not n positive finite numbers.
    """
    n = len(answers)
    if gold is None or not 1 <= k <= n:
        raise ValueError(f"need a gold and 1 <= k <= n; got {gold!r}, k={k}, n={n}")
    if weights is not None and (len(weights) != n or not all(0 < w < math.inf for w in weights)):
        raise ValueError(f"weights must be {n} positive finite numbers, got {weights!r}")
    return wins_vote(gold, answers, k, weights)


# ============================================================================================ 5 the GRPO loss


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """A = (r - mean) / (std + 1e-4) within each group; [groups, rollouts] → the same shape.

    The std is the population's (a group of 1 gives 0, not NaN); the authors' is unbiased, √(G / (G - 1)) times it. A
    group whose rewards are equal up to rounding gets exactly 0: dividing rounding errors by a small std would make a
    signal of them. With the std, a rare success among 16 counts 3.87, without it 0.94: normalising gives more weight to
    hard and to easy problems.
    """
    centred = rewards - rewards.mean(-1, keepdim=True)
    std = rewards.std(-1, keepdim=True, unbiased=False)
    return torch.where(std > 1e-6, centred / (std + 1e-4), torch.zeros_like(centred))


def grpo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    denominator: float,
    clip: float = 0.2,
    ref_logprobs: torch.Tensor | None = None,
    kl: float = 0.0,
    weights: torch.Tensor | float = 1.0,
) -> tuple[torch.Tensor, dict[str, float]]:
    """1/denominator · Σ_tokens w [kl · k3 - min(ρ A, clip(ρ, 1-ε, 1+ε) A)], ρ = exp(logprob - old logprob).

    All tensors have one shape and hold only trained tokens: no prompt, no padding. The denominator is given, fixed
    before the loop over micro-batches, so any split gives the same gradient: with w = 1 the trained tokens of the
    *whole* batch, a mean over tokens; with w = 1 / (tokens of its sequence) the sequences, a mean of their means. MRT
    does not change this function, only `advantages`.

    k3 = e^d - d - 1, d = ref - logprob, is never below 0 and estimates KL(π‖ref) on samples of π; its gradient is
    that of KL(ref‖π). d is clamped to ±10 before exp. Returns (loss, sums over tokens: clipped, kl).
    """
    ratio = (logprobs - old_logprobs).clamp(-10, 10).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)
    sums = {"clipped": float((clipped * advantages < ratio * advantages).sum())}
    if ref_logprobs is not None:
        d = (ref_logprobs - logprobs).clamp(-10, 10)
        k3 = d.exp() - d - 1
        per_token = per_token + kl * k3
        sums["kl"] = float(k3.detach().sum())
    return (weights * per_token).sum() / denominator, sums


def stop_loss(
    stop_logprobs: torch.Tensor, gains: torch.Tensor, denominator: float, weights: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """- 1/denominator · Σ_j w π_j (J_j - f), π_j = π(</think> | z_0:j): credit for the decision to stop at a boundary.

    Ours, not the paper's. Figure 6 compares rollouts that stop at a prefix with others that go on; where J is known at
    the boundaries of a trace, the trace itself is that comparison, and no rollout is needed:
    1. At a boundary the return is V_j = π_j J_j + (1 - π_j) G_j: stopping is worth J_j, going on some G_j.
    2. With both actions in it nothing has to be sampled: the gradient of this decision is ∇π_j (J_j - G_j).
    3. A trace that went on has the outcome f, on average G_j. One that stopped has J_j on average, and adds nothing.
    4. So the mean over traces is Σ_j (1 - π_j) ∇π_j (J_j - G_j): a boundary counts as often as thoughts go on there.

    stop_logprobs, gains [N]: ln π_j at every trained token, and J_j - f after a boundary, 0 elsewhere. Denominator and
    weights are those of `grpo_loss`; a boundary is one of many tokens, so β has to be large beside α.
    """
    return -(weights * stop_logprobs.exp() * gains).sum() / denominator  # MRT 8: ours, maximises Σ_j π_j (J_j - f)
