"""One training run from a config: build, train, replay, the run's folder."""
