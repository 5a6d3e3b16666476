"""What a data set holds beside what its authors say that it holds."""

from collections.abc import Mapping
from typing import NamedTuple

from recipes.load import Section
from shards import sources
from shards.schema import Manifest, Published


class Deviation(NamedTuple):
    """A published count and what there is."""

    split: str
    what: str  # "images" or "identities"
    found: int
    expected: int

    @property
    def sentence(self) -> str:
        there = f"{self.split}: {self.found:,} {self.what}"
        if self.found == self.expected:
            return f"{there} as published"
        side = "fewer" if self.found < self.expected else "more"
        return f"{there}, {abs(self.found - self.expected):,} {side} than the published {self.expected:,}"


def compare(found: Mapping[str, tuple[int, int]], published: Published) -> list[Deviation]:
    """Every published count beside what was found; equal ones too. found: split -> images, identities."""
    told = []
    for split, (images, identities) in published.splits.items():
        there = found.get(split, (0, 0))
        told.append(Deviation(split, "images", there[0], images))
        if identities is not None:
            told.append(Deviation(split, "identities", there[1], identities))
    return told


def sentences(name: str, config: Section, manifest: Manifest) -> list[str]:
    """How a set that was packed from one whole source differs from what was published; [] if nothing was.

    config: of the source.
    """
    published = getattr(sources.find(name), "published", None)
    if published is None:
        return []
    told = published(config)
    if not told.splits:
        return [f"{told.title} ({told.paper})"]
    counts = {split: (count.images, count.identities) for split, count in manifest.splits.items()}
    other = [each.sentence for each in compare(counts, told) if each.found != each.expected]
    verdict = "differs from what was published" if other else "all counts are the published ones"
    return [f"{told.title}: {verdict}", *(f"  {sentence}" for sentence in other)]
