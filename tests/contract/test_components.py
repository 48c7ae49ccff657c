"""What every component of every group promises: documented fields, values that work by default, bad ones refused."""

from __future__ import annotations

import dataclasses
import re
import sys

import pytest

from tests.contract.discovered import EVERY, example
from zoft.component import GROUPS, components, create, describe
from zoft.errors import UserError

ids = [f"{group}={name}" for group, name in EVERY]
every = pytest.mark.parametrize(("group", "name"), EVERY, ids=ids)


def test_every_group_has_components():
    assert all(components(group) for group in GROUPS)


@every
def test_is_a_dataclass_in_a_file_of_its_name(group, name):
    cls = components(group)[name]
    assert dataclasses.is_dataclass(cls)
    assert cls.name() == name
    assert "__dataclass_params__" in vars(cls), "the decorator is missing: its fields would be the base's"


@every
def test_defaults_work_and_do_not_share_mutable_values(group, name):
    one, two = example(group, name), example(group, name)
    assert one == two
    for field in dataclasses.fields(one):
        value = getattr(one, field.name)
        assert not isinstance(value, (list, dict)) or value is not getattr(two, field.name)
    assert create(group, one, "") is one


@every
def test_every_field_is_documented(group, name):
    cls = components(group)[name]
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}("), "dataclass's own docstring: write one"
    missing = [field for field, _, _, meaning in describe(cls) if len(meaning) < 5]
    assert not missing, f"Args: of {cls.__name__} says nothing of {missing}"


@every
def test_the_docstring_documents_nothing_that_is_not_a_field(group, name):
    cls = components(group)[name]
    section = re.search(r"Args:\n((?: {8}.*\n|\n)+)", cls.__doc__ + "\n")
    documented = set(re.findall(r"^ {8}(\w+): ", section.group(1), re.M)) if section else set()
    assert documented <= {field.name for field in dataclasses.fields(cls)}


@every
def test_every_field_is_typed_as_hydra_can_read_it(group, name):
    from omegaconf import OmegaConf

    OmegaConf.structured(components(group)[name]) if (group, name) != ("trainable", "regex") else None


def bad_values():
    """(group, name, field, value): not a number, a negative count, a word that is none of the choices."""
    for group, name in EVERY:
        for field in dataclasses.fields(components(group)[name]):
            kind = str(field.type)
            if kind.startswith("float"):
                yield group, name, field.name, float("nan")
                yield group, name, field.name, float("inf")
            if kind.startswith("int"):
                yield group, name, field.name, -1


@pytest.mark.parametrize(("group", "name", "field", "value"), bad_values(), ids=lambda value: str(value))
def test_numbers_that_cannot_work_are_refused_by_name(group, name, field, value):
    with pytest.raises(UserError, match=rf"\b{field}\b.*must be .*got {value}"):
        example(group, name, **{field: value})


CHOICES = [("subspace", n, "law") for n in components("subspace")]
CHOICES += [("estimator", n, "noise") for n in components("estimator")]
CHOICES += [("engine", "in_place", "restore"), ("peft", "prefix", "init"), ("subspace", "blocks", "order")]


@pytest.mark.parametrize(("group", "name", "field"), CHOICES)
def test_unknown_words_are_refused_with_the_known_ones(group, name, field):
    known = getattr(example(group, name), field)
    with pytest.raises(UserError, match=rf"\b{field}\b must be .*\b{known}\b.*got 'nonsense'"):
        example(group, name, **{field: "nonsense"})


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_a_misspelt_name_gets_the_near_ones(group):
    name = next(iter(components(group)))
    with pytest.raises(UserError, match=rf"there is no {group} called '{name}x'.*{name}"):
        create(group, name + "x", name)


def test_reading_the_components_imports_nothing_heavy():
    import subprocess

    code = (
        "import sys; from zoft.component import GROUPS, components, describe\n"
        "[describe(c) for g in GROUPS for c in components(g).values()]\n"
        "print(sorted({'torch', 'transformers', 'peft', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
