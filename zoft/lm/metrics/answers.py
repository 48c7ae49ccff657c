"""Generated answers against gold ones: token F1 and exact match, as SQuAD's script compares them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"-?\d+(\.\d+)?")


def normalised(text: str) -> str:
    """Small letters, without punctuation and articles, one blank between words.

    Example:
        >>> normalised("The  Eiffel Tower!")
        'eiffel tower'
    """
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def f1(answer: str, gold: Sequence[str]) -> float:
    """Overlap of the answer's words with those of the gold answer that it is nearest to.

    2 p r / (p + r), p and r the shares of the answer's and of the gold answer's words that the two have in common; 0
    where they share none, also where neither has any.

    Args:
        answer: what was generated.
        gold: right answers, at least one.

    Returns:
        In [0, 1].

    Example:
        >>> f1("the tall tower", ["a tower", "Paris"])
        0.6666666666666666
        >>> f1("The.", ["a"]), exact_match("The.", ["a"])
        (0.0, 1.0)

    References: Rajpurkar et al. 2016 (SQuAD), section 6.1; the published script of SQuAD 1.1 for the normalisation and
        for 0 without a shared word, as MeZO's published code has it; SQuAD 2.0's script gives 1 where neither has any.
    """
    return max(_f1(normalised(answer).split(), normalised(right).split()) for right in gold)


def _f1(answer: list[str], right: list[str]) -> float:
    common = sum((Counter(answer) & Counter(right)).values())
    return 2 * common / (len(answer) + len(right)) if common else 0.0  # = 2 p r / (p + r)


def exact_match(answer: str, gold: Sequence[str]) -> float:
    """1 where the answer is one of the gold ones, both normalised; numbers are compared as they stand.

    SQuAD's script takes minus signs and decimal points for punctuation, and 3.5 for 35.

    Example:
        >>> exact_match("The tower", ["tower"]), exact_match("-5", ["5"]), exact_match("35", ["3.5"])
        (1.0, 0.0, 0.0)
    """
    return float(any(_same(answer, right) for right in gold))


def _same(answer: str, right: str) -> bool:
    if _NUMBER.fullmatch(right.strip()):
        return answer.strip() == right.strip()
    return normalised(answer) == normalised(right)


SCORES: dict[str, Callable[[str, Sequence[str]], float]] = {"f1": f1, "exact_match": exact_match}
"""How an answer is scored, by the metric's name."""
_NO_ANSWER = ("no answer", "CANNOTANSWER")


def f1_of_mezo(answer: str, gold: Sequence[str]) -> float:
    """As :func:`f1`; but where the first gold answer says that there is none, an answer is that or it is wrong.

    Example:
        >>> f1("no idea", ["no answer"]), f1_of_mezo("no idea", ["no answer"]), f1_of_mezo("No answer.", ["no answer"])
        (0.5, 0.0, 1.0)

    References: MeZO's published code.
    """
    return float(normalised(answer) == normalised(gold[0])) if gold[0] in _NO_ANSWER else f1(answer, gold)


def scored(answer: str, gold: Sequence[str], *, as_mezo: bool = False) -> dict[str, float]:
    """All of :data:`SCORES` of one answer; ``as_mezo`` with :func:`f1_of_mezo`."""
    scores = SCORES | {"f1": f1_of_mezo} if as_mezo else SCORES
    return {name: score(answer, gold) for name, score in scores.items()}
