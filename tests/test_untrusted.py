"""Files of strangers: nothing in them runs, damage and bombs are told."""

import argparse
import os
import pickle
import zipfile

import pytest
import torch
from strangers import backbone, training, written

from pretrain import foreign
from recipes.errors import UserError


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_nothing_in_a_file_is_executed(tmp_path, new):
    class Trap:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    for name, content in (("a.pth", {"teacher": Trap()}), ("b.pt", {**backbone(), "x": Trap()})):
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=new)
        with pytest.raises(UserError, match=r"wants to call (posix|os)\.system: such a file can run any program"):
            foreign.read(tmp_path / name)
    (tmp_path / "c.bin").write_bytes(pickle.dumps(Trap(), protocol=2))
    with pytest.raises(UserError, match=r"\.system"):
        foreign.read(tmp_path / "c.bin")
    assert not (tmp_path / "ran").exists()


def test_arguments_are_read_in_both_formats_and_only_as_numbers_and_text(tmp_path):
    content = training(args=argparse.Namespace(arch="vit_small", where=tmp_path, ratio=0.5)).content
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    found = foreign.read(tmp_path / "old.pth")
    assert found.settings == {"arch": "vit_small", "where": str(tmp_path), "ratio": 0.5}


def test_damaged_files_are_told(tmp_path):
    path = written(tmp_path, backbone())
    data = open(path, "rb").read()  # noqa: SIM115
    for end in (0, 100, len(data) // 2, len(data) - 8):
        open(path, "wb").write(data[:end])  # noqa: SIM115
        with pytest.raises(UserError, match=r"cannot be read as a checkpoint .* fetch it again"):
            foreign.read(path)
    (tmp_path / "x.safetensors").write_bytes(b"not this")
    with pytest.raises(UserError, match="no intact safetensors file"):
        foreign.read(tmp_path / "x.safetensors")
    with zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", b"\0" * 10**6)
    with pytest.raises(UserError, match="is a compressed archive"):
        foreign.read(tmp_path / "small.pth")
