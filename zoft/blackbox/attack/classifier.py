"""A black-box classifier: images in, scores out, no gradients; every image counts as a query."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from zoft.errors import UserError, did_you_mean
from zoft.utils.lazy import torch

GIVES = ("logits", "probabilities")
"""What scores can be."""

_LEAST = float(np.finfo(np.float32).tiny)  # a probability that was rounded to zero


class Classifier:
    """Asks for the scores of images, and counts them.

    Args:
        scores: images, float32 [n, c, h, w] in [0, 1] -> scores [n, classes], numpy or torch; also a torch module.
        labels: a name for each class.
        gives: what the scores are: ``logits`` (any real numbers) or ``probabilities``.
        batch: most images that are handed over at a time.

    Raises:
        UserError: settings that make no sense; when asked, scores of another shape, or that are not finite.

    Example:
        >>> brightness = lambda images: np.stack([images.mean((1, 2, 3)), 1 - images.mean((1, 2, 3))], 1)
        >>> classifier = Classifier(brightness, ["light", "dark"], gives="probabilities")
        >>> np.exp(classifier(np.full((1, 1, 2, 2), 0.25, np.float32))).round(2).tolist(), classifier.num_queries
        ([[0.25, 0.75]], 1)
    """

    def __init__(
        self, scores: Callable[[Any], Any], labels: Sequence[str], *, gives: str = "logits", batch: int = 256
    ) -> None:
        if gives not in GIVES:
            raise UserError(f"gives must be one of {', '.join(GIVES)}, got {gives!r}")
        if len(labels) < 2:
            raise UserError(f"a classifier needs two labels or more, got {len(labels)}")
        self.scores, self.labels, self.gives, self.batch = scores, [str(label) for label in labels], gives, batch
        self.num_queries = 0

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logarithms of the probabilities, float64 [n, classes].

        Args:
            images: float32 [n, c, h, w] in [0, 1].
        """
        answers = [self._asked(images[i : i + self.batch]) for i in range(0, len(images), self.batch)]
        return np.concatenate(answers) if answers else np.empty((0, len(self.labels)))

    def _asked(self, images: np.ndarray) -> np.ndarray:
        self.num_queries += len(images)
        if isinstance(self.scores, torch.nn.Module):
            device = next((p.device for p in self.scores.parameters()), "cpu")
            with torch.inference_mode():
                given = self.scores(torch.from_numpy(images).to(device))
        else:
            given = self.scores(images)
        if hasattr(given, "detach"):
            given = given.detach().cpu().double().numpy()
        scores = np.asarray(given, dtype=np.float64)
        if scores.shape != (len(images), len(self.labels)):
            raise UserError(
                f"the classifier must give {len(self.labels)} scores for each image: of {len(images)} images it gave "
                f"an array of shape {scores.shape}"
            )
        if not np.isfinite(scores).all():
            raise UserError("the classifier gave a score that is not finite: there is nothing to go by")
        if self.gives == "logits":
            scores = scores - scores.max(1, keepdims=True)
            return scores - np.log(np.exp(scores).sum(1, keepdims=True))
        if scores.min() < 0 or abs(scores.sum(1) - 1).max() > 1e-3:
            raise UserError("the classifier's probabilities must be >= 0 and sum to 1: are they logits? (gives=logits)")
        return np.log(np.maximum(scores, _LEAST))

    def index_of(self, label: str) -> int:
        """The number of a class, by its name or its number.

        Raises:
            UserError: there is none.
        """
        if label in self.labels:
            return self.labels.index(label)
        if label.isdecimal() and int(label) < len(self.labels):
            return int(label)
        near = did_you_mean(label, self.labels) if len(self.labels) <= 20 else ""
        raise UserError(f"the classifier has no class {label!r} (a name, or 0 to {len(self.labels) - 1}).{near}")
