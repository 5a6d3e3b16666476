"""What TensorBoard reads: the same numbers as its own writer gives it, also when the disk was full meanwhile."""

import full_disks
import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from pretrain.grids import encoded
from pretrain.scalars import Scalars


def read(folder) -> dict[str, list[tuple[int, float]]]:
    """Points by the name of the curve."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture
def tracker(tmp_path):
    scalars = Scalars(tmp_path / "ours")
    accelerator = Accelerator(cpu=True, log_with=scalars)
    accelerator.init_trackers("run")
    yield accelerator
    accelerator.end_training()
    AcceleratorState._reset_state(reset_partial_state=True)  # else the next script inherits this one's precision


def test_the_curves_are_those_of_tensorboard_s_own_writer(tracker, tmp_path):
    with SummaryWriter(tmp_path / "theirs") as writer:
        for step in range(20):
            values = {"loss": 5 - 0.1 * step, "lr": 1e-3, "samples": step * 64}
            tracker.log(values, step=step)
            for name, value in values.items():
                writer.add_scalar(name, value, step)
    ours = read(tmp_path / "ours")
    assert ours == read(tmp_path / "theirs")
    assert len(ours["loss"]) == 20


def test_points_wait_for_room(tracker, tmp_path, capsys):
    tracker.log({"loss": 1.0}, step=0)
    file = next((tmp_path / "ours").iterdir())
    for room in (0, 1, 20, 60):
        with full_disks.files_of_at_most(file.stat().st_size + room):
            tracker.log({"loss": 1.0 + room}, step=1 + room)
    assert capsys.readouterr().err.count("cannot be written (File too large)") == 1
    assert read(tmp_path / "ours") == {"loss": [(0, 1.0)]}, "no half record"
    tracker.end_training()
    assert read(tmp_path / "ours")["loss"] == [(0, 1), (1, 1), (2, 2), (21, 21), (61, 61)]


def test_pictures_come_back_byte_by_byte(tracker, tmp_path):
    image = Image.fromarray(np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3))
    data = encoded(image)
    (scalars,) = tracker.trackers
    scalars.log_images({"pictures/one": data, "pictures/two": data}, step=7)
    tracker.log({"loss": 1.0}, step=8)
    events = EventAccumulator(str(tmp_path / "ours")).Reload()
    assert events.Tags()["images"] == ["pictures/one", "pictures/two"]
    (found,) = events.Images("pictures/one")
    assert (found.step, found.width, found.height) == (7, 3, 2)
    assert found.encoded_image_string == data
    assert read(tmp_path / "ours") == {"loss": [(8, 1)]}
