"""Language models: loading, data, tasks, objectives, metrics. Knows no noun of the method."""
