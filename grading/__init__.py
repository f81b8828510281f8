r"""Is a boxed answer the gold answer? Plain texts in, verdicts out; nothing in this folder knows the rest of the project.

box.py      the last \boxed{...} of a response, and one spelling for what means the same in LaTeX
verdict.py  the public functions, and the process, killable and limited in CPU time and memory, that reads all texts
values.py     math-verify's reading of LaTeX, and exact evidence that two values are equal
policy.py     named vetoes and additions to that verdict: what counts as the same answer
votes.py    which answer wins a vote of k of n
"""
