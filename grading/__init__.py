r"""Is a boxed answer the gold answer? Plain texts in, verdicts out; nothing in this folder knows the rest of the project.

box.py      the last \boxed{...} of a response, and one spelling for what means the same in LaTeX
verdict.py  the public functions; all texts are read by a child process:
worker.py     the child, limited in CPU time and memory, can be killed at any time
values.py     math-verify's reading of LaTeX, and exact evidence that two values are equal
policy.py     named vetoes and additions to that verdict: what counts as the same answer
votes.py    which answer wins a vote of k of n
"""
