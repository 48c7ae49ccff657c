"""What a message or a help text advises exists: every `group=choice` and `group.key=` in zoft's strings."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import zoft
from zoft.component import GROUPS, components
from zoft.config.catalog import choices
from zoft.trainer.config import ZOConfig

ROOT = Path(zoft.__file__).parent
ADVICE = re.compile(r"(?<![\w./~{}-])([a-z_]+)(?:\.([a-z_]+)=|=([a-z][a-z_0-9]*)(?![\w./(]))")
OTHER_VERBS = "blackbox"  # its settings are its own
EXAMPLES = {"estimator=cen", "estimator=glob", "subspace=pixels"}  # half a word, a sweep, and a word of `zoft attack`


def texts(path: Path) -> Iterator[str]:
    """The strings of a file; what is filled in later stands as braces, which nothing is read from."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.fixture(scope="module")
def keys() -> dict[str, set[str]]:
    known = {group: {f.name for c in components(group).values() for f in dataclasses.fields(c)} for group in GROUPS}
    return known | {"trainer": {field.name for field in dataclasses.fields(ZOConfig)}}


@pytest.mark.parametrize("room", sorted(p.name for p in ROOT.iterdir() if p.is_dir() and p.name != OTHER_VERBS))
def test_what_is_advised_exists(room: str, keys: dict[str, set[str]]):
    wrong = []
    for path in (ROOT / room).rglob("*.py"):
        for match in (match for text in texts(path) for match in ADVICE.finditer(text)):
            group, key, choice = match.groups()
            if key:
                exists = group not in keys or key in keys[group]
            else:
                exists = group not in GROUPS or choice in {*components(group), *choices(group), "auto", "null"}
            if not exists and match[0] not in EXAMPLES:
                wrong.append(f"{path.relative_to(ROOT)}: {match[0]}")
    assert not wrong
