"""Subspaces: which coordinates move, and what a direction looks like for one tensor."""

from zoft.subspaces.base import BoundSubspace, Subspace

__all__ = ["BoundSubspace", "Subspace"]
