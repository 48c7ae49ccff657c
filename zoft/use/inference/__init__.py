"""Inference with a finished run: labels for new rows, texts, a conversation."""
