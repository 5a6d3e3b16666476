"""The page of runs: what stands in it, of whole, damaged, hostile and endless runs."""

import csv
import itertools
import json
import os
import re
import shutil
import time
from html.parser import HTMLParser

import pytest
import report_runs
import small

from finetune.config import FinetuneConfig
from finetune.page import page
from finetune.page_run import FINETUNE, PRETRAINING, open_run
from pretrain.config import PretrainConfig
from recipes import locks
from recipes.errors import UserError

MODELS = {PRETRAINING: PretrainConfig, FINETUNE: FinetuneConfig}
SCRIPT = str(small.ROOT / "finetune" / "report.py")
VOID = {"meta", "img", "link", "br", "path", "circle", "input", "hr"}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


class Reader(HTMLParser):
    """The elements of a page, its text, and whether it is well nested."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.found, self.texts = [], [], []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def read(*folders, pictures=()) -> Reader:
    return Reader(page([open_run(folder) for folder in folders], MODELS, pictures))


def headings(found: Reader) -> list[str]:
    return [attributes["id"] for attributes in found.of("section")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return report_runs.made(tmp_path_factory.getbasetemp())


@pytest.fixture
def copied(runs, tmp_path):
    """A copy of one of the runs, to be changed."""

    def copy(name: str):
        return shutil.copytree(getattr(runs, name), tmp_path / name, ignore=shutil.ignore_patterns("tensorboard"))

    return copy


def test_a_pretraining(runs):
    found = read(runs.pretraining)
    assert headings(found) == ["seen", "curves", "data", "recipe", "environment"]
    lines = small.metrics(runs.pretraining)
    first, last = (f"{line['loss']:.4g}" for line in (lines[0], lines[-1]))
    assert found.text.startswith("pretraining Skip to the numbers pretraining, finished pretraining 2 epochs.")
    assert f"The loss went from {first} to {last}. No alarm rang." in found.text
    assert "After epoch 2" in found.text
    assert "To compare: after epoch 1" in found.text
    for title in ("Terms of the loss", "Prototypes in use", "Learning rate", "Throughput", "Waiting for data"):
        assert title in found.text
    assert "ln K = 4.16" in found.text, "of 64 prototypes"
    assert "heads.hidden_dim 32 2048" in found.text, "what was changed stands beside its default"
    assert "unlabeled: 128 images" in found.text


def test_a_finetune(runs):
    found, told = read(runs.tuned), small.json_of(runs.tuned / "results.json")
    assert headings(found) == ["results", "lists", "curves", "data", "recipe", "environment"]
    for numbers in (told, told["reranked"]):
        for key in ("mAP", "rank1", "mINP"):
            low, high = numbers["intervals"][key]
            assert f"{100 * numbers[key]:.1f} {100 * low:.1f} to {100 * high:.1f}" in found.text
    assert "re-ranked (k1 5, k2 2, lam 0.3)" in found.text
    assert f"of {told['valid']} queries" in found.text
    for title in ("Best queries", "Median queries", "Worst queries", "Distances of pairs", "Terms of the loss"):
        assert title in found.text
    ap = [value for value in told["average_precision"] if value is not None]
    assert f"average precision {max(ap):.3f}" in found.text
    assert f"average precision {min(ap):.3f}" in found.text
    answers = [image["alt"] for image in found.of("img") if image["alt"].startswith("Answer 1:")]
    assert len(answers) == 9


def test_the_lists_are_those_of_the_search(runs):
    """The mark of each first answer is what queries.csv tells, which metrics.py found by counting."""
    found = read(runs.tuned)
    with open(runs.tuned / "queries.csv", newline="") as file:
        first_rank = {row["key"]: int(row["first_rank"]) for row in csv.DictReader(file)}
    alts = [image["alt"] for image in found.of("img")]
    asked = [i for i, alt in enumerate(alts) if alt.startswith("Query ")]
    assert len(asked) == 9
    for i in asked:
        key, rank = alts[i].split()[1].rstrip(","), first_rank[alts[i].split()[1].rstrip(",")]
        marks = [alt.split()[2] for alt in alts[i + 1 : i + 11]]
        assert marks == ["wrong,"] * min(rank - 1, 10) + marks[min(rank - 1, 10) :], key
        assert rank > 10 or marks[rank - 1] == "right,", key


def test_an_evaluation(runs):
    found = read(runs.evaluation)
    assert headings(found) == ["results", "lists", "data"]
    assert "evaluation, finished" in found.text


def test_a_comparison(runs):
    found = read(runs.tuned, runs.scratch, runs.evaluation, runs.pretraining)
    assert headings(found) == ["runs", "results", "lists", "curves", "data", "recipe", "environment"]
    maps = {name: small.json_of(getattr(runs, name) / "results.json")["mAP"]
            for name in ("tuned", "scratch", "evaluation")}  # fmt: skip
    best = max(maps, key=maps.get)
    letter = {"tuned": "A", "scratch": "B", "evaluation": "C"}[best]
    assert f"{letter} {best} is best, by " in found.text
    assert "Where they differ most" in found.text
    rows = re.search(r"Keys of the recipes of the fine-tunes that differ (.*?) A tuned: the whole", found.text)[1]
    assert "rerank.k1 5 0" in rows
    assert "validation.identities 0 4" in rows
    assert "seed" not in rows
    labels = [svg["aria-label"] for svg in found.of("svg") if "aria-label" in svg]
    both = [label for label in labels if "A tuned:" in label and "B scratch:" in label]
    assert any(label.startswith("Loss.") for label in both), "the two curves lie over each other"


def test_everything_is_inside_and_described(runs):
    for folders in ([runs.pretraining], [runs.tuned], [runs.tuned, runs.scratch]):
        found = read(*folders)
        assert all(image["src"].startswith("data:image/webp;base64,") and image["alt"] for image in found.of("img"))
        assert all(link["href"].startswith("#") for link in found.of("a"))
        ids = [attributes["id"] for _, attributes in found.found if "id" in attributes]
        assert len(ids) == len(set(ids))
        assert {link["href"][1:] for link in found.of("a")} <= set(ids)
        assert not found.of("link")
        assert all("src" not in script for script in found.of("script"))
        levels = [int(tag[1]) for tag, _ in found.found if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), levels


def test_equal_runs_give_equal_pages(runs):
    assert page([open_run(runs.tuned)], MODELS) == page([open_run(runs.tuned)], MODELS)


def test_a_run_under_way_and_one_that_was_killed(copied):
    run = copied("pretraining")
    shutil.rmtree(run / "teacher")
    assert "This run has not come to its end: it was killed, or failed at step 15." in read(run).text
    (run / "stopped.json").write_text('{"step": 9, "lost": ""}')
    assert "This run was stopped at step 9. The same command goes on from there." in read(run).text
    lock = locks.take(run / ".lock", os.O_RDWR | os.O_CREAT)
    assert "This run is under way" in read(run).text
    locks.release(lock)


def test_what_is_missing_is_told(copied, tmp_path):
    run = copied("tuned")
    shutil.rmtree(run / "embeddings")
    found = read(run)
    assert "The lists cannot be drawn anew" in found.text
    assert "Ranked lists of" in "".join(image["alt"] for image in found.of("img")), "strips.png is in their place"
    for path in run.glob("*.png"):
        path.unlink()
    assert "The lists cannot be drawn anew" in read(run).text
    (run / "results.json").unlink()
    assert "results" not in headings(read(run))
    with pytest.raises(UserError, match="holds neither recipe\\.yaml nor"):
        open_run(tmp_path)


@pytest.mark.parametrize("name", ["results.json", "environment.json", "metrics.jsonl", "recipe.yaml", "strips.png"])
@pytest.mark.parametrize(
    "content", [b"{", b"\xff\xfe\x00", b"[" * 10000, b'["a"]'], ids=["cut", "bytes", "deep", "list"]
)
def test_a_damaged_file_is_a_sentence(copied, name, content):
    run = copied("tuned")
    (run / name).write_bytes(content + b"\n")
    shutil.rmtree(run / "embeddings")
    found = read(run)
    assert headings(found)[0] == "notes"
    assert ("The recipe cannot be read" if name == "recipe.yaml" else name) in found.text


@pytest.mark.parametrize("name", ["environment.json", "metrics.jsonl", "validation.json"])
def test_another_content_is_no_crash(copied, name):
    run = copied("scratch")
    (run / name).write_text('{"epochs": "x", "mAP": "x", "loss": [], "versions": 3, "earlier": [1], "started": {}}\n')
    read(run)


def test_a_recipe_of_something_else(copied):
    run = copied("tuned")
    (run / "recipe.yaml").write_text("a: 1\n")
    with pytest.raises(UserError, match="no recipe of a pretraining and none of a fine-tune"):
        open_run(run)


def test_text_of_files_is_only_text(copied):
    run = copied("tuned")
    told = small.json_of(run / "results.json")
    told |= {"data": [HOSTILE], "title": HOSTILE, "not_measured": [HOSTILE], "shards": HOSTILE, "version": HOSTILE}
    (run / "results.json").write_text(json.dumps(told))
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 99, "epoch": 1, "loss": 1.0, HOSTILE: 2.0, "alarms": [HOSTILE]}) + "\n")
    environment = small.json_of(run / "environment.json")
    (run / "environment.json").write_text(json.dumps(environment | {HOSTILE: HOSTILE, "command": [HOSTILE]}))
    with open(run / "recipe.yaml", "a") as file:
        file.write(f"? {json.dumps(HOSTILE)}\n: {json.dumps(HOSTILE)}\n")
    found = read(run)
    assert len(found.of("script")) == 1
    assert not any("onerror" in attributes for _, attributes in found.found)
    assert found.text.count("<script>alert(1)</script>") > 5


def test_a_long_run_is_thinned_and_no_spike_is_lost(copied):
    run = copied("pretraining")
    names = [f"value_{i}" for i in range(20)]
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(100_000):
            values = dict.fromkeys(names, 500.0 if step == 54_321 else 1 + step % 7)
            file.write(
                json.dumps({"step": step, "samples": 16 * step, "loss": 3.0, "images_per_s": 9.0, **values}) + "\n"
            )
    start = time.monotonic()
    text = page([open_run(run)], MODELS)
    assert time.monotonic() - start < 30
    assert len(text) < 5_000_000
    assert "largest 500" in text


def test_pictures_of_another_folder(runs, tmp_path):
    epoch = sorted((runs.pretraining / "pictures").iterdir())[0]
    assert read(runs.tuned, pictures=[epoch]).text.count("Where the class token looks") == 1
    with pytest.raises(UserError, match="holds none of attention"):
        read(runs.tuned, pictures=[tmp_path])


def test_the_command(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "pages" / "one.html"
    assert small.run([SCRIPT, str(runs.tuned), "--out", str(out)]) == 0
    assert "one.html (0." in capsys.readouterr().out
    assert out.read_text() == page([open_run(runs.tuned)], MODELS)
    assert out.read_text() == (runs.tuned / "report.html").read_text(), "which the training wrote at its end"
    assert small.run([SCRIPT, str(runs.tuned), str(runs.scratch)]) == 0
    assert (tmp_path / "compare.html").exists()


@pytest.mark.parametrize(("words", "told"), [
    (["--out", "x.txt"], "must end in .html"),
    (["--out", "folder.html"], "is a folder"),
    (["RUN"] * 8, "are too many for one page"),
    (["RUN", "--pictures", "x"], "belongs to the page of one run"),
    (["nowhere"], "is no folder"),
])  # fmt: skip
def test_what_it_refuses(runs, tmp_path, capsys, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.html").mkdir()
    words = [str(runs.tuned) if word == "RUN" else word for word in words]
    assert small.run([SCRIPT, str(runs.tuned), *words]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.glob("*.tmp"))
