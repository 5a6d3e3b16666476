"""Reading recipes: what is refused, in which words, and that nothing changes on the way to disk and back."""

from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from recipes.errors import UserError, plain_errors
from recipes.load import Section, dump, load, recipe_path, validate


class MasksConfig(Section):
    ratio: float = Field(0.3, ge=0, le=1)
    shape: Literal["block", "rand"] = "block"


class OptimConfig(Section):
    lr: float = Field(5e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)


class RunConfig(Section):
    seed: int = Field(0, ge=0)
    folder: Path | None = None
    masks: MasksConfig = MasksConfig()
    optim: OptimConfig | None = None
    amp: bool = False


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def test_reads_sections_and_keeps_defaults(recipe):
    config = load(RunConfig, recipe("seed: 7\nmasks:\n  ratio: 0.5\n"))
    assert config == RunConfig(seed=7, masks=MasksConfig(ratio=0.5, shape="block"))


def test_an_empty_recipe_is_all_defaults(recipe):
    assert load(RunConfig, recipe("# nothing but a comment\n")) == RunConfig()


@pytest.mark.parametrize(
    "text, key, nearest",
    [
        ("sead: 1\n", "'sead'", "'seed'"),
        ("masks:\n  ratoi: 0.1\n", "'masks.ratoi'", "'ratio'"),
        ("optim:\n  learning: 1\n", "'optim.learning'", "'lr'"),  # through Optional
    ],
)
def test_an_unknown_key_names_the_nearest(recipe, text, key, nearest):
    path = recipe(text)
    with pytest.raises(UserError) as caught:
        load(RunConfig, path)
    message = str(caught.value)
    assert key in message
    assert nearest in message
    assert str(path) in message


def test_a_typo_is_told_before_the_key_that_is_missing_because_of_it(recipe):
    class Needs(Section):
        path: Path

    with pytest.raises(UserError, match=r"unknown key 'paht'.*'path'"):
        load(Needs, recipe("paht: /data\n"))
    with pytest.raises(UserError, match="key 'path' is missing"):
        load(Needs, recipe("{}\n"))


@pytest.mark.parametrize(
    "text, key",
    [
        ("masks: {ratio: 1.5}", "masks.ratio = 1.5"),
        ("masks: {shape: round}", "masks.shape = 'round'"),
        ("seed: -1", "seed = -1"),
        ("seed: two", "seed = 'two'"),
        ("seed: 1.5", "seed = 1.5"),
        ("optim: {lr: 0}", "optim.lr = 0"),
        ("optim: {betas: [0.9]}", "optim.betas"),
    ],
)
def test_values_out_of_range_are_refused_by_name(recipe, text, key):
    with pytest.raises(UserError) as caught:
        load(RunConfig, recipe(text))
    assert key in str(caught.value)


@pytest.mark.parametrize(
    "text, value", [("1e-6", 1e-6), ("5E-4", 5e-4), ("1.e-3", 1e-3), (".5", 0.5), ("2e3", 2000.0), ("1", 1.0)]
)
def test_numbers_are_numbers(recipe, text, value):
    # plain YAML 1.1 reads 1e-6 as text
    got = load(RunConfig, recipe(f"optim:\n  lr: {text}\n")).optim.lr
    assert isinstance(got, float)
    assert got == value


@pytest.mark.parametrize("word", ["on", "yes", "no", "off"])
def test_only_true_and_false_are_booleans(word):
    assert yaml.safe_load(word) in (True, False)  # what YAML 1.1 makes of it

    class Named(Section):
        name: str

    assert validate(Named, {"name": word}, "here").name == word


def test_overrides_reach_into_sections(recipe):
    path = recipe("seed: 1\nmasks:\n  shape: rand\n")
    config = load(RunConfig, path, ["masks.ratio=0.1", "optim.lr=1e-6", "seed=3", "amp=true", "optim.betas=[0.8, 0.9]"])
    assert config.seed == 3
    assert config.masks == MasksConfig(ratio=0.1, shape="rand")
    assert config.optim == OptimConfig(lr=1e-6, betas=(0.8, 0.9))
    assert config.amp is True


@pytest.mark.parametrize(
    "override, words",
    [
        ("seed", "section.key=value"),
        ("=3", "section.key=value"),
        ("seed.x=3", "'seed' is a value, not a section"),
        ("masks.ratoi=1", "'ratio'"),
        ("masks.ratio=9", "masks.ratio = 9"),
        ("seed=[1", "not valid YAML"),
    ],
)
def test_wrong_overrides_are_refused(recipe, override, words):
    with pytest.raises(UserError) as caught:
        load(RunConfig, recipe("seed: 1\n"), [override])
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "just words", "seed: [1\n"])
def test_what_is_no_recipe_is_refused_with_its_name(recipe, text):
    path = recipe(text)
    with pytest.raises(UserError, match=path.name):
        load(RunConfig, path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml does not exist"):
        load(RunConfig, tmp_path / "nowhere.yaml")


def test_a_shipped_recipe_is_found_from_any_folder(tmp_path, monkeypatch):
    class Launch(Section):
        model_config = Section.model_config | {"extra": "ignore"}
        num_processes: int

    monkeypatch.chdir(tmp_path)
    assert recipe_path("accelerate/cpu.yaml").is_file()
    assert load(Launch, "recipes/accelerate/cpu.yaml").num_processes == 1
    assert load(Launch, "accelerate/cpu.yaml").num_processes == 1


def test_configs_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().seed = 3


@given(
    seed=st.integers(0, 2**63),
    ratio=st.floats(0, 1),
    lr=st.floats(0, 1e300, exclude_min=True),
    betas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    folder=st.none() | st.sampled_from([Path("data/market 1501"), Path("on"), Path("null"), Path("17")]),
)
def test_dump_and_load_give_the_same_config(tmp_path_factory, seed, ratio, lr, betas, folder):
    config = RunConfig(seed=seed, folder=folder, masks=MasksConfig(ratio=ratio), optim=OptimConfig(lr=lr, betas=betas))
    path = tmp_path_factory.mktemp("round") / "recipe.yaml"
    path.write_text(dump(config))
    assert load(RunConfig, path) == config


def test_text_that_looks_like_a_number_stays_text(recipe):
    config = RunConfig(folder=Path("1e-6"))  # a run may be called like this
    assert load(RunConfig, recipe(dump(config))) == config


def test_dump_holds_every_key():
    assert yaml.safe_load(dump(RunConfig()))["masks"] == {"ratio": 0.3, "shape": "block"}


def test_plain_errors_prints_one_sentence_and_exits_2(capsys):
    with pytest.raises(SystemExit) as caught, plain_errors():
        raise UserError("the key is wrong")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: the key is wrong\n"
    with pytest.raises(ZeroDivisionError), plain_errors():  # our own faults keep their traceback
        _ = 1 / 0
