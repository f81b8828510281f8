"""A served model: against a small real server that fails on purpose, and against `vllm serve` where it is there; what
all engines share is in test_engines.py."""

import os
import shutil
import ssl
import subprocess
import sys
import time

import numpy as np
import pytest
import urllib3
from conftest import PATIENCE, ROOT, jsonl, keys, main_with, refusal
from servers import KEY, Handler, Served, VllmServe
from test_gpu import needs_vllm

import evaluate
import rl_mrt
from common import STOP_PHRASE
from engine import served_engine
from engine.served_engine import ServedEngine, find_served
from engine.tokens import encode


def wait_at_most(monkeypatch, seconds: float):
    monkeypatch.setattr(urllib3, "Timeout", lambda **_: urllib3.util.Timeout(seconds))


@pytest.fixture()
def serve(model, tokenizer, monkeypatch):
    """serve(**how) → a server; the client waits hundredths of seconds where it would wait seconds."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(served_engine, "RETRIES", served_engine.RETRIES.new(backoff_factor=0.01))
    wait_at_most(monkeypatch, 20)
    running = []

    def start(**how) -> Served:
        running.append(Served(model, tokenizer, **how))
        return running[-1]

    yield start
    for server in running:
        server.end()


def test_the_longest_prefix_of_a_trace_goes_first_and_its_others_follow(serve, tokenizer, prompts):
    server = serve()
    traces = [[prompt + [60] * cut for cut in (1, 3, 2)] for prompt in prompts[:2]]
    asked = [p for pair in zip(*traces) for p in pair]
    server.over(tokenizer, 1).generate(asked, 1, keys(asked), n=2)
    sent = [len(body["prompt"]) for body in server.bodies[-12:]]
    starts = [body["prompt"][: len(prompts[0])] == prompts[0] for body in server.bodies[-12:]]
    assert starts in ([True] * 6 + [False] * 6, [False] * 6 + [True] * 6)
    assert sent == [*sorted(sent[:6], reverse=True), *sorted(sent[6:], reverse=True)]


def test_what_passes_is_tried_again_and_changes_nothing(serve, sampler, tokenizer, prompts, monkeypatch):
    server = serve()
    served = server.over(tokenizer, 3)
    wait_at_most(monkeypatch, 4)
    before, server.faults = len(server.bodies), [429, 500, "drop", 503, "hang", 429, "drop", 502]
    ours, theirs = (of.generate(prompts, 30, keys(prompts), temperature=0) for of in (served, sampler))
    assert [(c.token_ids, c.text) for (c,) in ours] == [(c.token_ids, c.text) for (c,) in theirs]
    assert len(server.bodies) - before >= len(prompts) + 8  # more where a busy machine takes over four seconds itself


def test_a_server_that_fails_for_good_is_one_line_that_names_resume(serve, tokenizer, prompts, capsys):
    server = serve()
    served = server.over(tokenizer)
    for fault, told in ((500, "500"), (400, "400"), ("drop", "closed connection"), ("abort", "broke off")):
        server.faults = [fault] * 1000
        line = refusal(capsys, served.generate, prompts[:4], 5, keys(prompts[:4]))
        assert told in line and "--resume" in line and KEY not in line
    server.end()
    served.close()
    assert "refused" in refusal(capsys, served.generate, prompts[:4], 5, keys(prompts[:4]))


def test_a_wrong_key_is_one_line_without_the_key(serve, tokenizer, monkeypatch, capsys):
    server = serve()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-this-one")
    for call in (lambda: find_served(server.url, None), lambda: server.over(tokenizer)):
        line = refusal(capsys, call)
        assert line.endswith("refuses the key in OPENAI_API_KEY") and "sk-" not in line
    monkeypatch.delenv("OPENAI_API_KEY")
    assert refusal(capsys, find_served, server.url, None).endswith("wants a key: set OPENAI_API_KEY")
    for address in ("http://me:sk-secret@127.0.0.1:1/v1", "http://127.0.0.1:1/v1?key=sk-secret", "ftp://sk-secret"):
        assert "sk-secret" not in refusal(capsys, evaluate.flags, ["--engine", address])


def test_the_model_is_the_one_served_or_must_be_named(serve, tokenizer, capsys, monkeypatch):
    server, weights = serve(), str(ROOT / "tiny")
    assert find_served(server.url, None) == served_engine.Served("tiny", weights, 4096)
    assert refusal(capsys, find_served, server.url, "other") == f"error: --model other: {server.url} serves tiny"
    server.models = ["tiny", "other"]
    assert find_served(server.url, "other").name == "other"
    assert "is not given" in refusal(capsys, find_served, server.url, None)
    server.lists_nothing = True
    assert find_served(server.url, "tiny") == served_engine.Served("tiny", "tiny")
    assert "404" in refusal(capsys, find_served, server.url, None)
    gone = served_engine.Served("gone", "tiny")
    assert "does not exist" in refusal(capsys, ServedEngine, server.url, gone, tokenizer)
    choice = {"finish_reason": "length", "token_ids": [1], "prompt_token_ids": [1, 2, 3]}
    monkeypatch.setattr(Handler, "complete", lambda *_: {"choices": [choice]})
    assert "--tokenizer" in (line := refusal(capsys, server.over, tokenizer)) and "has another one" in line


def test_what_no_server_can_do_is_told_before_any_work(serve, capsys, monkeypatch, tmp_path):
    server = serve()
    flags = f"--engine {server.url} --max-tokens 5000 --limit 2 --out {tmp_path}/run".split()
    assert "context of 4096" in refusal(capsys, main_with(monkeypatch, evaluate, *flags))
    assert "in training" in refusal(capsys, main_with(monkeypatch, rl_mrt, *flags))
    assert not server.bodies and not (tmp_path / "run").exists()


def test_a_server_of_text_alone_works_with_one_warning(serve, sampler, tokenizer, prompts, capsys):
    served = serve(text_only=True).over(tokenizer)
    said = capsys.readouterr().out
    assert said.count("warning: ") == 1 and "count as computed" in said and "temperature 1" not in said
    ours, theirs = (s.generate(prompts, 60, keys(prompts), temperature=0) for s in (served, sampler))
    for (a,), (b,) in zip(ours, theirs):
        assert (a.text, a.finish_reason) == (b.text, b.finish_reason) and len(a.logprobs) == len(a.token_ids)
        assert np.mean(a.logprobs) == pytest.approx(np.mean(b.logprobs), abs=1e-2)
        assert a.finish_reason == "length" or a.token_ids[-1] == tokenizer.eos_token_id


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl to make a certificate with")
def test_a_certificate_that_nobody_vouches_for_is_refused(serve, tmp_path, capsys):
    command = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj /CN=127.0.0.1"
    command += " -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    server = serve()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    assert "CERTIFICATE_VERIFY_FAILED" in refusal(capsys, find_served, server.url.replace("http:", "https:"), None)


def test_a_run_goes_on_where_the_server_died_and_holds_no_key(serve, capsys, monkeypatch, tmp_path):
    whole, first, second = serve(), serve(), serve()

    def run(server: Served, name: str):
        flags = "--limit 3 --num-samples 2 --batch-problems 1 --max-tokens 48 --max-episodes 2 --metric all"
        return main_with(monkeypatch, evaluate, *f"--engine {server.url} {flags} --out {tmp_path}/{name}".split())

    run(whole, "whole")()
    first.dies_after = len(whole.bodies) // 2
    assert "--resume" in refusal(capsys, run(first, "half"))
    assert 0 < len(jsonl(tmp_path / "half/records.jsonl")) < 6
    run(second, "half --resume")()
    assert jsonl(tmp_path / "half/records.jsonl") == jsonl(tmp_path / "whole/records.jsonl")
    assert len(second.bodies) < len(whole.bodies)
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or KEY.encode() not in file.read_bytes()


@pytest.fixture(scope="module")
def vllm_serve(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        server = VllmServe(tmp_path_factory.mktemp("vllm"))
        yield server
        server.end()


@needs_vllm
def test_vllm_answers_two_hundred_requests_at_a_time(vllm_serve, tokenizer, prompts):
    sampler = vllm_serve.over(tokenizer)
    together = sampler.generate(prompts[:10], 60, keys(prompts[:10]), n=20)
    assert sum(map(len, together)) == 200 and len({tuple(c.token_ids) for c in together[0]}) > 1
    (alone,) = sampler.generate(prompts[4:5], 60, [(0, 4)], n=20)
    assert [c.token_ids for c in alone] == [c.token_ids for c in together[4]]


@needs_vllm
def test_vllm_serves_forced_answers_from_its_prefix_cache(vllm_serve, tokenizer, prompts):
    """One answer at each of 64 boundaries, the hardest case: of eight at one all but the first find everything."""
    line, sampler = "Wait, check x = 3: 3² ≡ 9, + 27 ≡ 36 vs 30: no.\n\n", vllm_serve.over(tokenizer)
    trace = (prompts[1] + encode(tokenizer, line) * 600)[:3840]
    stop = encode(tokenizer, STOP_PHRASE)
    asked = [trace[: len(trace) * b // 64] + stop for b in range(1, 65)]
    sampler.generate(asked, 1, keys(asked))
    share = 1 - (sampler.computed_tokens - sampler.sampled_tokens) / sum(map(len, asked))
    print(f"served from the prefix cache: {share:.4f} of {sum(map(len, asked))} prompt tokens")
    assert share >= 0.95


@needs_vllm
def test_vllm_killed_in_the_middle_and_started_again_gives_the_same_records(vllm_serve, tmp_path):
    program = f"""import runpy, sys
from engine import served_engine
served_engine.RETRIES = served_engine.RETRIES.new(backoff_factor=0.02)
runpy.run_path({str(ROOT / "evaluate.py")!r}, run_name="__main__")"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(out: str) -> subprocess.Popen:
        flags = f"--engine {vllm_serve.url} --limit 16 --num-samples 2 --batch-problems 2 --out {out}".split()
        streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return subprocess.Popen(
            [sys.executable, "-c", program, *flags], cwd=tmp_path, env=environment, text=True, **streams
        )

    done = start("whole")
    assert done.communicate(timeout=PATIENCE)[1] == "" and done.returncode == 0
    cut, file = start("cut"), tmp_path / "cut/records.jsonl"
    while cut.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") >= 4):
        time.sleep(0.01)
    vllm_serve.end()
    said = cut.communicate(timeout=PATIENCE)[1].splitlines()
    assert cut.returncode == 2 and len(said) == 1 and "--resume" in said[0], said
    assert 4 <= len(jsonl(file)) < 32
    vllm_serve.start()
    done = start("cut --resume")
    assert done.communicate(timeout=PATIENCE)[1] == "" and done.returncode == 0
    assert jsonl(file) == jsonl(tmp_path / "whole/records.jsonl") and len(jsonl(file)) == 32
