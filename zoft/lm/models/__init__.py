"""Models: loading, adapters, and the choice of which weights are trained."""
