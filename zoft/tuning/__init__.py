"""Tuning: a search over named parameters (log and linear ranges, integers, choices), each evaluation a costly job."""
