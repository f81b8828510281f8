# Thin: a virtual environment, then the commands of the README.
PYTHON ?= python3
DEMO = runs/demo

.PHONY: demo test

.venv/ready: requirements-cpu.txt
	@echo "setting up .venv (torch, transformers and the rest: a minute or two)"
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/pip install --progress-bar off -r requirements-cpu.txt
	touch .venv/ready

demo: .venv/ready
	.venv/bin/python rl_mrt.py --bonus 0 --max-sampled-tokens 600000 --out $(DEMO)/grpo --overwrite
	.venv/bin/python rl_mrt.py --bonus 1 --variant online --progress likelihood --max-sampled-tokens 600000 --out $(DEMO)/mrt --overwrite
	.venv/bin/python evaluate.py --limit 240 --out $(DEMO)/eval/base --overwrite
	.venv/bin/python evaluate.py --limit 240 --model $(DEMO)/grpo/model --out $(DEMO)/eval/GRPO --overwrite
	.venv/bin/python evaluate.py --limit 240 --model $(DEMO)/mrt/model --out $(DEMO)/eval/MRT --overwrite
	.venv/bin/python evaluate.py --compare $(DEMO)/eval/base $(DEMO)/eval/GRPO $(DEMO)/eval/MRT --out $(DEMO)/compare
	@echo "Look at $(DEMO)/compare: summary.md (the table), anytime.png (accuracy and regret against the token budget),"
	@echo "efficiency.png (pass@k and maj@k against tokens). The runs themselves: $(DEMO)/grpo, $(DEMO)/mrt (progress.png)."

test: .venv/ready
	.venv/bin/python -m pytest -q tests
