"""Sets that a recipe can make by itself: drawn people, packed on first use."""

from collections.abc import Callable, Sequence
from pathlib import Path

from recipes.load import load
from shards.assembly import BuildConfig, build_set
from shards.reader import read_manifest


def ensure_sets(paths: Sequence[Path], recipe: Path | None, main: bool, wait: Callable[[], None]) -> None:
    """Pack the sets of `paths` that do not exist yet by the recipe (a file under recipes/shards).

    main: whether this process packs; wait: barrier over the processes. Without a recipe a missing set is a UserError.
    """
    missing = [path for path in paths if not path.exists()]
    for path in missing if main else ():
        if recipe is None:
            read_manifest(path)  # says what is missing and how to make it
        else:
            print(f"{path} does not exist yet: packing it by {recipe}", flush=True)
            config = load(BuildConfig, recipe)
            build_set(config.sources, path, config.packing, config.images, config.source)
    wait()
