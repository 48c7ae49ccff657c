"""Engines: how the losses at the points are computed, exactly and at inference memory."""

from zoft.engines.base import Engine, Session

__all__ = ["Engine", "Session"]
