"""Several objectives as one: a weighted sum."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from zoft.component import components, create
from zoft.errors import UserError, did_you_mean
from zoft.lm.objectives.base import Batch, Objective
from zoft.utils.lazy import Tensor, nn

_TERM = re.compile(r"\s*(?P<sign>[+-]?)\s*(?:(?P<weight>\d+\.?\d*(?:[eE][+-]?\d+)?)\s*\*\s*)?(?P<name>[a-zA-Z_]\w*)\s*")


@dataclass
class Expression(Objective):
    """A weighted sum of objectives of the same rows, e.g. ``cross_entropy + 0.5*metric``.

    Predictions, and so the metric that is reported, are those of the first term. Where a step is made of several
    micro-batches they are weighted by the first term's count.

    Args:
        formula: names of objectives with weights, joined by + and -.
        settings: name -> that objective's own settings, e.g. ``{metric: {metric: f1}}``.
    """

    formula: str = "options"
    settings: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse what cannot be read, unknown names, and settings of an objective that is not in the formula."""
        names = [name for name, _ in self._read()]
        for name in self.settings:
            known = did_you_mean(str(name), names)
            self.require(name in names, "settings", "of objectives in the formula", known.strip())
        self.terms()

    @property
    def forms(self) -> tuple[str, ...]:
        """Rows that all terms can be computed from."""
        of_terms = [term.forms for term, _ in self.terms()]
        # in the first term's order: it decides what the rows are
        return tuple(form for form in of_terms[0] if all(form in other for other in of_terms[1:]))

    @property
    def differentiable(self) -> bool:
        """Whether all terms are."""
        return all(term.differentiable for term, _ in self.terms())

    @property
    def generates(self) -> bool:
        """Whether a term does."""
        return any(term.generates for term, _ in self.terms())

    def prepare(self) -> None:
        """As every term."""
        for term, _ in self.terms():
            term.prepare()

    def terms(self) -> list[tuple[Objective, float]]:
        """The objectives and their weights."""
        terms = []
        for name, weight in self._read():
            given = dict(self.settings.get(name, {}))
            known = [one.name for one in dataclasses.fields(components("objective")[name])]
            for key in given:
                self.require(
                    key in known, "settings", f"settings of {name}", (did_you_mean(key, known) or "it has none").strip()
                )
            terms.append((create("objective", name, name, **given), weight))
        return terms

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The weighted sum."""
        losses = [weight * term.loss(model, batch) for term, weight in self.terms()]
        # from the first term on, so that no zero of another dtype or device is added
        return sum(losses[1:], losses[0])

    @property
    def tells_examples(self) -> bool:
        """Whether all terms do."""
        return all(term.tells_examples for term, _ in self.terms())

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The weighted sum of each example's."""
        losses = [weight * term.losses(model, batch) for term, weight in self.terms()]
        return sum(losses[1:], losses[0])

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(the weighted sum, the first term's predictions, its labels)."""
        (first, weight), *others = self.terms()
        loss, predictions, labels = first.predict(model, batch)
        # predictions are the first term's: a second forward would give the same
        return sum((w * term.loss(model, batch) for term, w in others), weight * loss), predictions, labels

    def probe(self, model: nn.Module, batch: Batch) -> None:
        """As every term does."""
        for term, _ in self.terms():
            term.probe(model, batch)

    def num_terms(self, batch: Batch) -> int:
        """The first term's."""
        return self.terms()[0][0].num_terms(batch)

    def _read(self) -> list[tuple[str, float]]:
        pairs: list[tuple[str, float]] = []
        place = 0
        while place < len(self.formula):
            term = _TERM.match(self.formula, place)
            # terms after the first need a sign between them
            if term is None or (pairs and not term["sign"]):
                break
            if term["name"] not in components("objective") or term["name"] == self.name():
                others = components("objective").keys() - {self.name()}
                near = did_you_mean(term["name"], others)
                raise UserError(f"{self.name()}.formula: there is no objective called {term['name']!r}.{near}")
            pairs.append((term["name"], float(term["weight"] or 1) * (-1 if term["sign"] == "-" else 1)))
            place = term.end()
        rule = "objectives with weights joined by + and -, e.g. 'cross_entropy + 0.5*metric'"
        # what is left unread is an error, and not a shorter formula
        self.require(bool(pairs) and place == len(self.formula), "formula", rule)
        return pairs
