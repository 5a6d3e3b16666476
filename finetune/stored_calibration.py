"""The threshold for "same person", kept in the config.json of a model beside its weights."""

from pathlib import Path

from finetune.verification import Calibration
from pretrain.checkpoint import CONFIG, WEIGHTS
from pretrain.committed import read_facts
from recipes.errors import UserError
from recipes.record import write_json

KEY = "calibration"


def own_folder(ckpt: str) -> Path:
    """The folder of the exported model that `--ckpt` names; UserError where it is none of ours, which have one,
    and where its config.json is damaged."""
    path = Path(ckpt)
    folder = path.parent if path.is_file() and path.name == WEIGHTS else path
    for candidate in (folder, folder / "model", folder / "teacher"):
        if (candidate / WEIGHTS).is_file() and (candidate / CONFIG).is_file():
            if "kind" in read_facts(candidate / CONFIG, sealed=False):
                return candidate
            break
    raise UserError(
        f"--ckpt {ckpt} is no exported model of this project, so a calibration cannot be stored in it; "
        "`python pretrain/convert.py` makes one of a file of others"
    )


def store(ckpt: str, calibration: Calibration) -> Path:
    """Write the calibration into the model's config.json, replacing an earlier one; returns the model's folder."""
    folder = own_folder(ckpt)
    write_json(folder / CONFIG, read_facts(folder / CONFIG, sealed=False) | {KEY: calibration.model_dump()})
    return folder
