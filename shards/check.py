"""Count what a data set holds, or verify a packed one: python shards/check.py --help"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recipes.errors import UserError, plain_errors
from recipes.load import Section, load, recipe_path
from shards import inspection, sources, verification
from shards.assembly import BuildConfig, configure
from shards.published import compare
from shards.remote import is_remote
from shards.schema import MANIFEST

SHOWN = 20  # lines of a kind on screen
EXAMPLES = """
examples:
  a data set as its authors give it: images, identities, cameras, sizes, duplicates, damaged files, and what is missing
    python shards/check.py market1501:Market-1501-v15.09.15

  a folder of crops, with all damaged files and duplicates listed in a file
    python shards/check.py folder:crops 'source.suffixes=[jpg, png]' --list crops.txt

  a packed set, on disk or at an URL: is every byte what was packed?
    python shards/check.py sets/market
    python shards/check.py s3://bucket/sets/market --json market.json

exit status: 0 all is well, 1 something is missing, damaged or differs from the published counts, 2 wrong usage
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        "shards/check.py",
        description="Count what a data set holds and say what is missing, or verify a packed set.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", metavar="SOURCE:PATH | SET", help="a source and the folder that it reads, or a set")
    parser.add_argument("settings", nargs="*", metavar="source.key=value", help="keys of the source")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; one a core by default")
    parser.add_argument("--quick", action="store_true", help="do not decode; of a packed set look at the sizes only")
    parser.add_argument("--list", type=Path, metavar="FILE", help="write everything damaged, lost or duplicate to FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE")
    return parser.parse_intermixed_args(arguments)


def configured(what: str, settings: list[str]) -> tuple[str, Section]:
    """SOURCE:PATH and `source.key=value` -> name and config of the source, as build.py would have it."""
    name, _, path = what.partition(":")
    for text in settings:
        if not text.startswith("source.") or "=" not in text:
            raise UserError(f"{text!r} is not of the form source.key=value")
    mapping = {"name": name} | ({"path": path} if path else {})
    recipe = f"shards/{name}.yaml" if recipe_path(f"shards/{name}.yaml").is_file() else "shards/folder.yaml"
    config = load(BuildConfig, recipe, [f"sources={json.dumps([mapping], ensure_ascii=False)}", *settings])
    return configure(config.sources, config.source)[0]


@contextmanager
def lines_to(path: Path | None) -> Iterator[Callable[[str], None]]:
    """A function that writes a line to the file, or nowhere."""
    if path is None:
        yield lambda line: None
        return
    try:
        file = path.open("w", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    with file:
        yield lambda line: print(line, file=file)


def check_source(options: argparse.Namespace, write: Callable[[str], None]) -> tuple[dict[str, Any], bool]:
    """Count a source and print the counts; gives them, and whether all is well."""
    name, config = configured(options.what, options.settings)
    published = getattr(sources.find(name), "published", lambda config: None)(config)
    expected = sum(images for images, _ in published.splits.values()) if published else None
    tally = inspection.inspect_source(
        name, config, options.workers, not options.quick, lambda sentence: write(f"damaged\t{sentence}"), expected
    )
    if options.list:
        for group in inspection.name_duplicates(name, config, tally):
            write("\t".join(["duplicate", *group]))
    print("\n".join(inspection.lines(tally)))
    print_some([f"  {sentence}" for sentence in tally.faults], tally.undecodable, options.list)
    told, deviations = {"source": name, **inspection.numbers(tally)}, []
    if published:
        counts = {split: (there.images, len(there.identities)) for split, there in tally.splits.items()}
        deviations = compare(counts, published)
        told |= {"title": published.title, "published": [deviation._asdict() for deviation in deviations]}
        print(f"{published.title} ({published.paper}):")
        print("\n".join(f"  {deviation.sentence}" for deviation in deviations))
    differs = any(each.found != each.expected for each in deviations)
    return told, tally.images > 0 and not tally.undecodable and not differs


def print_some(lines: list[str], total: int, listed: Path | None) -> None:
    """The first lines, and how many more there are."""
    print("\n".join(lines[:SHOWN]), end="\n" if lines else "")
    if total > SHOWN:
        print(f"  and {total - SHOWN:,} more: " + (f"all are in {listed}" if listed else "--list FILE writes all"))


def check_set(options: argparse.Namespace, write: Callable[[str], None]) -> tuple[dict[str, Any], bool]:
    """Verify a packed set and print the report; gives it, and whether all is well."""
    if options.settings:
        raise UserError(f"{options.settings[0]!r}: a packed set has no settings; they belong to SOURCE:PATH")
    if Path(options.what).is_dir() and not Path(options.what, MANIFEST).is_file():
        raise UserError(
            f"{options.what} is no packed set (it holds no {MANIFEST}); of raw images give the source too, "
            f"for example folder:{options.what}"
        )
    report = verification.verify_set(options.what, options.workers, options.quick)
    print("\n".join(verification.lines(report, SHOWN)))
    for line in verification.listed(report):
        write(line)
    told = verification.numbers(report)
    if report.fine:
        what = "sizes are as packed; the bytes were not read" if options.quick else "every byte is as packed"
        print(f"{what}: {told['samples']:,} samples in {len(report.tars):,} tars")
    else:
        print(f"{report.lost:,} of {told['samples']:,} samples are lost")
    return {"set": options.what, **told}, report.fine


def main(arguments: list[str]) -> int:
    """Check and print; the exit status."""
    options = parse(arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no valid text
    named = options.what.partition(":")[0] in sources.names() and not Path(options.what).is_dir()
    is_set = is_remote(options.what) or Path(options.what).is_dir() or not (named or ":" in options.what)
    try:
        with lines_to(options.list) as listing, lines_to(options.json) as result:
            told, fine = (check_set if is_set else check_source)(options, listing)
            result(json.dumps({**told, "fine": fine}, indent=1))
    except KeyboardInterrupt:
        return 130
    return 0 if fine else 1


if __name__ == "__main__":
    with plain_errors():
        sys.exit(main(sys.argv[1:]))
