"""The version of zoft, in one line that can be read without importing the package."""

__version__ = "0.1.0"
