"""One page about a run, or about several: everything from the files of their folders, in one file without a network.

What stands in it is made by the other page_*.py; here it is put in order and written down by templates/report.html.j2.
Text from files is escaped by jinja2, and the page forbids itself every address and every script but its own.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from finetune import curves, page_charts, page_pictures, page_recipe, page_strips, page_tables, page_words
from finetune.page_charts import Entry
from finetune.page_pictures import Album, Picture
from finetune.page_run import EVALUATION, FINETUNE, PRETRAINING, Run
from finetune.reporting import COLUMNS
from recipes.errors import UserError
from recipes.load import Section
from recipes.record import write_text

FOLDER = Path(__file__).parent / "templates"
NAME = "report.html"  # in the folder of a run
LETTERS = "ABCDEFGH"
MOST_RUNS = len(LETTERS)  # that a page compares: as many kinds of lines there are
Models = Mapping[str, type[Section]]  # the config of each kind of run, for the defaults of its keys


class SearchPart(NamedTuple):
    """What belongs to the numbers of one set."""

    title: str
    told: list[str]
    pictures: list[Picture]


class RecipePart(NamedTuple):
    """The recipe of a run, and where it ran."""

    title: str
    settings: list[page_recipe.Setting]
    changed: int
    facts: dict[str, str]
    launches: list[str]


def _title(entry: Entry) -> str:
    run, _, letter = entry
    return f"{letter} {run.name}".strip()


def _recipe(entry: Entry, models: Models) -> RecipePart:
    run = entry[0]
    settings = page_recipe.settings(run.recipe, models[run.kind]) if run.kind in models else []
    changed = sum(each.changed for each in settings)
    return RecipePart(
        _title(entry), settings, changed, page_recipe.facts(run.environment), page_recipe.launches(run.environment)
    )


def _differing(entries: Sequence[Entry]) -> list[tuple[str, list[Entry], list[page_recipe.Row]]]:
    """For each kind of run of which there are several: its name, the runs, and the keys that differ."""
    found = []
    for kind in (PRETRAINING, FINETUNE):
        own = [entry for entry in entries if entry[0].kind == kind]
        if len(own) > 1:
            found.append((kind, own, page_recipe.differing([run.recipe for run, _, _ in own])))
    return found


def _searches(entries: Sequence[Entry], album: Album) -> list[SearchPart]:
    """What belongs to each search; of a comparison without pictures, which the runs' own pages have."""
    found = []
    for entry in entries:
        for searched in entry[0].searched:
            pictures = page_pictures.of_search(searched, album) if len(entries) == 1 else []
            title = searched.result.name if len(entries) == 1 else f"{_title(entry)}: {searched.result.name}"
            found.append(SearchPart(title, page_tables.about(searched), pictures))
    return found


def _parts(entries: Sequence[Entry], models: Models, pictures: list[Path], album: Album) -> dict[str, Any]:
    """Everything that the template needs and that may leave a note."""
    runs, alone = [run for run, _, _ in entries], len(entries) == 1
    versus = [] if alone else page_tables.versus(entries)
    trained = [entry for entry in entries if entry[0].kind != EVALUATION]
    return {
        "results": page_tables.results(entries),
        "level": page_tables.level_told(entries),
        "versus": versus,
        "verdict": page_words.verdict(runs[0]) if alone else page_words.compared(entries, versus),
        "verdicts": [] if alone else [(entry, page_words.verdict(entry[0])) for entry in entries],
        "facts": page_words.key_facts(runs[0]) if alone else [],
        "events": [(_title(entry), page_words.events(entry[0])) for entry in entries if page_words.events(entry[0])],
        "lists": page_strips.all_lists(entries, album),
        "searches": _searches(entries, album),
        "teachers": page_pictures.of_teachers(runs[0], pictures, album) if alone else [],
        "groups": page_charts.groups(entries),
        "trained": trained,
        "recipes": [_recipe(entry, models) for entry in trained],
        "recipe_rows": _differing(trained),
        "environment_rows": page_recipe.differing_environments([run for run, _, _ in trained]),
        "data": [(_title(entry), page_recipe.data_sets(entry[0])) for entry in entries],
    }


def _sections(parts: Mapping[str, Any], notes: Sequence[str]) -> list[tuple[str, str]]:
    """Which sections the page has, in their order: id and heading."""
    every = [
        ("notes", "What is missing or damaged", notes),
        ("runs", "The runs", parts["verdicts"]),
        ("results", "Results", parts["results"]),
        ("lists", "Ranked lists", parts["lists"]),
        ("seen", "What the teacher sees", parts["teachers"]),
        ("curves", "Curves", parts["groups"]),
        ("events", "Events", parts["events"]),
        ("data", "Data", any(sets for _, sets in parts["data"])),
        ("recipe", "Recipe", parts["recipes"]),
        ("environment", "Where it ran", any(part.facts for part in parts["recipes"])),
    ]
    return [(name, title) for name, title, there in every if there]


def _source(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def page(runs: Sequence[Run], models: Models, pictures: Sequence[Path] = ()) -> str:
    """The page as HTML, at most about 5 MB; the same files give the same text.

    runs: 1 to MOST_RUNS of them; several are compared. models: the config of a pretraining and of a fine-tune by
    `Run.kind`. pictures: folders that pretrain/pictures.py wrote, for the page of one run; a UserError names one
    without pictures. What is missing or damaged in a run becomes a sentence of the page.
    """
    assert 0 < len(runs) <= MOST_RUNS
    alone = len(runs) == 1
    entries = [(run, place % curves.STYLES, "" if alone else LETTERS[place]) for place, run in enumerate(runs)]
    found: list[str] = []
    parts = _parts(entries, models, list(pictures), Album(found))
    told = [(run.name, note) for run in runs for note in run.notes] + [("", note) for note in found]
    notes = list(dict.fromkeys(note if alone or not name else f"{name}: {note}" for name, note in told))
    script = _source("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html.j2").render(
        **parts, entries=entries, alone=alone, notes=notes, sections=_sections(parts, notes), columns=COLUMNS,
        title=runs[0].name if alone else "Comparison of " + ", ".join(run.name for run in runs),
        kind=f"{runs[0].kind}, {runs[0].standing}" if alone else f"{len(runs)} runs", style=_source("report.css"),
        script=script, digest=digest, box=(curves.WIDTH, curves.HEIGHT),
        edges=(curves.LEFT, curves.TOP, curves.WIDTH - curves.RIGHT, curves.HEIGHT - curves.BOTTOM),
    )  # fmt: skip


def write(runs: Sequence[Run], models: Models, out: Path, pictures: Sequence[Path] = ()) -> None:
    """`page` as a file, whole or not at all, and where it is. UserError where it cannot be written."""
    text = page(runs, models, pictures)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, text)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from error
    print(f"{out} ({len(text.encode()) / 1e6:.1f} MB): open it in a browser")
