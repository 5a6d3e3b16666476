"""MDPR from its recipes: stopped and gone on, the model that comes out, two processes."""

import numpy as np
import pytest
import small
import torch
from safetensors.torch import load_file
from test_mdpr import CLASSES, batch, method
from test_two_processes import launch

from finetune import attention_overlay, backbones, models
from finetune.backbones import BackboneConfig
from finetune.config import FinetuneConfig
from finetune.methods import build
from finetune.methods.base import Parts
from finetune.plain_forward import PlainEmbedder
from pretrain import checkpoint
from recipes.load import load

QUICK = ["backbone.embed_dim=32", "backbone.depth=3", "backbone.num_heads=2", "benchmark.draw=null", "log_every=1",
         "benchmark.bootstrap=0", "optim.epochs=3", "optim.warmup_epochs=0", "resume.every_epochs=1", "method.dim=16",
         "sampling.identities_per_batch=4"]  # fmt: skip
RECIPES = sorted(path.name for path in (small.ROOT / "recipes/finetune").glob("mdpr_*.yaml"))


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return small.drawn(tmp_path_factory.getbasetemp(), small.LABELLED)


def command(out, people, *more: str) -> list[str]:
    recipe = str(small.ROOT / "recipes/finetune/mdpr_figures.yaml")
    given = [f"benchmark.shards={people}", *QUICK, "backbone.drop_path=0.2", *more]
    return [str(small.ROOT / "finetune/run.py"), "--recipe", recipe, "--out", str(out), "--ckpt", "none", *given]


def test_a_run_is_stopped_and_goes_on_to_the_bit_and_its_model_is_searched(people, tmp_path, capsys):
    assert small.run(command(tmp_path / "whole", people, "benchmark.strips=2")) == 0
    assert "; feature: 16 global + 32 parts + 16 last + 16 mid + 64 fusion" in capsys.readouterr().out
    small.interrupted_and_gone_on(command(tmp_path / "run", people, "benchmark.strips=2"))
    states = [checkpoint.states(tmp_path / name / "checkpoints")[-1] for name in ("run", "whole")]
    first, second = (load_file(next(state.glob("*.safetensors"))) for state in states)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert any(".distil." in name for name in first), "predictors belong to the training"
    weights, config = checkpoint.load_model(tmp_path / "run")
    assert not [name for name in weights if "distil" in name]
    assert config["method"]["distillation"] is None
    last, _ = models.load_stored(str(states[0]))
    model, _ = models.load_stored(str(tmp_path / "run"))
    assert models.fingerprint(last) == models.fingerprint(model)
    picture, numbers = (tmp_path / "run" / name for name in (attention_overlay.NAME, attention_overlay.NUMBERS))
    assert picture.read_bytes()[:4] == b"\x89PNG"
    with np.load(numbers) as found:
        assert found["keys"].shape == (2,)
        assert found["last_level"].shape == found["mid_level"].shape == (2, 2, 8, 4)
        assert 0 < found["last_level"].min() < found["last_level"].sum(1).max() < 1.01
    assert "Where the model looks" in (tmp_path / "run" / "table.md").read_text()


def test_a_model_is_exported_with_the_streams_that_shall_stay(people, tmp_path, capsys):
    assert small.run(command(tmp_path / "run", people, "benchmark.strips=0", "optim.epochs=1")) == 0
    export = [str(small.ROOT / "finetune/export.py"), "--ckpt", str(tmp_path / "run"), "--out", str(tmp_path / "kept")]
    assert small.run([*export, "--streams", "last,global"]) == 0
    assert "-> 32 numbers; feature: 16 last + 16 global" in capsys.readouterr().out
    whole, _ = models.load_stored(str(tmp_path / "run"))
    kept, _ = models.load_stored(str(tmp_path / "kept"))
    images = batch(0).images
    whole.eval().search_by(["last", "global"])
    assert torch.equal(kept.eval().embed(images), whole.embed(images))
    assert small.run([*export[:-1], str(tmp_path / "wrong"), "--streams", "cls"]) == 2
    assert "global, parts, last, mid, fusion" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


def test_two_processes_train_it(people, tmp_path):
    """BatchNorm and triplets are those of a process, so this is about every weight having a gradient on both."""
    launch("torchrun", command(tmp_path / "two", people, "optim.epochs=1", "benchmark.strips=0"))
    assert {"id_whole", "triplet_fusion", "distillation", "diversity_mid"} <= set(small.metrics(tmp_path / "two")[-1])


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_build_their_method(name):
    config = load(FinetuneConfig, str(small.ROOT / "recipes/finetune" / name), ["ckpt=none"])
    vit = "vit" in config.backbone.name
    tiny = {"embed_dim": 48, "depth": 12 if config.method.get("branches") else 3, "num_heads": 3}
    given = config.backbone.model_dump() | (tiny if vit else {"name": "resnet18_ibn_a"})
    made = backbones.build(backbones.arguments_of(BackboneConfig(**given), config.augment.size), 0.0)
    model = build(config.method | {"dim": 8}, Parts(made, CLASSES, 0, config.sampling, 0))
    sum(model(batch(model.draws, config.augment.size)).values()).backward()
    assert config.augment.random_patch.probability == 0.5
    assert config.augment.erase_with == "mean"
    if name in ("mdpr_market1501.yaml", "mdpr_synergyreid.yaml"):
        assert config.backbone.name == "resnet101_ibn_a"
        assert config.augment.size == (384, 192)
        assert (config.sampling.identities_per_batch, config.sampling.images_per_identity) == (16, 16)
        optim = config.optim
        assert (optim.kind, optim.lr, optim.weight_decay, optim.warmup_factor) == ("adam", 3.5e-4, 5e-4, 0.1)
        assert (optim.epochs, optim.warmup_steps) == {"m": (60, 2000), "s": (40, 200)}[name[5]]
        assert optim.lr * optim.end_factor == pytest.approx(1e-7, rel=1e-3)


def test_plain_operations_give_the_same_features_for_exporters():
    torch.manual_seed(3)
    model = method().eval()
    with torch.no_grad():
        plain = PlainEmbedder(model, {"mean": (0.5,) * 3, "std": (0.5,) * 3}, "own")
        torch.testing.assert_close(plain(batch(0).images), model.embed(batch(0).images), rtol=1e-4, atol=1e-5)


@pytest.mark.soak
def test_it_becomes_onnx(people, tmp_path):
    """Its streams are attributes of the exported program, so none may be called as Python calls a keyword."""
    pytest.importorskip("onnxruntime", reason="the extra `onnx`")
    assert small.run(command(tmp_path / "run", people, "benchmark.strips=0", "optim.epochs=1")) == 0
    line = ["--ckpt", str(tmp_path / "run"), "--to", "onnx", "--out", str(tmp_path / "model.onnx")]
    assert small.run([str(small.ROOT / "finetune/export.py"), *line]) == 0
