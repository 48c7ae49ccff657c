"""Evaluation: how well a model does on a task: as it is, in context, calibrated, probed, on lm-evaluation-harness."""
