"""Evaluation: metrics and their intervals."""
