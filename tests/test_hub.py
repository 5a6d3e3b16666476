"""Models by their name on the Hugging Face Hub: from the cache without a connection, else a sentence."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import strangers_reid
from strangers import written

from finetune import models
from finetune.foreign import reid as foreign_reid
from pretrain import hub
from pretrain.checkpoint import save_model
from recipes.errors import UserError

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and no connection."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def keep(cache: Path, name: str, *files: Path) -> None:
    """Put files into the cache as huggingface_hub does."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    for file in files:
        shutil.copy(file, snapshot)


def test_a_model_of_ours_by_its_name(cache, tmp_path):
    found = foreign_reid.read(written(tmp_path, strangers_reid.strangers()["PersonViT"].content))
    save_model(tmp_path / "model", found.tensors, found.config)
    keep(cache, "someone/market", *(tmp_path / "model").iterdir())
    model, augment = models.load_stored("hub:someone/market")
    assert models.fingerprint(model) == models.fingerprint(models.load_stored(str(tmp_path / "model"))[0])
    assert (augment.height, augment.width) == (256, 128)
    at = hub.local(f"hub:someone/market@{REVISION}")
    assert Path(at) == cache / "models--someone--market" / "snapshots" / REVISION


def test_one_file_of_a_repository(cache, tmp_path):
    path = Path(written(tmp_path, strangers_reid.strangers()["PersonViT"].content, "transformer_120.pth"))
    keep(cache, "lake/reid", path)
    model, _ = models.load_stored("hub:lake/reid/transformer_120.pth")
    assert models.fingerprint(model) == models.fingerprint(models.load_stored(str(path))[0])
    with pytest.raises(UserError, match=r"holds no \.safetensors; name one of its files: hub:lake/reid/FILE\.pth"):
        hub.local("hub:lake/reid")


def test_without_a_connection_the_sentence_says_what_to_do(cache):
    for name in ("hub:nobody/nothing", "hub:nobody/nothing/file.pth", "hub:nobody/nothing@v1"):
        with pytest.raises(
            UserError, match=r"cannot be had from the Hugging Face Hub .* give its path, or copy the cache"
        ):
            models.load_stored(name)
    for name in ("hub:nobody", "hub:", "hub:/x"):
        with pytest.raises(UserError, match="expected hub:OWNER/NAME or hub:OWNER/NAME/FILE"):
            hub.local(name)
    with pytest.raises(UserError, match="HFValidationError"):
        hub.local("hub:no body/no thing")


def test_other_names_come_back_as_they_are():
    for name in ("runs/market", "none", "timm:vit_small_patch16_224.dino", "file.pth"):
        assert hub.local(name) == name
