"""The check for the first run on a GPU, at toy size; its stages with vLLM run under `make test-vllm`."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import PATIENCE, ROOT
from transformers import Qwen2Config

from engine.vllm_engine import vllm_or_why_not
from experiments import gpu_check
from run import training


def states(page: str) -> list[str]:
    return re.findall(r"^## \d\. .*: (\w+), \d+ s$", page, re.M)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there, `make gpu-check` is the test")
def test_every_stage_works_at_toy_size_or_says_that_vllm_is_missing(tmp_path):
    command = [sys.executable, "-m", "experiments.gpu_check", "--toy", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=6 * PATIENCE)
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert done.returncode == 0, page + done.stderr
    with_vllm = "ok" if vllm_or_why_not()[0] else "skipped"
    assert states(page) == ["ok", with_vllm, with_vllm, with_vllm, "ok", "ok"]
    assert page.count("- skipped: vllm is not installed") == page.count(": skipped, ")
    assert page.count("two, step ") == 2


def test_a_stage_that_fails_is_told_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    devices, title, _, about_vllm = gpu_check.STAGES["devices"]
    stages = {"devices": (devices, title, 0.01, about_vllm), "update": gpu_check.STAGES["update"]}
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--toy", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as exit:
        gpu_check.main()
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert exit.value.code == 1 and states(page) == ["FAILED", "ok"] and page.startswith("# GPU check: 1 ok, 1 FAILED")
    assert f"It took longer than 0.01 s and was ended. Please send this page and `{tmp_path / 'devices.log'}`" in page


def test_a_crash_leaves_the_last_lines_and_what_was_found(tmp_path):
    found = tmp_path / "stage.md"
    code = f"import os; open({str(found)!r}, 'w').write('half'); print(*range(99), sep='\\n', flush=True); os.abort()"
    state, text = gpu_check.run_stage([sys.executable, "-c", code], found, PATIENCE)
    assert state == "FAILED" and text.startswith("- half\n\nIt ended with code -6.")
    assert "    69\n" in text and "    98\n" in text and "    68\n" not in text


@pytest.mark.parametrize("world, sentence", [(1, "an update takes {:.0f} GiB"), (8, "{:.0f} GiB a GPU")])
def test_the_memory_in_the_readme_is_the_estimate(world, sentence):
    config = Qwen2Config(**gpu_check.TABLE_3)
    _, parts = training.update_memory(config, 32_768, torch.bfloat16, reference=True, world=world)
    total = sum(parts.values()) / 2**30
    for page in ("README.md", "configs/rl_r1_distill_1.5b.yaml"):
        assert sentence.format(total) in " ".join((ROOT / page).read_text(encoding="utf-8").replace("#", "").split())
