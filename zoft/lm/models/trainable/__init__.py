"""Which weights are trained: all, an adapter, norms and biases, the last blocks, or a regular expression."""

from zoft.lm.models.trainable.base import Trainable

__all__ = ["Trainable"]
