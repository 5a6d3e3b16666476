"""Text search: losses, keys, pairs, export; whole runs of finetune/run.py and finetune/eval.py on drawn captions."""

import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F

from finetune import backbones, models
from finetune.augment import AugmentConfig
from finetune.backbones import BackboneConfig
from finetune.config import FinetuneConfig
from finetune.cross_modal_losses import alignment, info_nce
from finetune.identities import Identities
from finetune.methods import build, reads_captions
from finetune.methods.base import ImageBatch, Parts
from finetune.optim import OptimConfig, build_optimizer
from finetune.sampling import SamplingConfig
from finetune.text_benchmark import ReadsText, scorer
from finetune.validation import retrieve
from recipes.errors import UserError
from recipes.load import load, recipe_path

SIZE, CLASSES = (64, 32), 3
TINY = {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
CAPTIONS = [("a red coat", "red coat and bag"), ("a red coat with a bag",), ("blue jeans",), ("a man in blue jeans",),
            ("the green dress",), ("green shoes, green dress",)]  # fmt: skip
SMALL = {"dim": 16, "word_table": {"dim": 8}, "text_encoder": {"hidden": 6}, "queues": {"size": 10}}
ROWS = Identities(np.arange(6), np.array([0, 0, 1, 1, 2, 2]), np.array([4, 5, 6]), 0, 0)


def method(section: dict | None = None, **backbone):
    """Text search on a small ViT, or on what `backbone` names, with the six captioned images of three people."""
    torch.manual_seed(0)
    made = backbones.build(backbones.arguments_of(BackboneConfig(**(backbone or TINY)), SIZE), 0.0)
    sampling = SamplingConfig(identities_per_batch=3, images_per_identity=2)
    given = {"name": "text_search", **SMALL, **(section or {})}
    return build(given, Parts(made, CLASSES, 0, sampling, 0, lambda: CAPTIONS))


def batch(model, seed: int = 1) -> ImageBatch:
    """The pairs of the first epoch with random images."""
    plan = model.epoch(0, ROWS, None)
    images = torch.randn(6, 3, *SIZE, generator=torch.Generator().manual_seed(seed))
    labels = torch.from_numpy(plan.labels[plan.batches[0]])
    return ImageBatch(images, labels, torch.rand(6, model.draws), labels * 0 - 2, torch.from_numpy(plan.words[0]))


@pytest.mark.parametrize(
    ("section", "losses"),
    [
        ({}, {"nce", "alignment", "identity"}),
        ({"cross_modal_losses": {"nce_weight": 0}}, {"alignment", "identity"}),
        ({"cross_modal_losses": {"nce_weight": 0, "alignment_weight": 0, "sdm_weight": 1}}, {"sdm", "identity"}),
        ({"word_table": {"kind": "trainable", "dim": 8}, "mean_beside": True}, {"nce", "alignment", "identity"}),
        ({"momentum_encoders": {"projection": True}, "necks": {"pooling": "avg"}}, {"nce", "alignment", "identity"}),
    ],
    ids=["paper", "without queues", "sdm", "trainable words", "momentum projection"],
)
def test_losses_reach_every_weight_and_features_have_length_one(section, losses):
    model = method(section).train()
    found = model(batch(model))
    assert found.keys() == losses
    sum(found.values()).backward()
    idle = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    # of a ViT without CLS in the feature the last norm still sees it
    assert not idle
    assert model.table.vectors.requires_grad == (section.get("word_table", {}).get("kind") == "trainable")
    model.end_step()
    assert model.apart().keys() == ({"queues", "momentum_encoders"} if "nce" in losses else set())
    model.eval()
    with torch.no_grad():
        images, texts = model.embed(batch(model).images), model.embed_words(batch(model).words)
    assert images.shape == texts.shape == (6, 16)
    for features in (images, texts):
        torch.testing.assert_close(features.norm(dim=1), torch.ones(6))


@pytest.mark.parametrize("name", ["resnet10t", "clip_resnet50"])
def test_other_image_encoders_train(name):
    more = {"width": 64} if name == "clip_resnet50" else {}
    model = method(None, name=name, drop_path=0.0, **({} if more else {"last_stride": 1})).train()
    sum(model(batch(model)).values()).backward()
    assert not [key for key, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]


def test_losses_of_a_step_are_those_of_its_parts():
    model = method().train()
    model.apart()
    with torch.no_grad():  # encoders that differ from their copies
        for weight in model.backbone.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    given, copies = batch(model), model.keys.copies
    before = {name: value.clone() for name, value in copies.named_parameters()}
    queue = model.queues.images.clone(), model.queues.texts.clone()
    losses = model(given)
    own = dict(model.named_parameters())
    for name, value in copies.named_parameters():  # they moved, and before the keys were made
        torch.testing.assert_close(value, 0.999 * before[name] + 0.001 * own[name])
    with torch.no_grad():
        v, t = model.embed(given.images), model.embed_words(given.words)
        keys = model.image_projection(copies["pooling"](copies["backbone"](given.images)))
        texts = model.text_projection(copies["text_encoder"](model.table(given.words), given.words))
        keys, texts = F.normalize(keys, dim=1), F.normalize(texts, dim=1)
        everybody = torch.ones(10, dtype=torch.bool)
        wanted = info_nce(v, texts, queue[1], everybody, 0.07) + info_nce(t, keys, queue[0], everybody, 0.07)
    torch.testing.assert_close(losses["nce"].detach(), wanted)
    torch.testing.assert_close(
        losses["alignment"].detach(), alignment(v, t, given.labels, model.config.cross_modal_losses)
    )
    assert torch.equal(model.queues.images, queue[0]), "the keys come in after the step"
    model.end_step()
    torch.testing.assert_close(model.queues.images[:6], keys)
    torch.testing.assert_close(model.queues.texts[:6], texts)
    assert model.queues.ids[:6].tolist() == given.labels.tolist()


def test_sentences_go_with_their_images():
    model = method()
    seen = set()
    for epoch in range(8):
        plan = model.epoch(epoch, ROWS, None)
        assert plan.batches.shape == (1, 6)
        for position, numbers in zip(plan.batches[0], plan.words[0], strict=True):
            text = " ".join(model.vocabulary.words[number - 1] for number in numbers if number)
            known = [" ".join(caption.replace(",", "").split()) for caption in CAPTIONS[position]]
            assert text in known
            seen.add(text)
    assert len(seen) == 7, "every caption has its turn"
    np.testing.assert_array_equal(model.epoch(3, ROWS, None).words, model.epoch(3, ROWS, None).words)
    assert model.epoch(0, ROWS, None).notes == ("7 captions, 14 words in the table",)


def test_words_that_the_table_has_not_are_told(tmp_path):
    (tmp_path / "words.txt").write_text("red\ncoat\nblue\nshoes\n")
    np.save(tmp_path / "words.npy", np.eye(4, dtype=np.float32))
    given = {"kind": "npy", "file": str(tmp_path / "words.npy"), "words": str(tmp_path / "words.txt")}
    model = method({"word_table": given})
    (told,) = model.epoch(0, ROWS, None).notes
    assert "6 captions, 4 words in the table; not in it and left out: a, " in told
    assert told.endswith("; 1 captions had no known word")


def test_a_model_comes_back_with_its_words_and_without_its_files(tmp_path):
    model = method({"word_table": {"kind": "random", "dim": 8, "seed": 5}}).eval()
    section = {"name": "text_search", **SMALL, "word_table": {"kind": "clip", "file": "gone", "merges": "gone"}}
    models.save(tmp_path / "model", model, section, AugmentConfig(height=64, width=32), {"classes": 3, "cameras": 0})
    again, _ = models.load_stored(str(tmp_path / "model"))
    assert isinstance(again, ReadsText)
    ours, theirs = (each.eval().embed_sentences(["a red coat", "green coats and jeans"]) for each in (model, again))
    np.testing.assert_array_equal(ours[0], theirs[0])
    assert ours[1] == theirs[1] == ("coats",)
    with pytest.raises(UserError, match="no word that this model knows"):
        again.embed_sentences(["violet umbrella"])
    with pytest.raises(UserError, match="leave it away in a recipe"):
        again.epoch(0, ROWS, None)


def test_a_stored_lexicon_that_makes_no_sense_is_refused():
    for wrong in ({"words": ["a", "a"], "dim": 8}, {"words": ["a"], "dim": 0}, {"words": "a"}):
        with pytest.raises(UserError, match="lexicon"):
            method({"lexicon": wrong})


def test_biases_have_twice_the_rate_and_no_decay():
    config = OptimConfig(kind="adam", lr=1e-4, bias_lr_factor=2.0, weight_decay=4e-5, bias_weight_decay=0.0)
    weights, biases = build_optimizer(method(), config).param_groups
    assert (weights["weight_decay"], biases["weight_decay"]) == (4e-5, 0.0)
    assert (weights["bias_factor"], biases["bias_factor"]) == (1.0, 2.0)
    plain = build_optimizer(method(), OptimConfig(weight_decay=4e-5)).param_groups
    assert [group["weight_decay"] for group in plain] == [4e-5, 4e-5]


def test_only_text_search_reads_captions():
    assert reads_captions({"name": "text_search"})
    assert not reads_captions({"name": "bot"})
    assert scorer(torch.nn.Linear(1, 1)) is retrieve
    assert scorer(method()) is not retrieve


PUBLISHED = {path.stem: path for path in sorted(recipe_path("finetune").glob("text_search_*.yaml"))}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_published_settings(name):
    config = load(FinetuneConfig, PUBLISHED[name])
    assert config.method["name"] == "text_search"
    assert config.benchmark.protocol.same_camera == "keep", "these sets have no cameras"
    assert (config.optim.bias_lr_factor, config.optim.bias_weight_decay) == (2.0, 0.0)
    if name.endswith(("_cpu", "_figures", "_figures_sdm")):
        return
    assert (config.sampling.identities_per_batch, config.sampling.images_per_identity) == (32, 4)
    optim, augment = config.optim, config.augment
    assert (optim.kind, optim.lr, optim.weight_decay, optim.epochs) == ("adam", 1e-4, 4e-5, 80)
    assert (optim.warmup_epochs, optim.warmup_factor, optim.schedule, optim.steps) == (5, 0.1, "steps", (40, 70))
    assert (augment.height, augment.width, augment.erase, augment.erase_area) == (384, 128, 0.5, (0.02, 0.4))
    section = config.method
    assert section["dim"] == 256
    assert section["queues"] == {"size": 2048}
    assert section["momentum_encoders"] == {"momentum": 0.999, "projection": False}
    assert section["text_encoder"] == {"hidden": 512, "padding": "masked"}
    assert section["cross_modal"] == {"k": 5, "alpha": 0.05}


CAPTIONED = {"role": "reid", "identities": 48, "train_identities": 32, "images_per_identity": 6, "similar": 0.0,
             "camera_strength": 0.0, "variation": 0.3, "backdrop": 0.0}  # fmt: skip
QUICK = ["method.dim=32", "method.word_table={kind: random, dim: 32}", "method.text_encoder={hidden: 32}",
         "method.queues={size: 128}", "optim.epochs=2", "benchmark.draw=null", "log_every=1",
         "sampling.identities_per_batch=8", *small.VIT]  # fmt: skip


def command(out, data, *more: str) -> list[str]:
    """finetune/run.py with the recipe of the figures, made small."""
    recipe = ["--recipe", "recipes/finetune/text_search_figures.yaml", "--out", str(out), "--ckpt", "none"]
    return [str(small.ROOT / "finetune/run.py"), *recipe, f"benchmark.shards={data}", *QUICK, *more]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    return small.drawn(tmp_path_factory.mktemp("captioned"), CAPTIONED)


@pytest.fixture(scope="module")
def run(tmp_path_factory, captioned):
    """Two epochs, with eight identities held out."""
    out = tmp_path_factory.mktemp("run") / "run"
    assert small.run(command(out, captioned, "validation={identities: 8, every_epochs: 1}")) == 0
    return out


def test_a_run_searches_both_ways_and_chooses_its_epoch_on_held_out_people(run):
    told, curve = small.json_of(run / "results.json"), small.json_of(run / "validation.json")
    assert told["images"] == told["captions"] == told["splits"]["gallery"]["images"]
    for way in ("t2i", "i2t"):
        assert told[way]["valid"] == told["captions"]
        assert 0 < told[way]["mAP"] <= 1
        assert told[way]["rank1"] <= told[way]["rank5"] <= told[way]["rank10"]
    assert told["mAP"] == told["t2i"]["mAP"], "what the pages show"
    assert [row["epoch"] for row in curve["epochs"]] == [1, 2]
    assert (curve["identities"], curve["epochs"][0]["valid"]) == (8, 8 * 6), "each caption of the held-out is a query"
    assert "text to image" in (run / "table.md").read_text()
    model = small.json_of(run / "model" / "config.json")
    assert model["method"]["lexicon"]["dim"] == 32
    assert "coat" in model["method"]["lexicon"]["words"]


def test_a_run_that_is_taken_up_again_ends_with_the_same_weights(captioned, tmp_path):
    state = {}
    for name, epochs in (("whole", ["resume.every_epochs=1"]), ("cut", ["resume.every_epochs=1"])):
        assert small.run(command(tmp_path / name, captioned, *epochs)) == 0
        state[name] = models.load_stored(str(tmp_path / name))[0].state_dict()
        if name == "cut":
            last = sorted((tmp_path / name / "checkpoints").glob("samples-*"))[-1]
            for file in last.iterdir():
                file.unlink()
            last.rmdir()
            assert small.run(command(tmp_path / name, captioned, *epochs)) == 0
            state["again"] = models.load_stored(str(tmp_path / name))[0].state_dict()
    for name, value in state["whole"].items():
        assert torch.equal(value, state["cut"][name]), name
        assert torch.equal(value, state["again"][name]), name


def test_eval_finds_the_same_without_a_recipe(run, captioned, tmp_path, capsys):
    script = [str(small.ROOT / "finetune/eval.py"), "--ckpt", str(run / "model"), "--data", str(captioned)]
    assert small.run([*script, "--out", str(tmp_path), "precision=no", "benchmark.workers=0"]) == 0
    assert "text to image: rank 1/5/10" in capsys.readouterr().out
    ours, theirs = (small.json_of(folder / "results.json") for folder in (tmp_path, run))
    assert ours["t2i"] == theirs["t2i"]
    assert small.run([*script, "--out", str(tmp_path), "--rerank"]) == 2
    assert "rerank.k1 is for images as queries" in capsys.readouterr().err


def test_a_set_without_captions_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shards.sources.figures.caption", lambda *_: "")
    data = small.drawn(tmp_path, {**CAPTIONED, "identities": 12, "train_identities": 10})
    assert small.run(command(tmp_path / "run", data)) == 2
    assert "the training images have no captions with a word" in capsys.readouterr().err
