"""One training step as values: points, losses, estimate, update."""
