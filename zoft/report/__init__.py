"""What a run tells: progress, metrics, curve, memory, report and trackers."""
