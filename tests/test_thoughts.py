"""Thoughts, episodes as token spans and the prompts of the meta-prover: of the embedded model, and of other families by
small tokenizers with the structure of real chat templates."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import transformers.utils.chat_template_utils as of_templates
from conftest import refusal, write
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import common
import engine.tokens
from common import STOP_PHRASE, forced_prompt, grade_traces, read_trace
from engine.models import load_tokenizer
from engine.thoughts import ThinkMarks, marks_of, opening_after, thinks, thought_is_open, thought_tokens
from engine.tokens import Completion, encode, end_of_thought, prompt_ids, text_and_offsets
from run.data import split_response
from tiny import problems as equations
from tiny.build import line

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% if loop.last %}<think>\n"
    "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content.split('</think>')[-1] }}{% else %}"
    "{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
R1 = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}<｜Assistant｜>"
    "{{ m.content.split('</think>')[-1] }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
OPEN_R1 = (
    "<|im_start|>system\nFirst think, as <think>\n...\n</think>\n<answer>\n...\n</answer>.<|im_end|>\n"
    + CHATML
    + CHATML_PROMPT
)
NEMOTRON = (
    "{% for m in messages %}<|start|>{{ m.role }}<|header|>\n\n"
    "{% if m.role == 'assistant' and '</think>' in m.content %}{{ m.content.split('</think>')[-1] | trim }}"
    "{% else %}{{ m.content | trim }}{% endif %}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|header|>\n\n{% endif %}"
)
MAGISTRAL = (
    "<s>[SYSTEM_PROMPT]Think first: [THINK]Your thoughts.[/THINK]Here, an answer.[/SYSTEM_PROMPT]"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
GPT_OSS = (
    "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}<|end|>{% for m in messages %}"
    "{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}<|start|>assistant<|channel|>analysis<|message|>"
    "{{ m.thinking }}<|end|>{% endif %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
SMOLLM3 = "<|im_start|>system\nToday: {{ strftime_now('%d %B %Y') }}\n/think<|im_end|>\n" + CHATML + CHATML_PROMPT
OLMO = CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}<think>"
    "{{ m.reasoning_content or '' }}</think>\n{% endif %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SEED = (
    "{% for m in messages %}<seed:bos>{{ m.role }}\n{% if m.reasoning_content %}<seed:think>{{ m.reasoning_content }}"
    "</seed:think>{% endif %}{{ m.content }}<seed:eos>{% endfor %}"
    "{% if add_generation_prompt %}<seed:bos>assistant\n{% endif %}"
)
SCRATCH = GLM.replace("<think>", "<pad of {{ m.role }}>").replace("</think>", "<end of pad>")  # marks that nobody knows


@dataclass
class Family:
    template: str
    special: str  # special tokens
    plain: str  # added tokens that are text
    marks: tuple[str, str]
    end: str  # of a turn
    opened: bool = False  # by the template

    @property
    def opening(self) -> str:
        """What the model itself opens a thought with."""
        return "" if self.opened else self.marks[0]

    def tokenizer(self):
        letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "</", "Ċ</"]  # a newline and a mark become one token
        vocabulary = {letter: number for number, letter in enumerate(letters)}
        tokenizer = Tokenizer(models.BPE(vocabulary, [("<", "/"), ("Ċ", "</")]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in self.plain.split()])
        tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in self.special.split()])
        made = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        made.chat_template = self.template
        return made


THINK, TEXT, CHAT_ENDS = ("<think>\n", "\n</think>"), "<think> </think>", "<|im_start|> <|im_end|>"
CHANNELS = "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"
SEED_MARKS, PADS = ("<seed:think>", "</seed:think>"), ("<pad of assistant>", "<end of pad>")
FAMILIES = {
    "qwen3": Family(QWEN3, CHAT_ENDS, TEXT, THINK, "<|im_end|>"),
    "r1": Family(R1, "<s> <eos> <｜User｜> <｜Assistant｜>", TEXT, THINK, "<eos>", opened=True),
    "special think": Family(R1.replace("<think>\n{", "{"), "<s> <eos> <think> </think>", "", THINK, "<eos>"),
    "openr1": Family(OPEN_R1, CHAT_ENDS, "", THINK, "<|im_end|>"),
    "nemotron": Family(NEMOTRON, "<|start|> <|header|> <|eot|>", "", THINK, "<|eot|>"),
    "magistral": Family(MAGISTRAL, "<s> </s> [INST] [/INST] [THINK] [/THINK]", "", ("[THINK]\n", "\n[/THINK]"), "</s>"),
    "gpt-oss": Family(GPT_OSS, "<|start|> <|end|> <|message|> <|channel|> <|return|>", "", CHANNELS, "<|return|>"),
    "smollm3": Family(SMOLLM3, CHAT_ENDS, TEXT, THINK, "<|im_end|>"),
    "olmo": Family(OLMO, CHAT_ENDS, "", THINK, "<|im_end|>", opened=True),
    "glm": Family(GLM, "[gMASK] <sop> <|user|> <|assistant|>", TEXT, ("<think>", "</think>"), "<|user|>"),
    "seed": Family(SEED, "<seed:bos> <seed:eos> <seed:think> </seed:think>", "", SEED_MARKS, "<seed:eos>"),
    "unknown": Family(SCRATCH, "[gMASK] <sop> <|user|> <|assistant|>", "", PADS, "<|user|>"),
}
THOUGHT = "Three digits.\n\nAdd them: \\boxed{3}?\n\nNo.\n\nWait, it is seven."
PROBLEM = {"problem": "What is 3 + 4? Do not write </think> or [/THINK].", "answer": "7", "id": "1"}


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def its_tokenizer(family):
    return family.tokenizer()


def completion_of(tokenizer, text: str, end: str = "") -> Completion:
    ids = encode(tokenizer, text + end)
    written, offsets = text_and_offsets(tokenizer, ids)
    assert written == text  # special tokens of the marks stand in it, that of the turn's end does not
    return Completion(ids, [0.0] * len(ids), "stop" if end else "length", written, offsets)


def trace_of(family: Family, tokenizer, text: str, end: str = ""):
    prompt = prompt_ids(tokenizer, PROBLEM["problem"])
    trace = read_trace(tokenizer, PROBLEM, prompt, completion_of(tokenizer, family.opening + text, end))
    grade_traces([trace])
    return trace


def test_marks_are_found_and_turns_end(family, its_tokenizer):
    marks = marks_of(its_tokenizer)
    assert marks and (marks.open, marks.close) == family.marks
    assert engine.tokens.stop_token_ids(its_tokenizer, None) == [its_tokenizer.convert_tokens_to_ids(family.end)]
    prompt = prompt_ids(its_tokenizer, PROBLEM["problem"])  # whatever marks a problem or a system message mentions
    assert thought_is_open(its_tokenizer, prompt) is (True if family.opened else None)


def test_only_what_follows_the_thought_is_graded(family, its_tokenizer):
    def read(text: str, end: str = family.end):
        return trace_of(family, its_tokenizer, text, end)

    trace = read(THOUGHT + family.marks[1] + "\n\nSo \\boxed{7}.")
    assert trace.finished and trace.answer == "\n\nSo \\boxed{7}." and trace.verdict == "right"
    assert trace.prefix(trace.boundaries[-1]).rstrip("\n").endswith("Wait, it is seven.")
    assert len(trace.boundaries) == 3
    assert read("\\boxed{7}" + family.marks[1] + " \\boxed{8}").verdict == "wrong"
    for end in ("", family.end):  # cut at the limit, or by the model itself within its thought
        cut = read("so \\boxed{7}. Let me check", end)
        assert not cut.finished and cut.answer is None and cut.verdict == "none" and cut.reward == 0
        assert cut.boundaries[-1] > 0
    again = completion_of(its_tokenizer, f"\\boxed{{7}}.{family.marks[0]}Or \\boxed{{8}}?")  # μ thinks again
    assert common.read_answers(its_tokenizer, [PROBLEM], [[again]])[0][0].verdict == "none"


def test_an_answer_without_a_thought(family, its_tokenizer):
    prompt, text = prompt_ids(its_tokenizer, PROBLEM["problem"]), "It is \\boxed{7}."
    trace = read_trace(its_tokenizer, PROBLEM, prompt, completion_of(its_tokenizer, text, family.end))
    assert trace.boundaries[-1] == (len(trace.completion.token_ids) - 1 if family.opened else 0)
    assert trace.answer == (None if family.opened else text) and trace.finished is not family.opened


def test_mus_prompt_is_the_published_text_over_the_sampled_tokens(family, its_tokenizer):
    def shown(trace, boundary: int) -> str:
        ids, sampled = forced_prompt(its_tokenizer, trace, boundary), trace.completion.token_ids[:boundary]
        assert ids[: len(trace.prompt) + boundary] == trace.prompt + sampled
        return its_tokenizer.decode(ids)

    trace = trace_of(family, its_tokenizer, THOUGHT + family.marks[1] + "\n\n\\boxed{7}", family.end)
    marks, before = marks_of(its_tokenizer), its_tokenizer.decode(trace.prompt)
    assert marks
    phrase = "\n\n" + STOP_PHRASE.replace("</think>", marks.closing)  # a paragraph of its own
    for boundary in trace.boundaries[:-1]:
        assert shown(trace, boundary) == before + (trace.prefix(boundary) or family.opening).rstrip("\n") + phrase
    for newlines in ("", "\n", "\n\n"):
        cut = trace_of(family, its_tokenizer, "Three digits" + newlines)
        assert shown(cut, cut.boundaries[-1]) == before + family.opening + "Three digits" + phrase
    # The complete thought gets only the mark that ends it.
    assert shown(trace, trace.boundaries[-1]) == before + family.opening + THOUGHT + family.marks[1]
    empty = trace_of(family, its_tokenizer, family.marks[1].lstrip("\n") + "\\boxed{7}", family.end)
    assert shown(empty, 0).startswith(before + family.opening)
    assert empty.finished and (empty.boundaries == [0] or not family.opened)


def test_a_thought_ends_and_goes_on_as_the_models_own(family, its_tokenizer):
    """What budget forcing and MRT-STaR put after a cut thought, and where an extended one stops."""
    prompt, closing = prompt_ids(its_tokenizer, PROBLEM["problem"]), family.marks[1]
    for text, ended in (("No.", closing), ("No.\n", closing.lstrip("\n")), ("", family.opening + closing)):
        assert its_tokenizer.decode(end_of_thought(its_tokenizer, prompt, text)) == ended
    assert opening_after(its_tokenizer, prompt) == family.opening
    more = completion_of(its_tokenizer, "Wait, no." + closing + "\\boxed{8}")
    assert more.text[: more.offsets[thought_tokens(its_tokenizer, more)]].rstrip("\n") == "Wait, no."
    stop = engine.tokens.stop_ids_of_thought(its_tokenizer)
    first = encode(its_tokenizer, closing.strip())[0]
    assert stop in ([], [first]) and not set(stop) & set(encode(its_tokenizer, THOUGHT + "< / > \n</b>"))


def test_given_responses_have_the_models_marks_or_others(family):
    opening, closing = family.marks
    marks, text = ThinkMarks(opening, closing), opening + THOUGHT + closing + "\\boxed{7}"
    for given in (marks, ThinkMarks(*THINK)):
        opened, thought, answer = split_response(text, given)
        if given is marks or "pad" not in opening:
            assert (opened, thought.strip(), answer) == (True, THOUGHT, "\\boxed{7}")


def test_a_closed_thought_is_not_ended_again():
    tokenizer = FAMILIES["qwen3"].tokenizer()
    prompt = prompt_ids(tokenizer, "1+1?", {"enable_thinking": False})
    assert thought_is_open(tokenizer, prompt) is False
    trace = read_trace(tokenizer, PROBLEM, prompt, completion_of(tokenizer, "\\boxed{7}"))
    assert trace.finished and trace.boundaries == [0] and forced_prompt(tokenizer, trace, 0) == prompt


def saved(tokenizer, folder) -> str:
    tokenizer.save_pretrained(folder)
    write(folder / "config.json", '{"model_type": "qwen2"}')
    return str(folder)


def test_marks_that_nothing_tells_are_named(tmp_path, capsys):
    plain = Family(CHATML + CHATML_PROMPT, CHAT_ENDS, "", ("", ""), "<|im_end|>").tokenizer()
    tokenizer = load_tokenizer(saved(plain, tmp_path / "m"))
    told = capsys.readouterr().out
    assert not thinks(tokenizer) and "--think-marks OPEN CLOSE" in told and "<|im_start|>assistant" in told
    trace = read_trace(tokenizer, PROBLEM, [1], completion_of(tokenizer, "<plan>\nso \\boxed{7}</plan>", "<|im_end|>"))
    assert trace.finished and "begins with <plan>" in capsys.readouterr().out
    named = load_tokenizer(str(tmp_path / "m"), ["<plan>", "</plan>"])
    kept = load_tokenizer(saved(named, tmp_path / "trained"))  # the trained model keeps its marks
    assert marks_of(kept) == marks_of(named) == ThinkMarks("<plan>\n", "\n</plan>", "<|im_end|>\n<|im_start|>assistant")


CHAT = [
    {"role": "system", "content": "Answer in base 2."},
    {"role": "user", "content": "What is 1+1?"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n10"},
    {"role": "user", "content": "And 2+2?"},
]


NO_SYSTEM = QWEN3.replace("for m in messages", "for m in messages if m.role != 'system'")
ENDS_ONLY = "{{ messages[0].content }}{{ messages[-1].content }}"
PARTS_ONLY = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"


def test_messages_and_arguments_reach_the_model_or_the_template_is_refused(capsys):
    tokenizer = FAMILIES["qwen3"].tokenizer()
    shown = tokenizer.decode(prompt_ids(tokenizer, CHAT))
    assert all(text in shown for text in ("Answer in base 2.", "What is 1+1?", "10", "And 2+2?"))
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if mood is defined %}{{ mood }}{% endif %}"
    assert tokenizer.decode(prompt_ids(tokenizer, "1+1?", {"mood": "!"})) == "1+1?!"
    for template, told in (
        ("{{ raise_exception('no, thanks') }}", "its chat template fails: no, thanks"),
        (NO_SYSTEM, "without the system message 'Answer in base 2.'"),
        (ENDS_ONLY, "without the user message 'What is 1+1?'"),
        (PARTS_ONLY, "without the system message 'Answer in base 2.'"),
        (None, "no place"),
    ):
        tokenizer = FAMILIES["qwen3"].tokenizer()
        tokenizer.chat_template = template
        assert told in refusal(capsys, prompt_ids, tokenizer, CHAT)


def test_a_template_that_asks_for_the_date_is_told_the_same_on_every_day(monkeypatch):
    shown, date = [], of_templates.datetime
    for year in (2031, 2032):
        day = type("D", (date,), {"now": classmethod(lambda cls, tz=None, y=year: date(y, 1, 1))})
        monkeypatch.setattr(of_templates, "datetime", day)
        tokenizer = FAMILIES["smollm3"].tokenizer()
        shown.append(tokenizer.decode(prompt_ids(tokenizer, "1+1?")))
    assert shown[0] == shown[1] and "Today: 10 March 2025" in shown[0]


def test_only_a_model_that_does_not_think_is_asked_for_a_box(tokenizer, monkeypatch):
    problem = "Find x between 1 and 10 such that x² + 6 ≡ 26 (mod 61)."
    assert tokenizer.decode(prompt_ids(tokenizer, problem)) == f"<|user|>{problem}<|assistant|><think>\n"
    monkeypatch.setattr(engine.tokens, "thinks", lambda _: False)
    assert "within \\boxed{}." in tokenizer.decode(prompt_ids(tokenizer, problem))


def test_every_sampled_trace_splits_as_its_text_does(tokenizer, sampler, problems, prompts):
    """Episodes are contiguous token spans that cover the thought; the token after them ends it."""
    (mark,), finished = encode(tokenizer, "</think>"), []
    rows = sampler.generate(prompts, 200, [(9, i) for i in range(len(prompts))], n=2)
    for problem, prompt, row in zip(problems, prompts, rows):
        for c in row:
            trace = read_trace(tokenizer, problem, prompt, c, common.Segmentation(max_episodes=50))
            thought, closed, answer = c.text.partition("</think>")
            starts = [trace.prefix(boundary) for boundary in trace.boundaries]
            episodes = [after.removeprefix(before) for before, after in pairwise(starts)]
            assert starts[-1] == "".join(episodes) == thought
            assert episodes == [thought[a:b] for a, b in common.episode_spans(thought, common.Segmentation(49))]
            assert (trace.finished, trace.answer) == (bool(closed), answer if closed else None)
            assert not closed or c.token_ids[trace.boundaries[-1]] == mark
            finished.append(trace.finished)
    assert 0 < sum(finished) < len(finished)


def test_long_thoughts_are_joined_to_at_most_so_many_episodes(tokenizer):
    paragraphs = ["Wait, maybe there is no such x at all.", *["the problem says that there is one."] * 2] * 11
    completion = completion_of(tokenizer, "\n\n".join(paragraphs))
    for most in (1, 3, 4, 11, 20):
        boundaries = read_trace(
            tokenizer, PROBLEM, [1, 2], completion, common.Segmentation(max_episodes=most)
        ).boundaries
        assert len(boundaries) - 1 <= most and boundaries[-1] == len(completion.token_ids)


def test_j_is_one_where_the_prefix_holds_the_answer_and_small_where_it_does_not(sampler, tokenizer):
    problem = next(p for p in equations.problems("test") if p["level"] == 30)
    b, x = map(int, problem["id"].split("-")[3:])
    target, misses = (x**2 + b) % equations.PRIME, [y for y in range(1, 31) if y != x][:3]
    text = "Okay, " + "".join(line(y, b, target) for y in misses) + "Wait, " + line(x, b, target)
    trace = read_trace(tokenizer, problem, prompt_ids(tokenizer, problem["problem"]), completion_of(tokenizer, text))
    for estimate in (lambda *of: common.set_sampled_J(*of, common.Forcing(16, 8), (0,)), common.set_likelihood_J):
        estimate(sampler, [trace])
        assert trace.J[0] < 0.3 and trace.J[1] < 0.3 and trace.J[2] > 0.9
        assert all(n <= 8 for n in trace.answer_tokens)
