"""What every layer may use: lazy imports, files, random state."""
