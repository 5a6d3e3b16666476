"""The folder in which the commands of the documentation are run: tiny sets, runs and files under the names that the
pages use. People are drawn; networks have two blocks of width 32, so that a command takes a second.
"""

import io
import os
import shutil
import tarfile
from pathlib import Path

import forked
import onnx
import small
import strangers
import strangers_reid
import torch
from conftest import encoded

# what one labelled set, one without labels, and one pretraining stand for
LABELLED = ("market1501", "dukemtmc", "cuhk03_np", "own_labelled", "msmt17", "msmt17_v1", "mine_labelled", "demo_reid",
            "market1501-cut", "demo-cut-0.7", "cuhk03_np-cut", "cuhk_pedes", "cuhk01_text", "figures",
            "figures_captions")  # fmt: skip
UNLABELED = ("luperson", "crops", "mine", "own", "big", "smoke", "another-day", "demo_unlabeled", "cuhk03_train")
PRETRAINED = ("vits16", "vitb16", "mine", "cfs_target", "own", "crops", "crops-cfs-target", "teacher", "smoke", "X",
              "crops_stock_ratio", "demo1/pretrain", "demo/pretrain", "dino", "mim", "stock")  # fmt: skip
TUNED = ("msmt17", "from-teacher", "from-scratch", "demo/pretrained", "demo/scratch", "market-best", "eval-teacher")
LISTS = ("mine-train", "luperson_random03", "luperson_random10", "luperson_random50")
LAYOUT = {"bounding_box_train": range(1, 5), "query": range(5, 9), "bounding_box_test": range(5, 9)}
TARS = 128  # docs/data.md names 00000 to 00127


def _market(folder: Path) -> None:
    """Four people to train on and four to search for, two cameras, in the layout of Market-1501."""
    number = 0
    for name, people in LAYOUT.items():
        (folder / name).mkdir(parents=True)
        for person in people:
            for camera in (1,) if name == "query" else (1, 2):
                number += 1
                path = folder / name / f"{person:04}_c{camera}s1_{number:06}_01.jpg"
                path.write_bytes(encoded(person * 10 + camera))


def _crops(folder: Path, count: int, first: int) -> None:
    """Images without labels, in folders."""
    for number in range(count):
        place = folder / ("cam1", "cam2", "old", "2023")[number % 4]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:06}.jpg").write_bytes(encoded(first + number))


def _tars(folder: Path) -> None:
    """Tars of webdataset with one image each."""
    folder.mkdir()
    image = encoded(0)
    for number in range(TARS):
        with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
            member = tarfile.TarInfo(f"image{number:06}.jpg")
            member.size = len(image)
            tar.addfile(member, io.BytesIO(image))


def _onnx(path: Path) -> None:
    """A model that hands its images back; writing a real one takes seconds, which the commands for it do."""
    shape = ["batch", 3, 64, 32]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("images", "features")]
    same = onnx.helper.make_node("Identity", ["images"], ["features"])
    graph = onnx.helper.make_graph([same], "same", ends[:1], ends[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)


def _linked(folder: Path, names: tuple[str, ...], target: Path) -> None:
    for name in names:
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(target, link.parent))


def _files(folder: Path) -> None:
    """Images, sets in their own layouts, and files of other projects."""
    crops = {"path/to/crops": 100, "CUHK01": 200, "STREET": 300, "path/to/LUP": 400, "path/to/more": 600}
    for name, first in crops.items():
        _crops(folder / name, 16, first)
    _market(folder / "path/to/mine")
    _linked(folder / "path/to", ("Market-1501-v15.09.15", "Market-1501"), folder / "path/to/mine")
    _linked(folder, ("CUHK03_NP",), folder / "path/to/mine")
    _tars(folder / "downloads")
    for number, name in enumerate(("person.jpg", "a.jpg", "b.jpg", "c.jpg")):
        (folder / name).write_bytes(encoded(500 + number))
    torch.save(strangers.training(strangers.TALL).content, folder / "checkpoint0220.pth")
    _onnx(folder / "market.onnx")
    torch.save(strangers_reid.strangers()["PersonViT"].content, folder / "transformer_120.pth")


METHODS = (
    ("market-aligned", "market1501", ["method.name=aligned", "method.id_losses={}"]),
    ("market-mdpr", "market1501", ["method={name: mdpr, dim: 16}"]),
    ("pedes", "cuhk_pedes", ["method={name: text_search}"]),
)  # run, set, and how it is trained


def commands(folder: Path) -> list[list[str]]:
    """What makes the runs, the gallery and the tables, in order."""
    data, runs = folder / "data", folder / "runs"
    short = ["schedules.epochs=2", "schedules.warmup_epochs=0", "checkpoint.teacher_every_epochs=1", "loader.draw=null"]
    model = ["--ckpt", "runs/market", "--out"]
    finetune = small.arguments("finetune/run.py", runs / "market", data / "market1501", "optim.epochs=1")
    made = [
        small.arguments("pretrain/run.py", runs / "pretrain", Path("data/luperson"), *short),
        [*finetune, "--ckpt", "runs/pretrain/teacher", f"benchmark.shards={Path('data/market1501')}"],
        ["finetune/search.py", "build", "path/to/crops", *model, "runs/gallery", "--device", "cpu"],
        *(
            small.arguments("finetune/run.py", runs / name, data / shards, "optim.epochs=1", *method, ckpt="none")
            for name, shards, method in METHODS
        ),
        [
            "finetune/search.py",
            "build",
            "path/to/crops",
            "--ckpt",
            "runs/pedes",
            "--out",
            "runs/pedes-gallery",
            "--device",
            "cpu",
        ],
        ["pretrain/pictures.py", "runs/pretrain", "data/market1501", "--out", "runs/seen", "--images", "2"],
        ["finetune/embed.py", "--shards", "data/big", *model, "tables/big", "--workers", "0"],
    ]
    for name, teacher in (("source", "teachers/epoch-0001.00"), ("target", "teacher")):
        made.append(["finetune/embed.py", "--ckpt", f"runs/pretrain/{teacher}", "--shards", "data/luperson", "--out",
                     f"tables/{name}", "--workers", "0"])  # fmt: skip
    made.append(["finetune/export.py", "--ckpt", "runs/market-mdpr", "--streams", "fusion", "--out",
                 "models/market-fusion"])  # fmt: skip
    made.append(["shards/cfs_score.py", "tables/source", "tables/target", "--out", "scores/luperson"])
    for name in LISTS:
        made.append(["shards/cfs_keep.py", "--shards", "data/luperson", "--fraction", "0.5", "--random", "--out",
                     f"data/{name}.npz"])  # fmt: skip
    made.append(["shards/cfs_keep.py", "scores/luperson", "--fraction", "0.5", "--shards", "data/luperson", "--out",
                 "keep.npz"])  # fmt: skip
    return made


def run(forks: forked.Server, words: list[str], folder: Path, how: str = "leave_quickly") -> forked.Run:
    """Start a script of the project in the folder; how: a function of docs_ways that runs it."""
    prepare = [["docs_commands", "enter", {"folder": str(folder)}], ["docs_ways", how, {}]]
    return forks.start([str(small.ROOT / words[0]), *words[1:]], prepare)


def make(folder: Path, forks: forked.Server) -> None:
    """Everything, at `folder`."""
    sets = folder / "sets"
    sets.mkdir(parents=True)
    labelled, unlabeled = small.drawn(sets, small.LABELLED), small.drawn(sets, small.UNLABELED)
    _linked(folder / "data", LABELLED, labelled)
    _linked(folder / "data", UNLABELED, unlabeled)
    _linked(folder / "runs/demo/data", ("reid",), labelled)
    _linked(folder / "shared", ("data", "runs"), folder / "data")
    _files(folder)
    for words in commands(folder):
        started = run(forks, words, folder)
        assert started.wait() == 0, f"{words}:\n{started.told()}"
    for name, table in (("crops", "source"), ("crops-cfs-target", "target")):
        _linked(folder / "runs/cfs-real", (name,), folder / "tables" / table)
    _linked(folder / "tables", ("own",), folder / "tables/source")
    _linked(folder / "runs", PRETRAINED, folder / "runs/pretrain")
    _linked(folder / "runs", TUNED, folder / "runs/market")
    _linked(folder / "runs", ("demo/aligned", "cuhk03-aligned"), folder / "runs/market-aligned")
    _linked(folder / "runs", ("cuhk03-mdpr",), folder / "runs/market-mdpr")
    _linked(folder / "models", ("cuhk03-fusion",), folder / "models/market-fusion")


def state(folder: Path) -> dict[str, tuple]:
    """Everything below a folder by its path: its kind, size and time, or where a link leads."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            facts = path.lstat()
            if path.is_symlink():
                what = ("link", os.readlink(path))
            else:
                what = ("folder",) if path.is_dir() else ("file", facts.st_size, facts.st_mtime_ns)
            found[str(path.relative_to(folder))] = what
    return found


def remove(path: Path) -> None:
    """A file, a link or a folder, whichever it is."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


class Kept:
    """The folder as it was made, put back before each command; at one place, because galleries store full paths."""

    def __init__(self, base: Path, forks: forked.Server):
        self.folder, self.kept = base / "folder", base / "kept"
        make(self.folder, forks)
        shutil.copytree(self.folder, self.kept, symlinks=True)  # with the times of the files
        self.state = state(self.kept)

    def fresh(self, *gone: str) -> Path:
        """The folder as new, without those files or folders."""
        now = state(self.folder)
        for name in [name for name, what in now.items() if self.state.get(name) != what]:
            remove(self.folder / name)
        for name, what in self.state.items():
            if now.get(name) == what:
                continue
            if what[0] == "folder":
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            else:
                shutil.copy2(self.kept / name, self.folder / name, follow_symlinks=False)
        assert state(self.folder) == self.state
        for name in gone:
            path = self.folder / name
            assert path.parent.resolve().is_relative_to(self.folder.resolve()), f"{name} lies outside"
            remove(path)
        return self.folder
