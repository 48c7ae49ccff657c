"""Tasks: a dataset, a template, the answers and their metric; one file each."""

from zoft.lm.data.examples import Example
from zoft.lm.tasks.base import Splits, Task

__all__ = ["Example", "Splits", "Task"]
