"""The tensors that are trained, and how a step is rounded into them."""
