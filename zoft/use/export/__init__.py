"""A finished run as something that others load: a folder with a model card, a GGUF file, a repository on the hub."""
