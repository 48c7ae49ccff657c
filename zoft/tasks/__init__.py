"""Tasks: a dataset, a template, the answers and their metric; one file each."""

from zoft.tasks.base import Example, Splits, Task

__all__ = ["Example", "Splits", "Task"]
