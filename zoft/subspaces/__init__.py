"""Subspaces: which coordinates move, and what a direction looks like for one tensor."""

from zoft.subspaces.base import Coordinates, Subspace

__all__ = ["Coordinates", "Subspace"]
