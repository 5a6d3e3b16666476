"""A pretraining to be followed: teachers whose weights say how well they search."""

from pathlib import Path

import numpy as np
import torch

from finetune.metrics import summarise
from pretrain.backbone import Backbone
from pretrain.checkpoint import load_model, save_teacher

SIZES = {"embed_dim": 16, "depth": 1, "num_heads": 1, "img_size": [16, 16], "patch_size": 8}
QUERIES = 40


def export(folder: Path, epochs: float, worth: int, **more) -> Path:
    """An exported teacher of 100 samples an epoch; `worth` is in its weights and says how well it will search."""
    backbone = Backbone({"model_name": "vit_tiny_patch16_224", "num_classes": 0, **SIZES})
    for parameter in backbone.parameters():
        torch.nn.init.constant_(parameter, worth)
    save_teacher(folder, backbone, {"samples": int(100 * epochs), "epochs": epochs, **more})
    return folder


def snapshot(run: Path, epochs: float, worth: int, kept: str = "always") -> Path:
    return export(run / "teachers" / f"epoch-{epochs:07.2f}", epochs, worth, kept=kept)


def under_way(base: Path) -> Path:
    """A run under way with teachers of epochs 1, 2 and 3, the second the best."""
    folder = base / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("seed: 0\n")
    for epochs, worth in ((1, 10), (2, 30), (3, 20)):
        snapshot(folder, epochs, worth)
    return folder


class Scorer:
    """Of `QUERIES` queries as many find their match first as the teacher is worth, the others at rank 4."""

    def __init__(self):
        self.asked: list[str] = []

    def __call__(self, ckpt: Path):
        self.asked.append(ckpt.name)
        worth = int(load_model(ckpt)[0]["cls_token"][0, 0, 0])
        return summarise([np.array([1 if query < worth else 4]) for query in range(QUERIES)] + [np.empty(0, np.int64)])
