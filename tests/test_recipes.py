"""Every recipe that ships: it loads with the config that reads it, and its header says what one needs to know."""

import importlib
import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from recipes.load import dump, load, recipe_path

FOLDERS = {
    "shards": ("shards.assembly", "BuildConfig"),
    "pretrain": ("pretrain.config", "PretrainConfig"),
    "finetune": ("finetune.config", "FinetuneConfig"),
}
RECIPES = [path for folder in FOLDERS for path in sorted(recipe_path(folder).rglob("*.yaml"))]
LAUNCHES = sorted(recipe_path("accelerate").glob("*.yaml"))
# what a header has to say, and how it is found
HEADER = {
    "the paper or source": r"\b(paper|source)s?\b|\bet al\b",
    "the command": r"\bpython \w+/\w+\.py\b|\baccelerate launch\b|\bmake \w+",
    "the hardware": r"\bhardware\b",
    "the expected number": r"\bexpected\b",
    "when it was reproduced, or 'not reproduced yet'": r"\breproduced\b",
}
# packing counts files: the same everywhere, and a folder of one's own has no paper
NOT_FOR_SHARDS = {"the paper or source", "the hardware"}


def short(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def header(path: Path) -> str:
    """The comment lines that open a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "\n".join(lines[:end])


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_stage_ships_a_recipe(folder):
    assert any(path.parent.name == folder for path in RECIPES)


@pytest.mark.parametrize("path", RECIPES, ids=short)
def test_a_recipe_loads_and_comes_back(path, tmp_path):
    where, what = FOLDERS[path.relative_to(recipe_path("")).parts[0]]
    model = getattr(importlib.import_module(where), what)
    config = load(model, path)
    again = tmp_path / "resolved.yaml"
    again.write_text(dump(config))
    assert load(model, again) == config


@pytest.mark.parametrize("path", RECIPES, ids=short)
def test_a_recipe_opens_with_its_header(path):
    text, packs = header(path), path.parent.name == "shards"
    asked = {what: pattern for what, pattern in HEADER.items() if not (packs and what in NOT_FOR_SHARDS)}
    missing = [what for what, pattern in asked.items() if not re.search(pattern, text, re.IGNORECASE)]
    assert not missing, f"the header of {short(path)} does not name {missing}"


@pytest.mark.parametrize("path", RECIPES, ids=short)
def test_a_command_in_a_header_names_what_exists(path):
    for script in re.findall(r"\b(?:shards|pretrain|finetune)/\w+\.py\b", header(path)):
        assert (recipe_path("").parent / script).is_file()
    for recipe in re.findall(r"\brecipes/[\w/]+\.yaml\b", header(path)):
        assert (recipe_path("").parent / recipe).is_file()


@pytest.mark.parametrize("path", LAUNCHES, ids=short)
def test_an_accelerate_file_loads_and_shows_its_line(path):
    config = load_config_from_file(str(path))
    assert f"accelerate launch --config_file recipes/accelerate/{path.name}" in header(path)
    assert config.num_processes % config.num_machines == 0
    # more than one process only with the launcher that really starts them, see cpu2.yaml
    assert (config.num_processes > 1) == (config.distributed_type == "MULTI_GPU")
    assert config.mixed_precision == "no"  # precision belongs to the recipe


def test_the_accelerate_files_are_the_ones_that_the_readme_lists():
    assert [path.stem for path in LAUNCHES] == ["cpu", "cpu2", "gpu1", "gpu8", "nodes"]
