"""Before a run: what it will take, and whether everything about it is in order."""
