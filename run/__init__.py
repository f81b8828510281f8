"""What a run of any script has; a reader of the paper may skip it.

flags.py         flags that mean the same everywhere, their defaults, --config
data.py          problems and given responses from files and the Hub
folder.py        the folder of a run: its owner, its settings, its records
files.py         files that are whole or not there; what is refused, in one line
backtracking.py  the second parameterization: episodes, J, the window of a linearised search
traces.py        prompts, samples, seeds; traces as records and what is read off them
training.py      steps, micro-batches, checkpoints, fine-tuning
report.py        intervals, tables, figures, the page of traces
"""
