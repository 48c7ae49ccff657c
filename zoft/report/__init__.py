"""What a run tells: progress, metrics, curve, memory, report and trackers; it stands on top of everything else."""
