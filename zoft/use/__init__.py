"""What a user does around a run: plan it, compare it, use its model, publish it."""
