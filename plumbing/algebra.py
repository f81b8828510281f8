"""The child process of answers.py: sympy reads LaTeX with math-verify's parser and decides if two values are equal.

A program of its own, because sympy can take for ever on a hostile answer and must be killable. It reads lines of JSON,
[value, value], and answers each with `right`, `wrong` or `timeout`. A value is LaTeX or a set: ["interval", "[)", low,
high], ["union", set, ...], ["both", set, ...], ["listed", set, ...], ["without", set, set], ["finite", value, ...] or
["reals"]. A fork answers: one that is killed when its CPU time is used up is replaced in milliseconds.
"""

import json
import logging
import os
import re
import resource
import signal
import sys
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy, normalize_latex
from math_verify import verify
from sympy import Expr, I, MatrixBase, Rational, S, Set, nan, oo, simplify, zoo
from sympy.core.relational import Equality, Relational, Unequality

MEMORY_BYTES = 4 << 30
DIGITS = 400  # precision of the numbers compared at points
NORMALIZATION = NormalizationConfig(units=False, malformed_operators=True, nits=False, boxed="none")
CONVERSION = ConversionConfig(lowercase_symbols=False, interpret_as_mixed_fractions=False)
MISREAD = [  # names that math-verify's parser takes for constants, for functions, or not at all
    (r"\\gamma(?![a-zA-Z])", r"\\mu_{gamma}"),
    (r"\\hbar(?![a-zA-Z])", r"\\mu_{hbar}"),
    (r"\\odot(?![a-zA-Z])", "o"),
    (r"E_", r"\\Xi_"),
    (r"([a-zA-Z])('+)", lambda m: rf"{m[1]}_{{prime{len(m[2])}}}"),
    (r"([0-9])\s*\\frac", r"\1\\cdot\\frac"),
    (r"\\sqrt\s*(\[\w+\])?\s*(\w)", r"\\sqrt\1{\2}"),
]


@lru_cache(maxsize=10_000)
def read(latex: str):
    """The value of LaTeX with exact decimals; None if it cannot be read."""
    if re.search(r"[0-9]\s*[_']", latex):
        return None  # the parser would drop a number's base or prime
    for pattern, new in MISREAD:
        latex = re.sub(pattern, new, latex)
    try:  # no stripping of "units", which takes variables for units
        text = normalize_latex(latex, NORMALIZATION)
        value: Any = latex2sympy(text, is_real=True, normalization_config=None, conversion_config=CONVERSION)
        exact = {decimal: Rational(str(decimal)) for decimal in value.atoms(sympy.Float)}
        exact |= {symbol: I for symbol in value.free_symbols if symbol.name == "i"}
        return value.xreplace(exact) if exact else value
    except Exception:
        return None


def build(value):
    if isinstance(value, str):
        return read(value)
    kind, *parts = value
    if kind == "reals":
        return S.Reals
    if kind == "interval":
        brackets, low, high = parts[0], build(parts[1]), build(parts[2])
        if (low > high) == True or (low == high and brackets != "[]"):  # noqa: E712, a relation of symbols is neither
            raise ValueError("no interval")
        return sympy.Interval(low, high, brackets[0] == "(", brackets[1] == ")")
    parts = [build(part) for part in parts]
    if kind == "listed":  # "x > 0, x < 5" is both; "x < 1, x > 2" can only be either
        both = sympy.Intersection(*parts)
        return sympy.Union(*parts) if both is S.EmptySet else both
    return {"finite": sympy.FiniteSet, "union": sympy.Union, "both": sympy.Intersection, "without": sympy.Complement}[
        kind
    ](*parts)


def points(*values):
    """Values for the free symbols: whole numbers where a sum, product or factorial needs them, both signs elsewhere."""
    whole = set()
    for value in values:
        for term in value.atoms(sympy.Sum, sympy.Product, sympy.factorial, sympy.binomial):
            whole |= term.free_symbols
    symbols = sorted(set().union(*(value.free_symbols for value in values)), key=str)
    for shift, sign in ((0, 1), (5, 1), (2, -1), (9, 1)) if symbols else ((0, 1),):
        yield {
            s: S(4 + shift + 3 * k) if s in whole else sign * Rational(15 + 2 * shift + 6 * k, 8)
            for k, s in enumerate(symbols)
        }


def real_roots(value):
    """The value with odd roots of negative numbers taken as negative numbers."""
    return value.replace(
        lambda e: e.is_Pow and e.base.is_negative and e.exp.is_Rational and e.exp.q > 1 and e.exp.q % 2,
        lambda e: (-1) ** e.exp.p * (-e.base) ** e.exp,
    )


def same_value(a, b) -> bool:
    """Are two values equal, to 400 digits, at points where both are numbers, or else when simplified?"""
    if a == b:
        return True
    a, b = (v.doit() if v.has(sympy.Integral, sympy.Limit) else v for v in (a, b))
    equal, beyond_reals = 0, []
    for point in points(a, b):
        numbers = [real_roots(v.xreplace(point)) for v in (a, b)]
        numbers = [v.doit() if v.has(sympy.Sum, sympy.Product) else v for v in numbers]
        if numbers[0] == numbers[1]:
            equal += 1
            continue
        if all(v.is_Rational for v in numbers):
            return False
        x, y = (v.evalf(DIGITS) for v in numbers)
        if any(v.has(nan, zoo, oo, -oo) for v in (x, y)):
            return False
        if not all(v.is_number and all(part.is_Float or part.is_Rational for part in v.as_real_imag()) for v in (x, y)):
            return simplify(a - b) == 0  # f(x), an unevaluated sum
        scale = max(abs(x), abs(y))
        if scale < Rational(1, 10**300):
            return simplify(a - b) == 0
        close = bool(abs(x - y) <= scale / 10 ** (DIGITS - 20))
        if not x.is_real and not y.is_real and not a.has(I) and not b.has(I):
            beyond_reals.append(close)  # both undefined over the reals
        elif not close:
            return False
        else:
            equal += 1
    return bool(equal) or all(beyond_reals)


def same_relation(a, b) -> bool:
    """Is one of two equations or inequalities the other, rearranged and scaled?"""
    if a.free_symbols != b.free_symbols:
        return False
    ratio = simplify((a.lhs - a.rhs) / (b.lhs - b.rhs))
    if not ratio.is_number or not ratio.is_finite or ratio.is_zero:
        return False
    if isinstance(a, Equality | Unequality) or isinstance(b, Equality | Unequality):
        return type(a) is type(b)
    return (a if ratio.is_positive else a.reversed).rel_op == b.rel_op


def same_set(a, b) -> bool:
    if a == b or sympy.SymmetricDifference(a, b) is S.EmptySet:
        return True
    return type(a) is type(b) and len(a.args) == len(b.args) and all(map(same, a.args, b.args))


def same(a, b) -> bool:
    if a is None or b is None or any(isinstance(v, Expr) and v.has(nan, zoo) for v in (a, b)):
        return False
    for kind, rule in ((Relational, same_relation), (Set, same_set), (Expr, same_value)):
        if isinstance(a, kind) and isinstance(b, kind):
            return rule(a, b)
    if isinstance(a, MatrixBase) and isinstance(b, MatrixBase):
        return a.shape == b.shape and all(map(same, a.flat(), b.flat()))
    if isinstance(a, Expr | Set | Relational) and isinstance(b, Expr | Set | Relational):
        return False  # of different kinds
    return a == b or verify(a, b, float_rounding=30, numeric_precision=30, timeout_seconds=None)


def answer_questions(cpu_seconds: float, questions, replies) -> None:
    for line in questions:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # SIGPROF ends this process, even inside C code
        try:
            verdict = "right" if same(*map(build, json.loads(line))) else "wrong"
        except Exception:
            verdict = "wrong"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(verdict, file=replies, flush=True)


def main(cpu_seconds: float) -> None:
    logging.disable(logging.CRITICAL)
    replies, sys.stdout = sys.stdout, sys.stderr
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    if not same(read(r"\frac{1}{\sqrt{2}}"), read(r"\frac{\sqrt{2}}{2}")):  # unfit antlr: every verdict would be wrong
        raise SystemExit("math-verify does not work here: pip install 'math-verify[antlr4_13_2]'")
    print("ready", file=replies, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # nobody reads its messages from here on
    while True:
        child = os.fork()
        if not child:
            answer_questions(cpu_seconds, sys.stdin, replies)
            os._exit(0)
        if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            return  # no more questions
        print("timeout", file=replies, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
