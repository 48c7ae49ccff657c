"""The bench: a grid of method x task x prompt x seed at one budget of queries, its references, and what it shows."""
