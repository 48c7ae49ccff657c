"""Before a run: the memory and time it will need, and checks of its config, rows and model."""
