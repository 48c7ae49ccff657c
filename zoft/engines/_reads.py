"""Noticing which trained tensors torch is handed, by a class of their own for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from zoft.engines._pieces import asks_no_values
from zoft.utils.lazy import torch

if TYPE_CHECKING:
    from torch import nn

Note = Callable[[Any], None]
"""Called with the arguments of a torch function; it takes tuples and lists of them apart itself."""

_notes: list[Note] = []  # the last one is called


@lru_cache(maxsize=1)
def _watched_class() -> Any:
    class WatchedParameter(torch.nn.Parameter):
        """A parameter that says so when a torch function gets it; what is computed is the same."""

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            # what func calls in turn belongs to the same read, and is not looked at again
            with torch._C.DisableTorchFunctionSubclass():
                # computed first: an error of the model's own goes on as it is
                result = func(*args, **kwargs)
                if _notes and not asks_no_values(func, result):
                    _notes[-1]([*args, *kwargs.values()])
            return result

    return WatchedParameter


@contextmanager
def watched(parameters: Mapping[str, nn.Parameter], note: Note) -> Iterator[dict[str, type]]:
    """Within this block ``note`` is called with the arguments of every torch function that gets one of the parameters.

    Only these functions are looked at. A caller that expects reads of a parameter for a while gives it its own class
    back for that time. A tensor of another class than ``torch.nn.Parameter`` is left alone: it has a meaning of its own
    for torch.

    Args:
        parameters: what is watched, by name.
        note: gets a list of arguments.

    Yields:
        name -> the class by which a parameter is watched.
    """
    # a subclass of Parameter (quantised weights, ...) has its own __torch_function__
    changed = {name: parameter for name, parameter in parameters.items() if type(parameter) is torch.nn.Parameter}
    watched_class = _watched_class()
    _notes.append(note)
    try:
        for parameter in changed.values():
            parameter.__class__ = watched_class
        yield dict.fromkeys(changed, watched_class)
    finally:
        # the class is torch's again, whatever was raised: nothing of ours stays on the model
        for parameter in changed.values():
            parameter.__class__ = torch.nn.Parameter
        _notes.pop()
