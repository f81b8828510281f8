"""What LaTeX is worth: math-verify's parser reads it, exact evidence decides if two values are equal.

Only the worker imports this. Exact numbers are compared exactly. Others are compared to more digits than all numbers in
them have, so that 2^{2024} + \\pi is not 2^{2024} + 1 + \\pi; expressions are compared so at random points of their natural
domain, and where neither can be had, only simplification to zero accepts.
"""  # noqa: E501

import random
import re
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy, normalize_latex
from math_verify import verify
from mpmath import mp
from sympy import Expr, I, MatrixBase, Rational, S, Set, nan, oo, simplify, zoo
from sympy.core.function import AppliedUndef
from sympy.core.relational import Equality, Relational, Unequality

MAX_DIGITS = 20_000  # numbers that need more are not accepted
POINTS, CONCLUSIVE = 40, 10  # points tried, points that must agree; a zero on both sides says nothing
NORMALIZATION = NormalizationConfig(units=False, malformed_operators=True, nits=False, boxed="none")
CONVERSION = ConversionConfig(lowercase_symbols=False, interpret_as_mixed_fractions=False)
_WITH_D = re.compile(r"int|Xi|\{ ?d ?\}")
MISREAD = [  # what math-verify's parser takes for something else, or cannot read
    (re.compile(pattern), new)
    for pattern, new in [
        (r"\\gamma(?![a-zA-Z])", r"\\mu_{gamma}"),
        (r"\\hbar(?![a-zA-Z])", r"\\mu_{hbar}"),
        (r"\\odot(?![a-zA-Z])", "o"),
        (r"E_", r"\\Xi_"),
        (r"([a-zA-Z])('{1,3})", lambda m: rf"{m[1]}_{{prime{len(m[2])}}}"),
        (r"(?<![\^_0-9.])([0-9]{1,20}) ?(\\frac ?\{[0-9]{1,20}\} ?\{[0-9]{1,20}\})", r"(\1+\2)"),  # mixed
        (r"([0-9]) ?(?=\\(?:frac|binom|log|ln|sum|gcd|lcm|max|min|prod|int|begin|l?floor|lceil)|\()", r"\1\\cdot "),
        (r"\\bmod(?![a-z])", r"\\mod"),
        (r"([0-9a-zA-Z]{1,20}!)(?=\^)", r"(\1)"),
        (r"\\[a-zA-Z]+|(?<!_)(?<!_\{)d", lambda m: m[0] if m[0] != "d" or _WITH_D.search(m.string) else r"\mu_{d}"),
    ]
]


@lru_cache(maxsize=20_000)
def value(latex: str) -> Any:
    """The value of LaTeX with exact decimals; None if it cannot be read."""
    latex = re.sub(r"\\text ?\{ ?([a-zA-Z]) ?\}", r"\1", latex)
    without = re.sub(r"\\(?!text)[a-zA-Z]+|_\{\w+\}|\{[bpv]?matrix\}", "·", latex)
    if re.search(r"[0-9] ?[_']|[^\W\d_]{4}|\\text", without):
        return None  # a number's base or prime would be dropped, words would be products of letters
    for pattern, new in MISREAD:
        latex = pattern.sub(new, latex)
    try:
        text = normalize_latex(latex, NORMALIZATION)
        read: Any = latex2sympy(text, is_real=True, normalization_config=None, conversion_config=CONVERSION)
        exact = {decimal: Rational(str(decimal)) for decimal in read.atoms(sympy.Float)}
        exact |= {symbol: I for symbol in read.free_symbols if symbol.name == "i"}
        read = read.xreplace(exact) if exact else read
        if "!!" in latex:
            read = read.replace(lambda e: e.func is sympy.factorial and e.args[0].func is sympy.factorial,
                                lambda e: sympy.factorial2(e.args[0].args[0]))  # fmt: skip
        return read
    except Exception:
        return None


# ================================================================================================== expressions


def _complex(number: Any, digits: int) -> Any:
    """A number to so many digits; None of what is none: undefined, infinite, or with a part that cannot be had."""
    parts = number.evalf(digits).as_real_imag()
    if not all(part.is_Float or part.is_Rational for part in parts) or any(part in (nan, oo, -oo) for part in parts):
        return None
    with mp.workdps(digits):
        return mp.mpc(*(part._to_mpmath(mp.prec) for part in parts))


def _digits(*numbers: Any) -> int:
    """More digits than tell any two numbers apart that are built from the numbers within these."""
    bits = 200.0
    for node in {node for number in numbers for node in sympy.preorder_traversal(number)}:
        if isinstance(node, Rational):
            bits += 2 * (node.p.bit_length() + node.q.bit_length())
        elif isinstance(node, Expr) and node.args and (value := _complex(node, 5)):
            bits += 2 * abs(mp.mag(value))
    return int(bits * 0.302)


def _real_roots(number: Any) -> Any:
    """The number with odd roots of negative numbers taken as negative numbers."""
    return number.replace(
        lambda e: e.is_Pow and e.base.is_negative and e.exp.is_Rational and e.exp.q > 1 and e.exp.q % 2,
        lambda e: (-1) ** e.exp.p * (-e.base) ** e.exp,
    )


def same_number(x: Any, y: Any) -> bool | None:
    """Are two numbers equal? None where that cannot be had."""
    if x == y or (x.is_Rational and y.is_Rational):
        return bool(x == y)
    a, b = _complex(x, 30), _complex(y, 30)
    if a is None or b is None or abs(a - b) > max(abs(a), abs(b)) * 1e-20:
        return None if a is None or b is None else False
    if (digits := _digits(x, y)) > MAX_DIGITS:
        return None
    a, b = _complex(x, digits), _complex(y, digits)
    with mp.workdps(digits):
        scale = max(abs(a), abs(b))
        if mp.mag(scale) < -1.6 * digits:  # noise about zero
            return bool(simplify(x - y) == 0) or None
        return bool(abs(a - b) <= scale * mp.mpf(10) ** (20 - digits))


def _points(a: Any, b: Any):
    """Random values for the free symbols: natural numbers in factorials and sums, whole ones in floors and for signs
    (-1)^n, else fractions; all combinations of signs, now and then large. Equal values get equal points."""
    natural, whole = set(), set()
    for v in (a, b):
        for term in v.atoms(sympy.Sum, sympy.Product, sympy.factorial, sympy.binomial, sympy.factorial2):
            natural |= term.free_symbols
        for term in v.atoms(sympy.floor, sympy.ceiling, sympy.Mod, sympy.Pow):
            whole |= term.free_symbols if not term.is_Pow else term.exp.free_symbols if term.base.is_negative else set()
    rng, symbols = random.Random(f"{a}|{b}"), sorted(a.free_symbols | b.free_symbols, key=str)

    for n in range(POINTS):
        most, point = 10**6 if n % 8 == 7 else 99, {}
        for place, symbol in enumerate(symbols):
            sign = -1 if (n < 8 and n >> place & 1) or (n >= 8 and n % 2 == 0 and rng.random() < 0.5) else 1
            if symbol in natural:
                point[symbol] = sympy.Integer(rng.randint(0, 14))
            elif symbol in whole and str(symbol)[0] in "ijklmnpqrN":
                point[symbol] = sign * sympy.Integer(rng.randint(0, 12) ** 2 if n % 4 == 1 else rng.randint(0, most))
            else:
                point[symbol] = sign * Rational(rng.randint(1, most), rng.randint(1, 30))
        yield point


def same_value(a: Any, b: Any) -> bool:
    """Are two expressions equal: as numbers, at random points where both are real and not both zero, or simplified?"""
    a, b = (v.doit() if v.has(sympy.Integral, sympy.Limit, sympy.Derivative) else v for v in (a, b))
    if a == b:
        return True
    if a.atoms(AppliedUndef) or b.atoms(AppliedUndef):
        return simplify(a - b) == 0
    if not (a.free_symbols or b.free_symbols):
        return bool(same_number(*(_real_roots(v.doit()) for v in (a, b))))
    if a.free_symbols != b.free_symbols:
        return simplify(a) == simplify(b)
    equal = beyond = 0
    for point in _points(a, b):
        x, y = (_real_roots(v.xreplace(point).doit()) for v in (a, b))
        if x == y == 0 or any(v.has(nan, zoo, oo, -oo) for v in (x, y)) or (same := same_number(x, y)) is None:
            continue
        real = a.has(I) or b.has(I) or x.is_real or y.is_real
        if not same and real:
            return False
        equal, beyond = equal + bool(same and real), beyond + bool(same and not real)
        if equal == CONCLUSIVE:
            return True
    return equal + beyond >= CONCLUSIVE or simplify(a - b) == 0


# ================================================================================================== relations, sets


def same_relation(a: Any, b: Any) -> bool:
    """Is one of two equations or inequalities the other, rearranged and scaled?"""
    if a.free_symbols != b.free_symbols or any(isinstance(side, Set) for side in (*a.args, *b.args)):
        return False
    ratio = simplify((a.lhs - a.rhs) / (b.lhs - b.rhs))
    if not ratio.is_number or not ratio.is_finite or ratio.is_zero:
        return False
    if isinstance(a, Equality | Unequality) or isinstance(b, Equality | Unequality):
        return type(a) is type(b)
    return (a if ratio.is_positive else a.reversed).rel_op == b.rel_op


def same_set(a: Any, b: Any) -> bool:
    if a == b or sympy.SymmetricDifference(a, b) is S.EmptySet:
        return True
    if isinstance(a, sympy.FiniteSet) and isinstance(b, sympy.FiniteSet):
        return all(any(same(x, y) for y in other) for one, other in ((a, b), (b, a)) for x in one)
    return type(a) is type(b) and len(a.args) == len(b.args) and all(map(same, a.args, b.args))


def same_matrix(a: Any, b: Any) -> bool:
    a, b = (sympy.Matrix(v.doit()) for v in (a, b))
    return a.shape == b.shape and all(map(same, a.flat(), b.flat()))


def same(a: Any, b: Any) -> bool:
    """Are two values equal? math-verify's verdict for what is not an expression, a relation, a set or a matrix."""
    if a is None or b is None or any(isinstance(v, Expr) and v.has(nan, zoo) for v in (a, b)):
        return False
    matrix = MatrixBase | sympy.MatrixExpr
    rules = {matrix: same_matrix, Relational: same_relation, Set: same_set, Expr: same_value}
    for kind, rule in rules.items() if a != b else ():
        if isinstance(a, kind) or isinstance(b, kind):
            return isinstance(a, kind) and isinstance(b, kind) and rule(a, b)
    return a == b or verify(a, b, float_rounding=30, numeric_precision=30, timeout_seconds=None)
