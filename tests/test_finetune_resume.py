"""A fine-tune that was killed goes on, and ends to the last bit as one that nobody disturbed."""

import os
import signal
import time
from pathlib import Path

import pytest
import small
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from finetune import models, resume
from finetune.resume import Position, ResumeConfig
from pretrain import checkpoint
from recipes.errors import UserError

PATIENCE_S = 60
# 8 epochs of 3 batches; stochastic depth, so that the random numbers of every step count
LONG = ["optim.epochs=8", "resume.every_epochs=2", "backbone.drop_path=0.3", "optim.kind=adamw"]
RESNET = [
    "backbone.embed_dim=null",
    "backbone.depth=null",
    "backbone.num_heads=null",
    "optim.kind=sgd",
    "optim.lr=0.01",
]
# running statistics and torch's own random numbers
RESNET += ["optim.lr=0.01", "backbone.name=resnet10t", "backbone.drop_path=0.2", "backbone.last_stride=1"]
VALIDATED = ["validation.identities=4", "validation.every_epochs=1"]


def command(out: Path, people: Path, *more: str) -> list[str]:
    """From random weights."""
    return small.arguments("finetune/run.py", out, people, *LONG, *more, ckpt="none")


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """12 identities x 5 images to train on, 12 others to search."""
    return small.drawn(tmp_path_factory.getbasetemp(), small.LABELLED)


def assert_same_run(out: Path, other: Path) -> None:
    """Every line, the state, the model and the numbers agree to the last bit."""
    assert small.metrics(out) == small.metrics(other)
    states = [checkpoint.states(run / "checkpoints")[-1].name for run in (out, other)]
    assert states[0] == states[1]
    for file in (Path("checkpoints", states[0], "tensors.safetensors"), Path("model/model.safetensors")):
        ours, theirs = load_file(out / file), load_file(other / file)
        assert ours.keys() == theirs.keys()
        assert not [key for key in ours if not torch.equal(ours[key], theirs[key])]
    scores = [small.json_of(run / "results.json")["average_precision"] for run in (out, other)]
    assert scores[0] == scores[1]


def interrupted(line: list[str], monkeypatch, states: int) -> None:
    """Run in this process until so many states are saved, then stop it as a signal would."""
    saved, original = [], checkpoint.write_state

    def stopping(*arguments) -> None:
        original(*arguments)
        saved.append(arguments)
        if len(saved) == states:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_state", stopping)
        assert small.run(line) == 130


@pytest.mark.parametrize("more", [[], RESNET, VALIDATED], ids=["vit", "resnet", "validation"])
def test_stopped_twice(more, people, tmp_path, monkeypatch, capsys):
    assert small.run(command(tmp_path / "whole", people, *more)) == 0
    line = command(tmp_path / "run", people, *more)
    interrupted(line, monkeypatch, 1)
    interrupted(line, monkeypatch, 2)
    assert [state.name for state in checkpoint.states(tmp_path / "run" / "checkpoints")] != []
    assert small.run(line) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    if more == VALIDATED:
        curves = [small.json_of(tmp_path / name / "validation.json") for name in ("run", "whole")]
        assert curves[0] == curves[1]
        assert [row["epoch"] for row in curves[0]["epochs"]] == list(range(1, 9))


def test_the_model_of_an_epoch(people, tmp_path, capsys):
    run = tmp_path / "run"
    assert small.run(command(run, people, "resume.keep=9")) == 0
    first, *_, last = checkpoint.states(run / "checkpoints")
    whole, _, stored = models.load_known(str(run))
    same, _, told = models.load_known(str(last))
    assert told == stored
    assert models.fingerprint(same) == models.fingerprint(whole)
    assert models.fingerprint(models.load_known(str(first))[0]) != models.fingerprint(whole)
    tensors = next(first.glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(UserError, match="take another state, or the model of the run"):
        models.load_known(str(first))


def test_killed_in_the_middle_of_an_epoch(people, tmp_path):
    assert small.run(command(tmp_path / "whole", people)) == 0
    line = command(tmp_path / "run", people)
    process = small.start(line)
    try:
        for _ in range(int(PATIENCE_S / 0.005)):
            assert process.poll() is None, process.communicate()
            # a state of two epochs, and a step of the third, is there
            if checkpoint.states(tmp_path / "run" / "checkpoints") and len(small.complete_lines(tmp_path / "run")) > 6:
                break
            time.sleep(0.005)
        else:
            pytest.fail(f"no step beyond a state within {PATIENCE_S} s")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert small.run(line) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert small.run(line) == 0, "a finished run trains nothing and evaluates again"
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.fixture
def alone():
    """The only process of a run."""
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def kept(out: Path, config: ResumeConfig, epochs: int, parts, optimisers) -> resume.Keeper:
    return resume.Keeper(out, config, epochs, parts, optimisers)


def test_states_come_when_they_are_due_and_after_the_last_epoch(alone, tmp_path):
    weights = torch.nn.Linear(2, 2)
    optimisers = [torch.optim.SGD(weights.parameters(), lr=0.1, momentum=0.9)]
    weights(torch.ones(1, 2)).sum().backward()
    optimisers[0].step()
    keeper, due = kept(tmp_path, ResumeConfig(every_epochs=3, keep=2), 8, weights, optimisers), []
    for epoch in range(1, 9):
        position = Position(epoch, 10 * epoch, 640 * epoch)
        keeper.after(position)
        keeper.close()
        due += [epoch] if keeper.restore(alone) == position else []
    assert due == [3, 6, 8]
    assert len(checkpoint.states(tmp_path / "checkpoints")) == 2


def test_a_stop_inside_an_epoch_is_saved_at_once(alone, tmp_path):
    weights = torch.nn.Linear(2, 2)
    keeper = kept(tmp_path, ResumeConfig(every_epochs=3), 8, weights, [torch.optim.SGD(weights.parameters(), lr=0.1)])
    keeper.after(Position(4, 41, 2624, 1))
    assert checkpoint.states(tmp_path / "checkpoints") == [], "nothing is due inside an epoch"
    keeper.after(Position(4, 42, 2688, 2), stop=True)
    assert keeper.restore(alone) == Position(4, 42, 2688, 2)


def test_weights_that_are_not_finite_are_not_saved(alone, tmp_path):
    weights = torch.nn.Linear(2, 2)
    keeper = kept(tmp_path, ResumeConfig(), 8, weights, [torch.optim.SGD(weights.parameters(), lr=0.1)])
    with torch.no_grad():
        weights.bias[1] = torch.inf
    with pytest.raises(UserError, match=r"step 10: method.bias is not finite, so no state is saved"):
        keeper.after(Position(5, 10, 640))
    assert checkpoint.states(tmp_path / "checkpoints") == []


def test_several_optimisers_get_their_own_state_back(alone, tmp_path):
    """As mutual learning has them: one network and one optimiser each."""
    pair = torch.nn.ModuleDict({"one": torch.nn.Linear(2, 2), "two": torch.nn.Linear(2, 2)})

    def made() -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9) for part in pair.values()]

    optimisers = made()
    for factor, (part, optimiser) in enumerate(zip(pair.values(), optimisers, strict=True), start=1):
        (factor * part(torch.ones(1, 2)).sum()).backward()
        optimiser.step()
    kept(tmp_path, ResumeConfig(), 5, pair, optimisers).after(Position(5, 1, 1))
    fresh = made()
    assert kept(tmp_path, ResumeConfig(), 5, pair, fresh).restore(alone) == Position(5, 1, 1)
    for own, other, part in zip(optimisers, fresh, pair.values(), strict=True):
        assert set(other.state) == set(part.parameters())
        for parameter in part.parameters():
            assert torch.equal(own.state[parameter]["momentum_buffer"], other.state[parameter]["momentum_buffer"])
