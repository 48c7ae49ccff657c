"""Around a run: plan it, compare it, use its model, publish it."""
