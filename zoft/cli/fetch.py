"""`zoft fetch`: bring a model or data set that needs no hub to the cache."""

from __future__ import annotations

from zoft.lm.data import assets
from zoft.utils.files import cache_dir


def command(arguments: list[str]) -> int:
    """Fetch assets by name; without a name, list them."""
    for name in arguments:
        print(assets.fetch(name.removeprefix("zoft:")))
    if not arguments:
        print(f"cache: {cache_dir()}")
        for name, asset in assets.ASSETS.items():
            print(f"  {name}  {'fetched' if assets.path(name) else asset.size}, {asset.licence}: {asset.source}")
    return 0
