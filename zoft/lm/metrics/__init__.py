"""Metrics of answers, with intervals."""
