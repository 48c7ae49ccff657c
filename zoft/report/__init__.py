"""Output of a run: progress, metrics, curve, memory, report and trackers."""
