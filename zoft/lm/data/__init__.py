"""Where rows come from: local files, the hub, and the assets the demo fetches."""
