"""The attack: searches for many images side by side, their questions in one batch, each image's queries counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zoft.blackbox.attack.ball import LOSSES, Aim, Ball
from zoft.blackbox.attack.classifier import Classifier
from zoft.blackbox.attack.methods import AttackMethod
from zoft.blackbox.attack.searches import Search
from zoft.blackbox.attack.subspaces import ImageSubspace
from zoft.errors import UserError

_AT_ONCE = 64  # images that are attacked side by side


@dataclass
class ImageOutcome:
    """What became of one image.

    Args:
        image: its number.
        label: the right class.
        target: the class that was wanted; None for any but the right one.
        skipped: the classifier had the image wrong from the start (or as the target), and nothing was tried.
        success: the aim was reached.
        num_queries: images that were asked for, with the clean one.
        original: float32 [c, h, w].
        adversarial: where the aim was reached, else the image of the lowest loss; the original where none was lower.
        before: label and probability of the original.
        after: label and probability of the adversarial.
        size: norm of the perturbation.
    """

    image: int
    label: int
    target: int | None
    skipped: bool
    success: bool
    num_queries: int
    original: np.ndarray
    adversarial: np.ndarray
    before: tuple[int, float]
    after: tuple[int, float]
    size: float = 0.0


def attack(
    classifier: Classifier,
    images: np.ndarray,
    labels: Sequence[int],
    *,
    norm: str = "linf",
    radius: float = 0.1,
    budget: int = 1000,
    method: str | AttackMethod = "flips",
    subspace: str = "pixels",
    grid: int = 0,
    loss: str = "margin",
    target: int | None = None,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> list[ImageOutcome]:
    """Look for an image near each image that the classifier labels otherwise. For testing classifiers of one's own.

    Args:
        classifier: what is asked.
        images: float32 [n, c, h, w] in [0, 1].
        labels: the right classes [n].
        norm: ``linf`` or ``l2``.
        radius: bound on the perturbation in this norm.
        budget: most queries for an image, the clean one counted.
        method: a name of :data:`zoft.blackbox.attack.methods.METHODS`, or one with settings.
        subspace: ``pixels``, ``square`` or ``low_frequency``.
        grid: rows and columns of a square or low-frequency subspace.
        loss: ``margin`` or ``cross_entropy``.
        target: a class that is wanted; None for any but the right one.
        seed: of the random choices; an image's depend on its number and not on the others.
        numbers: the images' numbers; 0, 1, ... if left out.
        progress: called with (images done, images) now and then.

    Returns:
        One outcome for each image, in order. An image that the classifier has wrong is skipped, after one query.

    Raises:
        UserError: settings that make no sense, and images that are none.

    Example:
        >>> def scores(images):  # a classifier that looks at the mean brightness
        ...     mean = images.mean((1, 2, 3))
        ...     return np.stack([mean, 1 - mean], 1)
        >>> classifier = Classifier(scores, ["light", "dark"], gives="probabilities")
        >>> grey = np.full((1, 1, 4, 4), 0.55, np.float32)
        >>> [found] = attack(classifier, grey, [0], norm="linf", radius=0.1, budget=50)
        >>> found.success, found.num_queries, classifier.num_queries, round(found.size, 3)
        (True, 3, 3, 0.1)
    """
    images = _checked(images)
    ball, space = Ball(norm, radius), ImageSubspace(subspace, images.shape[1:], grid)
    way = method if isinstance(method, AttackMethod) else AttackMethod(method)
    if loss not in LOSSES:
        raise UserError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    if budget < way.least_budget(space):
        raise UserError(
            f"budget={budget} is too small: the clean image and the first step of method={way.name} are "
            f"{way.least_budget(space)} queries"
        )
    numbers = range(len(images)) if numbers is None else numbers
    tries = []
    for start in range(0, len(images), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        aims = [Aim(int(label), target, loss) for label in labels[part]]
        tries += _side_by_side(
            [_Try(*one, ball, space, way, budget, seed) for one in zip(numbers[part], images[part], aims, strict=True)],
            classifier,
        )
        if progress is not None:
            progress(len(tries), len(images))
    return [one.outcome() for one in tries]


class _Try:
    """One image: what its search asks, how much it has asked, the best it has found."""

    def __init__(
        self,
        number: int,
        image: np.ndarray,
        aim: Aim,
        ball: Ball,
        subspace: ImageSubspace,
        method: AttackMethod,
        budget: int,
        seed: int,
    ) -> None:
        self.number, self.image, self.aim, self.ball = number, image, aim, ball
        self.subspace, self.method, self.budget, self.seed = subspace, method, budget, seed
        self.num_queries, self.skipped, self.success = 0, False, False
        self.best, self.best_loss = image, float(np.inf)
        self.search: Search | None = None
        self.questions = image[None]  # [m, c, h, w]; empty: it is over
        self.before = self.after = (-1, 0.0)

    def tell(self, log_probabilities: np.ndarray) -> None:
        """The answers to the questions; the next ones follow."""
        losses, reached = self.aim.losses(log_probabilities), self.aim.reached(log_probabilities)
        self.num_queries += len(losses)
        self.success = bool(reached.any())
        at = int(reached.argmax() if self.success else losses.argmin())
        if self.success or losses[at] < self.best_loss:
            self.best, self.best_loss = self.questions[at], float(losses[at])
            self.after = _said(log_probabilities[at])
        try:
            if self.search is None:
                self.before = _said(log_probabilities[0])
                self.skipped = self.before[0] != self.aim.label or self.success
                self.search = self.method.search(
                    self.subspace, self.ball, clean=float(losses[0]), budget=self.budget, seed=self.seed,
                    image=self.number,
                )  # fmt: skip
                asked = None if self.skipped else next(self.search)
            else:
                asked = None if self.success else self.search.send(losses.tolist())
        except StopIteration:
            asked = None
        if asked is None or len(asked) > self.budget - self.num_queries:
            if self.search is not None:
                self.search.close()
            self.questions = self.questions[:0]
        else:
            self.questions = np.stack([self.at(z) for z in asked])

    def at(self, z: np.ndarray) -> np.ndarray:
        """The image that z stands for, float32, within the ball in float32 too."""
        delta = self.ball.unit(self.image.size) * self.subspace.lift(z)
        moved = self.ball.moved(self.image.astype(np.float64), delta, fill=self.method.fills)
        return moved.astype(np.float32)

    def outcome(self) -> ImageOutcome:
        """When it is over."""
        return ImageOutcome(
            self.number,
            self.aim.label,
            self.aim.target,
            self.skipped,
            self.success and not self.skipped,
            self.num_queries,
            self.image,
            self.best,
            self.before,
            self.after,
            self.ball.size(self.best.astype(np.float64) - self.image),
        )


def _side_by_side(tries: list[_Try], classifier: Classifier) -> list[_Try]:
    """All of them to their end; what they ask at the same time goes to the classifier together."""
    going = tries
    try:
        while going:
            answers = classifier(np.concatenate([one.questions for one in going]))
            ends = np.cumsum([len(one.questions) for one in going])
            for one, said in zip(going, np.split(answers, ends[:-1]), strict=True):
                one.tell(said)
            going = [one for one in going if len(one.questions)]
    finally:
        for one in going:
            if one.search is not None:
                one.search.close()
    return tries


def _said(log_probabilities: np.ndarray) -> tuple[int, float]:
    label = int(log_probabilities.argmax())
    return label, float(np.exp(log_probabilities[label]))


def _checked(images: np.ndarray) -> np.ndarray:
    images = np.ascontiguousarray(images, dtype=np.float32)
    if images.ndim != 4 or not images.size:
        raise UserError(f"images must have the shape [n, channels, height, width], got {list(images.shape)}")
    if not (images.min() >= 0 and images.max() <= 1):
        raise UserError(f"pixels must be in [0, 1], got {images.min():g} to {images.max():g}: divide by 255?")
    return images
