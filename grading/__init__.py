r"""Is a boxed answer the gold answer? Plain texts in, verdicts out; nothing here knows the rest of the project.

box.py         the last \boxed{...} of a response, and one spelling for what means the same in LaTeX
verdict.py     the public functions; they ask a child process, limited in CPU time and memory
values.py        math-verify's reading of LaTeX, and exact evidence that two values are equal
policy.py      vetoes and additions to that verdict: what counts as the same answer
units.py         rules for number words and units
families.py      rules for progressions, parameters and antiderivatives
forms.py         what the rules see of a text: brackets, items, sides, numbers, remarks
votes.py       which answer wins a vote of k of n
"""
