"""The recipe of a shard set."""

from typing import Any

from pydantic import Field

from recipes.load import Section
from shards.images import ImagesConfig
from shards.packing import PackingConfig


class BuildConfig(Section):
    """Sections of `recipes/shards/*.yaml`."""

    sources: list[dict[str, Any]] = Field(default_factory=list)  # mappings: `name` (a file in shards/sources), its keys
    source: dict[str, Any] = Field(default_factory=dict)  # keys for every source that has them
    packing: PackingConfig = PackingConfig()
    images: ImagesConfig = ImagesConfig()
