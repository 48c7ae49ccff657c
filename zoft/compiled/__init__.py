"""Compiled noise: z made and used in one pass over memory, with the bits of the eager code in zoft/noise.py."""

from zoft.compiled.choice import MODES, kernels, prepare, using, why
from zoft.compiled.kernels import Kernels, Stream

__all__ = ["MODES", "Kernels", "Stream", "kernels", "prepare", "using", "why"]
