"""One page in a browser that drives the verbs of the command line (`zoft ui`)."""
