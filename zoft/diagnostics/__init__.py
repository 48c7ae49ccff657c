"""How good a run's gradient estimates are: measured beside the run, from its own batches and directions."""

from zoft.diagnostics.callback import DiagnosticsCallback

__all__ = ["DiagnosticsCallback"]
