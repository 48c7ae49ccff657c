"""The version of zoft: one line, so that nobody imports the package to know it."""

__version__ = "0.1.0"
