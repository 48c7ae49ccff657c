"""The methods by name: compositions of the nouns, and searches made for images."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from zoft.blackbox.attack.ball import Ball
from zoft.blackbox.attack.descent import Composition, descent
from zoft.blackbox.attack.searches import Draws, Search, flips, greedy, squares
from zoft.blackbox.attack.subspaces import ImageSubspace
from zoft.errors import UserError, did_you_mean

COMPOSITIONS = {
    "sign": Composition("central", "full", "sign", num_directions=10, eps=0.25, learning_rate=0.25),
    "coordinate": Composition("central", "coordinate", "adam", num_directions=10, eps=0.25, learning_rate=0.25),
    "random": Composition("central", "full", "sgd", num_directions=10, eps=0.25),
    "minimize": Composition(),
}
"""Those that `zoft.Minimizer` runs."""

METHODS = {
    "flips": "blocks of signs are turned, large ones first, and kept if the loss is lower (SignHunter in squares)",
    "squares": "random squares of random sign, kept if the loss is lower (Square Attack)",
    "greedy": "one coordinate after another, up or down (SimBA)",
    "sign": "sign updates of central differences along random directions (ZO-signSGD)",
    "coordinate": "coordinate-wise central differences with Adam (ZOO)",
    "random": "central differences along random directions, automatic step size",
    "minimize": "zoft.minimize left alone",
}
"""Name -> what it does."""

_FILLING = ("flips", "squares")  # they ask at the corners of the ball only


@dataclass(frozen=True)
class AttackMethod:
    """How perturbations are searched.

    Args:
        name: one of :data:`METHODS`.
        changes: settings of a composition that are not its own: num_directions, eps, learning_rate.

    Raises:
        UserError: an unknown name, or settings that the method does not have.

    Example:
        >>> AttackMethod("sign", {"num_directions": 20}).parts.num_directions
        20
    """

    name: str = "flips"
    changes: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise UserError(f"there is no method {self.name!r}.{did_you_mean(self.name, METHODS)}")
        for key, value in self.changes.items():
            if getattr(COMPOSITIONS.get(self.name, Composition()), key) is None:
                having = [name for name, parts in COMPOSITIONS.items() if getattr(parts, key) is not None]
                raise UserError(f"method={self.name} has no {key}: leave it out, or use method={' or '.join(having)}")
            if not 0 < value < float("inf"):
                raise UserError(f"{key} must be > 0 and finite, got {value:g}")

    @property
    def parts(self) -> Composition:
        """The composition with its changes; empty for a search of its own."""
        return dataclasses.replace(COMPOSITIONS.get(self.name, Composition()), **self.changes)  # type: ignore[arg-type]

    @property
    def fills(self) -> bool:
        """Whether every query goes as far as the ball allows."""
        return self.name in _FILLING

    def least_budget(self, subspace: ImageSubspace) -> int:
        """Queries of the image itself and the first step."""
        if self.name == "minimize":
            return 4
        if self.name not in COMPOSITIONS:
            return 2
        trial = 1 if self.parts.learning_rate is None else 0
        return 2 + 2 * min(subspace.num_elements, self.parts.num_directions or 1) + trial

    def search(
        self, subspace: ImageSubspace, ball: Ball, *, clean: float, budget: int, seed: int, image: int
    ) -> Search:
        """The search for one image.

        Args:
            subspace: what z is.
            ball: the bound.
            clean: the loss of the image itself.
            budget: queries, with the one of the image itself.
            seed: the attack's.
            image: number of the image.
        """
        draws, bounded = Draws(seed, image), ball.norm == "linf" and subspace.is_local
        if self.name == "flips":
            return flips(subspace, draws)
        if self.name == "squares":
            if not subspace.is_local:
                raise UserError("method=squares sets squares of the image: use subspace=pixels or square")
            return squares(subspace, draws, budget=budget)
        if self.name == "greedy":
            return greedy(subspace, draws, clean=clean, bounded=bounded)
        image_seed = draws.key % 2**31  # every image has directions of its own
        return descent(subspace, self.parts, clean=clean, bounded=bounded, budget=budget, seed=image_seed)
