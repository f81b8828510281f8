"""Thoughts of other families: small tokenizers with the structure of real chat templates."""

from dataclasses import dataclass

import pytest
from conftest import refusal
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common import STOP_PHRASE, forced_prompt, grade_traces, read_answers, read_trace
from engine.models import load_tokenizer
from engine.thoughts import ThinkMarks, marks_of, opening_after, thinks, thought_is_open, thought_tokens
from engine.tokens import (
    Completion,
    encode,
    end_of_thought,
    prompt_ids,
    stop_ids_of_thought,
    stop_token_ids,
    text_and_offsets,
)
from run.data import split_response

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


THINK, TEXT = ("<think>\n", "\n</think>"), "<think> </think>"
FAMILIES = {
    "qwen3": Family(QWEN3, "<|im_start|> <|im_end|>", TEXT, THINK, "<|im_end|>"),
    "r1": Family(R1, "<s> <eos> <｜User｜> <｜Assistant｜>", TEXT, THINK, "<eos>", opened=True),
    "special think": Family(R1.replace("<think>\n{", "{"), "<s> <eos> <think> </think>", "", THINK, "<eos>"),
    "openr1": Family(OPEN_R1, "<|im_start|> <|im_end|>", "", THINK, "<|im_end|>"),
    "nemotron": Family(NEMOTRON, "<|start|> <|header|> <|eot|>", "", THINK, "<|eot|>"),
    "magistral": Family(MAGISTRAL, "<s> </s> [INST] [/INST] [THINK] [/THINK]", "", ("[THINK]\n", "\n[/THINK]"), "</s>"),
    "gpt-oss": Family(
        GPT_OSS,
        "<|start|> <|end|> <|message|> <|channel|> <|return|>",
        "",
        ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
        "<|return|>",
    ),
    "smollm3": Family(SMOLLM3, "<|im_start|> <|im_end|>", TEXT, THINK, "<|im_end|>"),
    "olmo": Family(OLMO, "<|im_start|> <|im_end|>", "", THINK, "<|im_end|>", opened=True),
    "glm": Family(GLM, "[gMASK] <sop> <|user|> <|assistant|>", TEXT, ("<think>", "</think>"), "<|user|>"),
    "seed": Family(
        SEED, "<seed:bos> <seed:eos> <seed:think> </seed:think>", "", ("<seed:think>", "</seed:think>"), "<seed:eos>"
    ),
    "unknown": Family(
        SCRATCH, "[gMASK] <sop> <|user|> <|assistant|>", "", ("<pad of assistant>", "<end of pad>"), "<|user|>"
    ),
}
THOUGHT = "Three digits.\n\nAdd them: \\boxed{3}?\n\nNo.\n\nWait, it is seven."
PROBLEM = {"problem": "What is 3 + 4? Do not write </think> or [/THINK].", "answer": "7", "id": "1"}


@pytest.fixture(params=FAMILIES.items(), ids=lambda item: item[0])
def family(request):
    return request.param[1]


def completion_of(tokenizer, text: str, end: str = "") -> Completion:
    ids = encode(tokenizer, text + end)
    written, offsets = text_and_offsets(tokenizer, ids)
    assert written == text  # special tokens of the marks stand in it, that of the turn's end does not
    return Completion(ids, [0.0] * len(ids), "stop" if end else "length", written, offsets)


def trace_of(family: Family, tokenizer, text: str, end: str = ""):
    opening = "" if family.opened else family.marks[0]
    prompt = prompt_ids(tokenizer, PROBLEM["problem"])
    trace = read_trace(tokenizer, PROBLEM, prompt, completion_of(tokenizer, opening + text, end))
    grade_traces([trace])
    return trace


def test_marks_are_found_and_turns_end(family):
    tokenizer = family.tokenizer()
    marks = marks_of(tokenizer)
    assert marks and (marks.open, marks.close) == family.marks
    assert stop_token_ids(tokenizer, None) == [tokenizer.convert_tokens_to_ids(family.end)]
    prompt = prompt_ids(tokenizer, PROBLEM["problem"])  # whatever marks a problem or a system message mentions
    assert thought_is_open(tokenizer, prompt) is (True if family.opened else None)


def test_only_what_follows_the_thought_is_graded(family):
    tokenizer = family.tokenizer()
    trace = trace_of(family, tokenizer, THOUGHT + family.marks[1] + "\n\nSo \\boxed{7}.", family.end)
    assert trace.finished and trace.answer == "\n\nSo \\boxed{7}." and trace.verdict == "right"
    assert trace.prefix(trace.boundaries[-1]).rstrip("\n").endswith("Wait, it is seven.")
    assert len(trace.boundaries) == 3
    wrong = trace_of(family, tokenizer, "\\boxed{7}" + family.marks[1] + " \\boxed{8}", family.end)
    assert wrong.verdict == "wrong"
    cut = trace_of(family, tokenizer, "so \\boxed{7}. Let me check")
    assert not cut.finished and cut.answer is None and cut.verdict == "none"
    again = completion_of(tokenizer, f"\\boxed{{7}}.{family.marks[0]}Or \\boxed{{8}}?")  # μ thinks again
    assert read_answers(tokenizer, [PROBLEM], [[again]])[0][0].verdict == "none"


def test_an_answer_without_a_thought(family):
    tokenizer = family.tokenizer()
    prompt = prompt_ids(tokenizer, PROBLEM["problem"])
    trace = read_trace(tokenizer, PROBLEM, prompt, completion_of(tokenizer, "It is \\boxed{7}.", family.end))
    assert trace.boundaries[-1] == (len(trace.completion.token_ids) - 1 if family.opened else 0)
    assert (trace.answer is None) is family.opened


def test_mus_prompt_at_every_boundary(family):
    tokenizer = family.tokenizer()
    trace = trace_of(family, tokenizer, THOUGHT + family.marks[1] + "\n\n\\boxed{7}", family.end)
    marks, before = marks_of(tokenizer), tokenizer.decode(trace.prompt)
    assert marks
    opening = "" if family.opened else family.marks[0]
    for boundary in trace.boundaries[:-1]:
        shown = tokenizer.decode(forced_prompt(tokenizer, trace, boundary))
        thought = (trace.prefix(boundary) or opening).rstrip("\n")
        assert shown == before + thought + "\n\n" + STOP_PHRASE.replace("</think>", marks.closing)
    whole = tokenizer.decode(forced_prompt(tokenizer, trace, trace.boundaries[-1]))
    assert whole == before + opening + THOUGHT + family.marks[1]
    empty = trace_of(family, tokenizer, family.marks[1] + "\\boxed{7}", family.end)
    assert tokenizer.decode(forced_prompt(tokenizer, empty, 0)).startswith(before + opening)


def test_a_thought_ends_and_goes_on_as_the_models_own(family):
    """What budget forcing and MRT-STaR put after a cut thought, and where an extended one stops."""
    tokenizer = family.tokenizer()
    prompt = prompt_ids(tokenizer, PROBLEM["problem"])
    opening = "" if family.opened else family.marks[0]
    assert tokenizer.decode(end_of_thought(tokenizer, prompt, "No.")) == family.marks[1]
    assert tokenizer.decode(end_of_thought(tokenizer, prompt, "No.\n")) == family.marks[1].lstrip("\n")
    assert tokenizer.decode(end_of_thought(tokenizer, prompt, "")) == opening + family.marks[1]
    assert opening_after(tokenizer, prompt) == opening
    more = completion_of(tokenizer, "Wait, no." + family.marks[1] + "\\boxed{8}")
    assert more.text[: more.offsets[thought_tokens(tokenizer, more)]].rstrip("\n") == "Wait, no."
    stop = stop_ids_of_thought(tokenizer)
    first = encode(tokenizer, family.marks[1].strip())[0]
    assert stop in ([], [first]) and not set(stop) & set(encode(tokenizer, THOUGHT + "< / > \n</b>"))


def test_a_closed_thought_is_not_ended_again():
    tokenizer = FAMILIES["qwen3"].tokenizer()
    prompt = prompt_ids(tokenizer, "1+1?", {"enable_thinking": False})
    assert thought_is_open(tokenizer, prompt) is False
    trace = read_trace(tokenizer, PROBLEM, prompt, completion_of(tokenizer, "\\boxed{7}"))
    assert trace.finished and trace.boundaries == [0] and forced_prompt(tokenizer, trace, 0) == prompt


def test_given_responses_have_the_models_marks_or_others(family):
    opening, closing = family.marks
    marks = ThinkMarks(opening, closing)
    text = opening + THOUGHT + closing + "\\boxed{7}"
    for given in (marks, marks_of(FAMILIES["r1"].tokenizer())):
        opened, thought, answer = split_response(text, given)
        if given is marks or "pad" not in opening:
            assert (opened, thought.strip(), answer) == (True, THOUGHT, "\\boxed{7}")


def test_marks_that_nothing_tells_are_named(tmp_path, capsys):
    plain = Family(CHATML + CHATML_PROMPT, "<|im_start|> <|im_end|>", "", ("", ""), "<|im_end|>").tokenizer()
    plain.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "qwen2"}')
    tokenizer = load_tokenizer(str(tmp_path / "m"))
    told = capsys.readouterr().out
    assert not thinks(tokenizer) and "--think-marks OPEN CLOSE" in told and "<|im_start|>assistant" in told
    trace = read_trace(tokenizer, PROBLEM, [1], completion_of(tokenizer, "<plan>\nso \\boxed{7}</plan>", "<|im_end|>"))
    assert trace.finished and "begins with <plan>" in capsys.readouterr().out
    named = load_tokenizer(str(tmp_path / "m"), ["<plan>", "</plan>"])
    named.save_pretrained(tmp_path / "trained")
    (tmp_path / "trained" / "config.json").write_text('{"model_type": "qwen2"}')
    kept = load_tokenizer(str(tmp_path / "trained"))  # the trained model keeps its marks
    assert marks_of(kept) == marks_of(named) == ThinkMarks("<plan>\n", "\n</plan>", "<|im_end|>\n<|im_start|>assistant")


# ---------------------------------------------------------------------------------------------- the prompt

CHAT = [
    {"role": "system", "content": "Answer in base 2."},
    {"role": "user", "content": "What is 1+1?"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n10"},
    {"role": "user", "content": "And 2+2?"},
]


def test_messages_before_the_problem_reach_the_model(capsys):
    tokenizer = FAMILIES["qwen3"].tokenizer()
    shown = tokenizer.decode(prompt_ids(tokenizer, CHAT))
    assert all(text in shown for text in ("Answer in base 2.", "What is 1+1?", "10", "And 2+2?"))
    for lost, template in (
        ("'Answer in base 2.'", QWEN3.replace("for m in messages", "for m in messages if m.role != 'system'")),
        ("'What is 1+1?'", "{{ messages[0].content }}{{ messages[-1].content }}"),
        (
            "'Answer in base 2.'",
            "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}",
        ),
    ):
        tokenizer = FAMILIES["qwen3"].tokenizer()
        tokenizer.chat_template = template
        assert f"without the {'user' if '1+1' in lost else 'system'} message {lost}" in refusal(
            capsys, prompt_ids, tokenizer, CHAT
        )
    tokenizer.chat_template = None
    assert "no place" in refusal(capsys, prompt_ids, tokenizer, CHAT)


def test_a_template_that_asks_for_the_date_is_told_the_same_on_every_day(monkeypatch):
    import transformers.utils.chat_template_utils as utils

    shown = []
    for year in (2031, 2032):
        day = type("D", (utils.datetime,), {"now": classmethod(lambda cls, tz=None, y=year: utils.datetime(y, 1, 1))})
        with monkeypatch.context() as patch:
            patch.setattr(utils, "datetime", day)
            shown.append(prompt_ids(FAMILIES["smollm3"].tokenizer(), "1+1?"))
    assert shown[0] == shown[1] and "Today: 10 March 2025" in FAMILIES["smollm3"].tokenizer().decode(shown[0])
