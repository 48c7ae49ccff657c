"""Logits at the positions that a loss needs, and nothing else of the head's work."""
