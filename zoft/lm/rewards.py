"""Reward functions to begin with: arithmetic whose answer can be checked."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from fractions import Fraction

_NUMBER = re.compile(r"\d+")
_EXPRESSION = re.compile(r"[\d+\-*/() ]*\d[\d+\-*/() ]*")
_LONGEST = 200  # characters: what is longer is no answer, and deep nesting is not parsed


def countdown(prompts: Sequence[str], generations: Sequence[str], answers: Sequence[str | float]) -> list[float]:
    """Countdown: make the target from the prompt's numbers, each used once, with + - * / and brackets.

    What is judged is the first line that holds an expression, up to an equals sign.

    Args:
        prompts: texts that hold the numbers, and perhaps the target.
        generations: what was written.
        answers: the targets.

    Returns:
        For each, 1 where the expression uses just these numbers and has the target's value, 0.1 where it is an
        expression of just these numbers, 0 otherwise.

    Example:
        >>> ask = "Make 24 of 3, 3, 8, 8."
        >>> countdown([ask] * 4, ["8/(3-8/3) = 24", "3*8", "(3+3)*8/8", "no idea"], [24] * 4)
        [1.0, 0.0, 0.1, 0.0]
    """
    return [_judged(*one) for one in zip(prompts, generations, answers, strict=True)]


def _judged(prompt: str, text: str, target: str | float) -> float:
    numbers = sorted(map(int, _NUMBER.findall(prompt)))
    wanted = Fraction(str(target))
    if wanted in numbers:
        numbers.remove(int(wanted))  # the prompt names it too
    line = next((line for line in text.split("\n") if _NUMBER.search(line)), "")
    expression = _EXPRESSION.search(line.partition("=")[0][:_LONGEST])
    if expression is None or sorted(map(int, _NUMBER.findall(expression[0]))) != numbers:
        return 0.0
    try:
        value = _value(ast.parse(expression[0].strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return 0.0
    return 1.0 if value == wanted else 0.1


def _value(node: ast.expr) -> Fraction:
    """The value of sums and products of whole numbers; nothing of it is executed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            return left / right
    raise ValueError("no expression of + - * /")
