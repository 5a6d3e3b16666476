"""What a run was told and where it ran: its recipe with what differs from the defaults, its data, its environment."""

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from finetune.page_run import PRETRAINING, Run
from recipes.errors import UserError
from recipes.load import Section
from shards.manifests import read_manifest
from shards.remote import is_remote
from shards.unpacked import is_source

LONGEST = 300  # characters of a value that are shown
MISSING = object()
# of environment.json, in this order; the others follow as they are
NAMES = {"started": "started", "command": "command", "commit": "commit", "processes": "processes", "device": "device",
         "devices": "devices", "python": "Python", "platform": "system", "cpus": "CPUs"}  # fmt: skip


class Setting(NamedTuple):
    """A key of a recipe."""

    key: str
    value: str
    default: str | None  # None: the value is the default, or there is none
    changed: bool


class Row(NamedTuple):
    """A line of a table: what it is, and a value for each run."""

    name: str
    values: list[str]


class DataSet(NamedTuple):
    """A set that a run used."""

    name: str
    path: str
    use: str
    content: str
    version: str = ""


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists are leaves."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, inner in tree.items():
        found |= leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def defaults(model: type[Section]) -> dict[str, Any]:
    """The default of every key that has one, by its dotted name and as a recipe writes it."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if not field.is_required():
            value = TypeAdapter(field.annotation).dump_python(field.get_default(call_default_factory=True), mode="json")
            found |= leaves(value, name)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found |= {f"{name}.{key}": value for key, value in defaults(field.annotation).items()}
    return found


def shown(value: Any) -> str:
    """A value as a recipe has it."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def settings(recipe: Mapping[str, Any], model: type[Section]) -> list[Setting]:
    """Every key of the resolved recipe; a key without a default counts as changed."""
    known = defaults(model)
    found = []
    for key, value in leaves(dict(recipe)).items() if recipe else ():
        default = known.get(key, MISSING)
        same = default is not MISSING and shown(default) == shown(value)
        found.append(Setting(key, shown(value), None if same or default is MISSING else shown(default), not same))
    return found


def differing(trees: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The keys whose values are not the same in all trees."""
    flat = [leaves(dict(tree)) if tree else {} for tree in trees]
    rows = []
    for key in dict.fromkeys(key for each in flat for key in each):
        values = ["not there" if key not in each else shown(each[key]) for each in flat]
        if len(set(values)) > 1:
            rows.append(Row(key, values))
    return rows


def _versions(environment: Mapping[str, Any]) -> dict[str, str]:
    found = environment.get("versions")
    return {str(key): shown(value) for key, value in found.items()} if isinstance(found, dict) else {}


def facts(environment: Mapping[str, Any]) -> dict[str, str]:
    """The environment of the newest launch, as name -> text."""
    found = {}
    for key in [*NAMES, *(key for key in environment if key not in NAMES)]:
        value = environment.get(key)
        if value is None or key in ("versions", "earlier", "uncommitted_changes"):
            continue
        if key == "command" and isinstance(value, list):
            value = "python " + shlex.join(map(str, value))
        if key == "commit" and environment.get("uncommitted_changes"):
            value = f"{value}, with uncommitted changes"
        found[NAMES.get(key, key)] = shown(value)
    versions = _versions(environment)
    return found | ({"versions": ", ".join(" ".join(pair) for pair in versions.items())} if versions else {})


def launches(environment: Mapping[str, Any]) -> list[str]:
    """When the run was started, and continued: one text a launch, oldest first."""
    earlier = environment.get("earlier")
    every = [*(earlier if isinstance(earlier, list) else []), environment]
    every = [each for each in every if isinstance(each, dict) and each.get("started")]
    commits = [str(each.get("commit") or "no commit")[:12] for each in every]
    return [f"{shown(each['started'])} ({commit})" for each, commit in zip(every, commits, strict=True)]


def differing_environments(runs: Sequence[Run]) -> list[Row]:
    """What is not the same in the environments, the moment and the command aside."""
    trees = []
    for run in runs:
        plain = {key: value for key, value in facts(run.environment).items() if key not in ("started", "command")}
        plain.pop("versions", None)
        trees.append({**plain, **_versions(run.environment)})
    return differing(trees)


def _listed(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [each for each in values if isinstance(each, str)]


def _trained_on(path: str, use: str, splits: Sequence[str]) -> DataSet:
    """What the manifest of a training set tells, if it is at hand; nothing is fetched and nothing is counted anew."""
    if is_remote(path):
        return DataSet(path, path, use, "a remote set, not looked at for this page")
    if is_source(path):
        return DataSet(path, path, use, "a data set in its own layout, not counted for this page")
    try:
        manifest = read_manifest(path)
    except (UserError, OSError) as error:
        return DataSet(path, path, use, f"not at hand now: {error}")
    parts = []
    for name, split in manifest.splits.items():
        if name in splits:
            people = f", {split.identities:,} identities" if split.identities else ""
            cameras = f", {split.cameras:,} cameras" if split.cameras else ""
            parts.append(f"{name}: {split.images:,} images{people}{cameras}")
    titles = Counter(str(source.get("title", source.get("name", path))) for source in manifest.sources)
    title = " + ".join(name if count == 1 else f"{count} of {name}" for name, count in titles.items())
    return DataSet(title, path, use, "; ".join(parts) or "none of its splits", str(manifest.packing["plan"])[:12])


def data_sets(run: Run) -> list[DataSet]:
    """The sets that the run trained on, and those that were searched."""
    found = []
    if run.kind == PRETRAINING:
        splits = _listed(run.key("loader.splits", ["unlabeled", "train"]))
        found = [_trained_on(path, "trained on", splits) for path in _listed(run.key("loader.shards"))]
        if run.key("loader.keep"):
            kept = f"; only what the list {shown(run.key('loader.keep'))} keeps"
            found = [each._replace(content=each.content + kept) for each in found]
    elif run.recipe:
        splits = ["train", "unlabeled"] if run.key("identities.labels") == "none" else ["train"]
        found = [_trained_on(path, "trained on", splits) for path in _listed(run.key("benchmark.shards"))]
    for searched in run.searched:
        result = searched.result
        parts = []
        for name, split in result.splits.items():
            rest = "".join(f", {count:,} {word}" for count, word in ((split.distractors, "distractors"),
                                                                     (split.junk, "junk images")) if count)  # fmt: skip
            parts.append(f"{name}: {split.images:,} images, {split.identities:,} identities, "
                         f"{split.cameras:,} cameras{rest}")  # fmt: skip
        found.append(DataSet(result.name, result.shards, "searched", "; ".join(parts), result.version))
    return found
