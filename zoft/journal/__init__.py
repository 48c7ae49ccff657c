"""The journal: what happened, step by step, and the snapshots beside it; enough to resume and to replay a run."""
