r"""What LaTeX is worth: math-verify's parser reads it, exact evidence decides if two values are equal.

Only the worker imports this. Rationals are compared exactly; other numbers to more digits than the numbers in them
have, so that 2^{2024}+\pi is not 2^{2024}+1+\pi; expressions so at random points of their natural domain. Where neither
can be had, only simplification to zero accepts.
"""

import random
import re
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy, normalize_latex
from sympy import Expr, I, MatrixBase, Rational, factorial, factorial2, nan, oo, real_root, simplify, zoo
from sympy.core.relational import Equality, Relational, Unequality

from grading.forms import number

MAX_DIGITS = 20_000  # numbers that need more are not accepted
POINTS, CONCLUSIVE = 40, 10  # points tried, points that must agree; a zero on both sides says nothing
NORMALIZATION = NormalizationConfig(units=False, malformed_operators=True, nits=False, boxed="none")
CONVERSION = ConversionConfig(lowercase_symbols=False)
MISREAD = [  # what the parser takes for something else
    (re.compile(pattern), new)
    for pattern, new in [
        (r"([a-zA-Z])('{1,3})", lambda m: rf"{m[1]}_{{prime{len(m[2])}}}"),
        (r"([0-9]) ?(?=\\(?:binom|log|ln|sum|gcd|lcm|max|min|prod|int|begin|l?floor|lceil)|\()", r"\1\\cdot "),
        (r"(\\(?:sin|cos|tan|cot|sec|csc|ln|log)(?: ?[\^_] ?(?:\{[^{}]{1,9}\}|\w)){0,2}) ?"  # \sin x\cdot 2
         r"(\w{1,9}|\w?\\[a-z]{1,9}|(?:\\frac ?\{[^{}]{1,40}\} ?)?\{[^{}]{1,80}\}) ?(?=\\(?:cdot|times))", r"\1(\2)"),
        (r"\\bmod(?![a-z])", r"\\mod"),
        (r"([0-9a-zA-Z]{1,20}!)(?=\^)", r"(\1)"),
        (r"\\[a-zA-Z]+|(?<!_)(?<!_\{)d",  # ad-bc has no differential
         lambda m: m[0] if m[0] != "d" or re.search(r"int|\{ ?d ?\}", m.string) else r"\mu_{d}"),
    ]
]  # fmt: skip
_NOT_MATH = re.compile(
    r"[0-9)}\]] ?'|[0-9] ?_|[^\W\d_]{4}|[a-z]{2} [a-z]{2}|(?<![a-z\\])(?:if|or|and|for)(?![a-z])|\\text"
)
DISCRETE = sympy.Sum, sympy.Product, factorial, factorial2, sympy.binomial
STEPWISE = sympy.floor, sympy.ceiling, sympy.Mod


@lru_cache(maxsize=20_000)
def value(latex: str) -> Any:
    """The value of LaTeX with exact decimals; None if it cannot be read."""
    if (exact_number := number(latex)) is not None:
        return Rational(exact_number.numerator, exact_number.denominator)
    latex = re.sub(r"\\text ?\{ ?([a-zA-Z]) ?\}", r"\1", latex)
    if _NOT_MATH.search(re.sub(r"\\(?!text)[a-zA-Z]+|_\{\w+\}|\{[pv]matrix\}", "·", latex)):
        return None  # a number's base or prime would be dropped, words would be products of letters
    for pattern, new in MISREAD:
        latex = pattern.sub(new, latex)
    try:
        text = normalize_latex(latex, NORMALIZATION)
        read: Any = latex2sympy(text, is_real=True, normalization_config=None, conversion_config=CONVERSION)
        exact: Any = {decimal: Rational(str(decimal)) for decimal in read.atoms(sympy.Float)}
        read = read.xreplace(exact | {symbol: I for symbol in read.free_symbols if symbol.name == "i"})
        if any(derivative.doit() == 0 for derivative in read.atoms(sympy.Derivative)):
            return None  # of a function without a formula
        twice = [e for e in read.atoms(factorial) if "!!" in latex and e.args[0].func is factorial]
        return read.xreplace({e: factorial2(e.args[0].args[0]) for e in twice})
    except Exception:  # whatever the parser raises
        return None


def same_number(x: Any, y: Any) -> bool | None:
    """Are two numbers equal? None where that cannot be had: one is undefined, infinite or needs too many digits."""
    if x == y or (x.is_Rational and y.is_Rational):
        return x == y
    floats = [part for number in (x, y) for part in number.evalf(15).as_real_imag()]
    if not all(part.is_Float or part.is_Rational for part in floats) or any(part in (nan, oo, -oo) for part in floats):
        return None
    if not all(abs(a - b) <= 1e-9 * max(map(abs, floats)) for a, b in zip(floats[:2], floats[2:])):
        return False
    powers = [abs(power).evalf(3) for power in (x - y).atoms(sympy.Pow, sympy.exp) if power.is_number]
    sizes = [abs(power._mpf_[2] + power._mpf_[3]) for power in powers if power.is_Float]
    digits = 100 + sum(n.p.bit_length() + n.q.bit_length() for n in (x - y).atoms(Rational)) + sum(sizes)
    if digits > MAX_DIGITS:
        return None
    difference = (x - y).evalf(2, maxn=digits)  # sympy goes on until two digits are certain, or gives up: precision 1
    tiny, parts = sympy.Float(10) ** -digits, difference.atoms(sympy.Float)
    return all(part._prec == 1 or abs(part) < tiny for part in parts) and not difference.has(nan, oo, zoo)


def _points(a: Any, b: Any):
    """Random values for the free symbols: natural numbers in factorials and sums, and where n is in a floor or (-1)^n,
    else fractions; of both signs, now and then large. Equal questions get equal points."""
    terms = [term for v in (a, b) for term in v.atoms(*DISCRETE, *STEPWISE)]
    terms += [power.exp for v in (a, b) for power in v.atoms(sympy.Pow) if power.base.is_negative]
    found = [(symbol, isinstance(term, DISCRETE)) for term in terms for symbol in term.free_symbols]
    natural = {symbol for symbol, always in found if always or str(symbol)[0] in "ijklmnpqrN"}
    rng, symbols = random.Random(f"{a}|{b}"), sorted(a.free_symbols | b.free_symbols, key=str)
    for n in range(POINTS):
        most, point = 10**6 if n % 8 == 7 else 99, {}
        for place, symbol in enumerate(symbols):
            sign = -1 if (n >> place & 1 if n < 8 else rng.random() < 0.3) else 1
            fraction = Rational(sign * rng.randint(1, most), rng.randint(1, 30))
            point[symbol] = sympy.Integer(rng.randint(0, 14)) if symbol in natural else fraction
        yield point


def same_value(a: Any, b: Any) -> bool:
    """Are two expressions equal: as numbers, at random points where both are real and not both zero, or simplified?"""
    a, b = (v.doit() if v.has(sympy.Integral, sympy.Limit, sympy.Derivative) else v for v in (a, b))
    if not (a.free_symbols or b.free_symbols):
        return bool(same_number(*(real_root(v.doit()) for v in (a, b))))
    real = equal = 0
    comparable = a.free_symbols == b.free_symbols and not a.atoms(sympy.core.function.AppliedUndef)
    for point in _points(a, b) if comparable else ():
        x, y = (real_root(v.xreplace(point).doit()) for v in (a, b))
        if x == y == 0 or any(v.has(nan, zoo, oo, -oo) for v in (x, y)) or (same := same_number(x, y)) is None:
            continue
        defined = a.has(I) or b.has(I) or x.is_real or y.is_real
        if not same and defined:
            return False
        real, equal = real + bool(same and defined), equal + same
        if real == CONCLUSIVE:
            return True
    return equal >= CONCLUSIVE or simplify(a - b) == 0


def solved(relation: Any) -> bool:
    """Does an unknown stand alone on one side of each equation or inequality in it, but for its sign, a number added
    and bars? -x>-1 and |x|<2 say what x is, 5x-7=3 is the question."""
    (x,) = relation.free_symbols

    def alone(side: Any, other: Any) -> bool:
        return not other.has(x) and (abs(side.diff(x)) == 1 or side == abs(x))

    return all(alone(r.lhs, r.rhs) or alone(r.rhs, r.lhs) for r in relation.atoms(Relational))


def same_relation(a: Any, b: Any) -> bool:
    """Is one of two equations or inequalities the other, rearranged and scaled?"""
    if a.free_symbols != b.free_symbols or any(isinstance(side, sympy.Set) for side in (*a.args, *b.args)):
        return False
    if len(a.free_symbols) == 1 and solved(a) != solved(b):
        return False  # 5x-7=3 is the question to which x=2 is the answer
    ratio = simplify((a.lhs - a.rhs) / (b.lhs - b.rhs))
    if not ratio.is_number or not ratio.is_finite or ratio.is_zero:
        return False
    both_ways = isinstance(a, Equality | Unequality)
    return type(a) is type(b) if both_ways else (a if ratio.is_positive else a.reversed).rel_op == b.rel_op


def same(a: Any, b: Any) -> bool:
    """Are two values equal? Things of two kinds are not; what cannot be read equals nothing."""
    if a is None or b is None or any(isinstance(v, Expr) and v.has(nan, zoo) for v in (a, b)):
        return False
    if any(isinstance(v, MatrixBase | sympy.MatrixExpr) for v in (a, b)):
        a, b = (sympy.Matrix(v.doit()) if isinstance(v, MatrixBase | sympy.MatrixExpr) else None for v in (a, b))
        return bool(a and b) and a.shape == b.shape and all(map(same, a.flat(), b.flat()))
    for kind, rule in ((Relational, same_relation), (Expr, same_value)) if a != b else ():
        if isinstance(a, kind) and isinstance(b, kind):
            return bool(rule(a, b))
    if isinstance(a, sympy.Set) and isinstance(b, sympy.Set) and sympy.SymmetricDifference(a, b) is sympy.S.EmptySet:
        return True
    return a == b or (type(a) is type(b) and len(a.args) == len(b.args) > 0 and all(map(same, a.args, b.args)))
