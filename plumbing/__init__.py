"""What could have been a library: nothing in this folder is about MRT, and a reader of the paper may skip it.

models.py        loading, prompts, the text of tokens, log-probs
sampler.py       token ids in, token ids and log-probs out, from one of the engines:
hf_engine.py       transformers, in batches that share prefixes; also scores
vllm_engine.py     vLLM in this process
served_engine.py   a model behind a server
data.py          problems and given responses from files and the Hub
training.py      micro-batches, several processes, checkpoints
fine_tuning.py     supervised training on weighted tokens
flags.py         flags that mean the same everywhere
runs.py          records and the folder of a run
report.py        intervals, tables, figures, the page of traces
"""
