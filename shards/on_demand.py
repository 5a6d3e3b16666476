"""Sets that a recipe can make by itself: drawn people, packed on first use."""

from collections.abc import Callable, Sequence
from pathlib import Path

from recipes.load import load
from shards.assembly import BuildConfig, build_set
from shards.manifests import read_manifest
from shards.remote import is_remote
from shards.unpacked import is_source


def ensure_sets(paths: Sequence[Path | str], recipe: Path | None, main: bool, wait: Callable[[], None]) -> None:
    """Pack the sets of `paths` that do not exist yet by the recipe (a file under recipes/shards).

    main: whether this process packs; wait: barrier over the processes. Without a recipe a missing set is a UserError.
    """
    here = [path for path in map(str, paths) if not is_remote(path) and not is_source(path)]
    missing = [path for path in here if not Path(path).exists()]
    for path in missing if main else ():
        if recipe is None:
            read_manifest(path)  # says what is missing and how to make it
        else:
            print(f"{path} does not exist yet: packing it by {recipe}", flush=True)
            config = load(BuildConfig, recipe)
            build_set(config.sources, path, config.packing, config.images, config.source)
    wait()
