"""How right a Python signature is: what docstrings of the standard library are answered with."""

import ast
import warnings
from collections import Counter


def parse(signature: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The function that a text such as `def f(a, b=1):` declares; None if it declares none."""
    with warnings.catch_warnings(action="ignore"):  # invalid escapes
        try:
            (node,) = ast.parse(signature.strip().removesuffix(":") + ":\n    pass").body
        except (SyntaxError, ValueError, MemoryError, RecursionError):  # of too deep a nesting
            return None
    return node if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else None


def name_match(predicted: str, true: str) -> bool:
    """Whether two signatures have the same name."""
    found, wanted = parse(predicted), parse(true)
    return found is not None and wanted is not None and found.name == wanted.name


def argument_f1(predicted: str, true: str) -> float:
    """F1 of the names of the arguments, 0 to 1: 1 where neither has any."""
    found, wanted = (Counter(arguments(text)) for text in (predicted, true))
    if parse(predicted) is None:
        return 0.0
    total = found.total() + wanted.total()
    return 2 * (found & wanted).total() / total if total else 1.0


def arguments(signature: str) -> list[str]:
    """The names of all arguments in order, with * and ** before those that take the rest."""
    node = parse(signature)
    if node is None:
        return []
    given = node.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    names += [f"*{given.vararg.arg}"] if given.vararg else []
    return names + ([f"**{given.kwarg.arg}"] if given.kwarg else [])
