"""What a component is, and how it is found by its file's name.

A component is a dataclass whose fields are hyper-parameters. It is at once the thing that runs, the Hydra schema of
its group, an entry of `zoft ls`, and a row of the contract tests. Adding one is adding one file to its group's folder
(or an entry point `zoft.<group>` in another package): no registry to edit.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

from zoft.errors import UserError, did_you_mean

GROUPS: dict[str, str] = {
    "subspace": "zoft.subspaces",
    "estimator": "zoft.estimators",
    "weighting": "zoft.weightings",
    "engine": "zoft.engines",
    "optimizer": "zoft.optimizers",
    "objective": "zoft.lm.objectives",
    "trainable": "zoft.lm.models.trainable",
    "peft": "zoft.lm.models.peft",
    "task": "zoft.lm.tasks",
}
"""Group name (as on the command line) -> the package whose files are its components."""

C = TypeVar("C", bound="Component")


@dataclasses.dataclass
class Component:
    """Base of every component: fields are hyper-parameters, ``check`` says what cannot be.

    Treat an instance as immutable. State never lives here, so that it can be saved and resumed.
    """

    escapes: ClassVar[tuple[str, ...]] = ()
    r"""Fields of text that a model reads: in an argument of the command line, ``\n`` in them is a line break."""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise :class:`zoft.errors.UserError` for values that cannot work."""

    @classmethod
    def name(cls) -> str:
        """The name it is chosen by: its file's name, e.g. ``one_sided``."""
        return cls.__module__.rpartition(".")[2]

    def require(self, ok: bool, field: str, rule: str, hint: str = "") -> None:
        """Raise a :class:`UserError` that names ``field`` unless ``ok``; ``hint`` says what was probably meant."""
        if not ok:
            value = getattr(self, field)
            raise UserError(f"{self.name()}.{field} must be {rule}, got {value!r}{hint and f': {hint}'}")


@lru_cache
def components(group: str) -> dict[str, type[Component]]:
    """Every component of a group by name: the files of its package, then entry points of other packages.

    Args:
        group: a key of :data:`GROUPS`.

    Returns:
        name -> class, sorted by name; modules that begin with ``_`` and ``base`` are not components.

    Example:
        >>> {"central", "one_sided"} <= set(components("estimator"))
        True
    """
    package = importlib.import_module(GROUPS[group])
    found: dict[str, type[Component]] = {}
    for module_info in pkgutil.iter_modules(package.__path__):
        if module_info.name.startswith("_") or module_info.name == "base":
            continue
        module = importlib.import_module(f"{package.__name__}.{module_info.name}")
        found.update({cls.name(): cls for cls in vars(module).values() if _is_component_of(cls, module.__name__)})
    for entry in importlib.metadata.entry_points(group=f"zoft.{group}"):
        found[entry.name] = entry.load()
    return dict(sorted(found.items()))


def _is_component_of(value: Any, module_name: str) -> bool:
    return (
        inspect.isclass(value)
        and issubclass(value, Component)
        and value.__module__ == module_name
        and not value.__name__.startswith("_")
    )


def create(group: str, choice: str | Component | None, default: str, **fields: Any) -> Any:
    """A component from its name, or the instance itself.

    Args:
        group: a key of :data:`GROUPS`.
        choice: a name, an instance, or None for the default.
        default: the name used for None.
        fields: hyper-parameters for a component made from a name.

    Returns:
        The component.

    Raises:
        UserError: no component of that name; the near ones are listed.

    Example:
        >>> create("optimizer", "sgd", "sgd").name()
        'sgd'
    """
    if isinstance(choice, Component):
        return choice
    name = default if choice is None else choice
    known = components(group)
    if not isinstance(name, str) or name not in known:
        raise UserError(f"there is no {group} called {name!r}.{did_you_mean(str(name), known)}")
    return known[name](**fields)


def describe(cls: type[Component]) -> list[tuple[str, str, str, str]]:
    """The hyper-parameters of a component: (name, type, default, what it means).

    The meaning comes from the ``Args:`` section of the docstring of the class that has the field, or of a base of it,
    so it is written once.
    """
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(vars(base).get("__doc__") or "")
        meanings |= re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", text, re.M)
    rows = []
    for field in dataclasses.fields(cls):
        default = field.default if field.default is not dataclasses.MISSING else "(required)"
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        rows.append((field.name, str(field.type), repr(default), re.sub(r"\s+", " ", meanings.get(field.name, ""))))
    return rows
