"""R5: all that a training remembers from one step to the next is in its state, or follows from the step."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import attributes
import numpy as np
import pytest
import small
import torch
from attributes import Walk

from finetune import views
from pretrain import checkpoint, schedules
from pretrain.centering import Centering
from pretrain.config import PretrainConfig
from pretrain.journal import Journal
from pretrain.modules import build_modules
from pretrain.optim import OptimConfig, build_optimizer
from recipes.load import load

PRETRAIN = ["loader.batch=8", "schedules.epochs=0.375", "checkpoint.every_epochs=0.1875", "views.local_count=1"]
FINETUNE = ["resume.every_epochs=1"]
EVERY, ENOUGH = 3, 7  # steps from one state to the next, of six in all; exit status of a run that has shown enough
HELD = ("modules", "method", "student", "plain", "keeper")  # variables that are walked first, to give names to the rest

# What an object remembers and a state does not hold, with the reason: `Class.attribute`, or a variable of `train`.
CLOCK, SCREEN, STEP = "a clock", "for the screen", "made anew in each step"
LINE = "since the last written line; rates, and which terms were not finite"
DERIVED = {
    **{"first": "where the process began", "found": "what was read", "span": "as first", "start": "as first"},
    **{"done": "the position, in the state's facts"},
    **{"Meter.began": CLOCK, "Meter.spoke": CLOCK, "Meter.note": SCREEN, "Meter.first": SCREEN},
    **{"Meter.done": "the position"},
    **{"Ranks.began": CLOCK, "Ranks.finished": CLOCK, "Ranks.times": CLOCK, "Ranks.step": "the position"},
    **dict.fromkeys(("Ranks.beats", "Ranks.group", "Ranks.slowness", "Ranks.hooks", "Ranks.stops"), "of the launch"),
    **dict.fromkeys(("Ranks.ended", "Ranks.watchdog", "Ranks.pending", "Ranks.cause"), "of the launch"),
    **dict.fromkeys(("Stops.asked", "Stops.before"), "a signal to this process"),
    **dict.fromkeys(("Journal.since", "Journal.waited", "Journal.steps", "Journal.faults", "Journal.replaced"), LINE),
    **dict.fromkeys(("Journal.losses", "Journal.health", "Journal.features", "Journal.outputs", "Journal.means"), STEP),
    **dict.fromkeys(("Journal.finite", "Journal.own", "Journal.rows", "Journal.last"), STEP),
    **{"Journal.recent": "the last steps of this process, for a dump"},
    **{"BadSamples.seen": "loader.max_bad is of this process", "BadSamples.found": "as seen"},
    **{"Watch.since": "from the written lines", "Watch.ringing": "as since", "Watch.skipped": "as since"},
    **dict.fromkeys(("Keeper.saved", "Keeper.ready"), "what this process has written"),
    **dict.fromkeys(("Writer.buffers", "Writer.thread", "Writer.title", "Writer.needed"), "a save under way"),
    **dict.fromkeys(("Writer.error", "Writer.failed"), "what the disk said to this process"),
    **{"Scalars.file": "a file of this process"},
    **dict.fromkeys(("Appended.end", "Lines.end"), "the length of a file"),
    **{"Lines.waiting": "lines for a full disk"},
    **dict.fromkeys(("PackedSplit.files", "PackedSplit.rows", "PackedSplit.lock"), "open files"),
    **dict.fromkeys(("PackedSplit.most_open", "PackedSplit.unpack"), "follows from the set"),
    **{"Backbone._resizing": "constants by the size of crops", "Pooling.tried": "of the first call"},
    **{"Tensor.grad": STEP, "AdamW.found_inf": STEP, "Ranks.forwards": "clocks of a GPU"},
}


class Seen(NamedTuple):
    """The variables of `train` and what hangs on them, at the start of step EVERY and of the one after it."""

    at: Walk
    after: Walk
    variables: dict[str, Any]
    began: int  # the first step of the process


def watched(patch: pytest.MonkeyPatch, command: list[str]) -> Seen:
    """Run a script until it begins step EVERY + 1; it is looked into where its loop asks for a step's numbers."""
    module, name, place = (schedules, "at", 0) if "pretrain/run.py" in command[0] else (views, "seed_torch", 1)
    asked, steps, seen = getattr(module, name), [], []

    def spy(*given: Any) -> Any:
        frame = sys._getframe(1)
        if frame.f_code.co_name != "train":
            return asked(*given)
        steps.append(given[place])
        if steps[-1] >= EVERY:
            own = frame.f_locals
            order = {key: own[key] for key in (*HELD, *own) if key in own}
            seen.append((Walk({**order, "generators": attributes.generators()}), dict(own)))
        if steps[-1] > EVERY:
            sys.exit(ENOUGH)
        return asked(*given)

    with patch.context() as inner:
        inner.setattr(module, name, spy)
        assert small.run(command) == ENOUGH
    return Seen(seen[0][0], seen[1][0], seen[0][1], steps[0])


def both(patch: pytest.MonkeyPatch, script: str, base: Path, *more: str) -> tuple[Seen, Seen]:
    """A run that nobody stopped, and one in the same folder that goes on from its state after EVERY steps."""
    ours = script.startswith("pretrain")
    data = small.drawn(base.parent, small.UNLABELED if ours else small.LABELLED)
    given = [*PRETRAIN, "checkpoint.asynchronous=false"] if ours else [*FINETUNE, "resume.asynchronous=false"]
    command = small.arguments(script, base, data, *given, *more, ckpt=None if ours else "none")
    found = watched(patch, command), watched(patch, command)
    assert [one.began for one in found] == [0, EVERY]
    return found


def forgotten(alone: Seen, resumed: Seen) -> list[str]:
    """What the resumed run does not have as the other one has it, and no reason is known.

    What differs at a step and not at the next one is made anew in each. A variable that the resumed run has not yet is
    assigned before it is read, or the loop would fail.
    """
    lasting = attributes.differences(alone.at, resumed.at) & attributes.differences(alone.after, resumed.after)
    found = []
    for path in lasting:
        owners = {*alone.at.owners.get(path, ()), *resumed.at.owners.get(path, ())}
        if (resumed.variables.keys() | {"generators"}) & owners and not DERIVED.keys() & owners:
            found.append(path)
    return sorted(found)


def unsaved(variables: dict[str, Any], tmp_path: Path) -> tuple[int, list[str]]:
    """Change each tensor of the state's modules and optimisers: how many there are, and which of them, when only it is
    changed, leave what is saved as it is."""
    held = {name: variables[name] for name in HELD if name in variables}
    own = variables.get("modules") or variables["keeper"].modules
    trained = (own["student"], [variables["plain"]]) if "plain" in variables else variables["keeper"].trained
    walk = Walk(held)
    tensors = {p: t for p, t in walk.tensors.items() if not DERIVED.keys() & set(walk.owners[p])}

    def saved() -> dict[str, bytes]:
        return {k: t.detach().numpy().tobytes() for k, t in checkpoint.state_tensors(own, trained).items()}

    before, missed = saved(), []
    for path, tensor in tensors.items():
        kept = tensor.detach().clone()
        with torch.no_grad():
            tensor.copy_(~kept if kept.dtype == torch.bool else kept + 1)
        if saved() == before:
            missed.append(path)
        with torch.no_grad():
            tensor.copy_(kept)
    assert saved() == before
    return len(tensors), missed


def unknown(seen: Seen) -> tuple[int, list[str]]:
    """Attributes that methods assign while a run goes: how many, and which are neither a part of a state nor in
    DERIVED."""
    later = {name for kind in seen.at.classes for name in attributes.assigned_later(kind)}
    modules = seen.variables.get("modules") or seen.variables["keeper"].modules
    parts = [part for module in modules.values() for part in module.modules()]
    held = {f"{type(part).__name__}.{name}" for part in parts for name in (*part._buffers, *part._parameters)}
    return len(later), sorted(later - held - DERIVED.keys())


def checked(patch: pytest.MonkeyPatch, script: str, base: Path, *more: str) -> tuple[int, int, list[str]]:
    """How many attributes were looked at and changed, and what is missing in the state."""
    alone, resumed = both(patch, script, base, *more)
    assert len(alone.at.tensors) > 100
    scalers = [value for path, value in alone.at.leaves.items() if path.endswith(".scaler")]
    assert scalers == [None] * len(scalers) != [], "there is no GradScaler, whose scale would be a state"
    changed, missed = unsaved(alone.variables, base)
    later, strange = unknown(alone)
    return len(alone.at.leaves) + later, changed, [*forgotten(alone, resumed), *missed, *strange]


@pytest.mark.row("R5")
@pytest.mark.parametrize("script", ["pretrain/run.py", "finetune/run.py"])
def test_a_resumed_training_remembers_all(script, tmp_path, monkeypatch, figures):
    looked, changed, missing = checked(monkeypatch, script, tmp_path / "run")
    note = f"{changed} tensors changed one by one"
    figures("R5", injected=f"a restart of {script}", times=looked, lost=len(missing), wrong=0, note=note)
    assert missing == [], "\n".join(missing)


def plant(patch: pytest.MonkeyPatch) -> None:
    """Five kinds of memory that no state holds."""
    end_step, record = Centering.end_step, Journal.record

    def ending(centre: Centering, finite: torch.Tensor | None = None) -> None:
        end_step(centre, finite)
        if "planted_buffer" not in centre._buffers:
            centre.register_buffer("planted_buffer", torch.zeros(2), persistent=False)
            centre.planted_number = 0
        centre.planted_buffer += 1
        centre.planted_number += 1

    def recording(journal: Journal, step: int, *given: Any) -> None:
        record(journal, step, *given)
        journal.planted = getattr(journal, "planted", {"deep": [np.zeros(1)]})
        journal.planted["deep"][0] += step
        np.random.random()  # noqa: NPY002

    patch.setattr(Centering, "end_step", ending)
    patch.setattr(Journal, "record", recording)


@pytest.mark.row("R5")
def test_what_is_forgotten_is_found(tmp_path, monkeypatch):
    plant(monkeypatch)
    alone, resumed = both(monkeypatch, "pretrain/run.py", tmp_path / "run")
    centre = "modules[centres]._modules[cls]"
    planted = {f"{centre}._buffers[planted_buffer]", f"{centre}.planted_number", "journal.planted[deep][0]"}
    assert planted <= set(forgotten(alone, resumed))
    # numpy's generator went on in this process: what it gives is another at each step of both runs
    assert any(path.startswith("generators[numpy]") for path in forgotten(alone, resumed))
    _, missed = unsaved(alone.variables, tmp_path)
    assert {path for path in missed if "planted" in path} == {
        f"modules[centres]._modules[{kind}]._buffers[planted_buffer]" for kind in ("cls", "patches")
    }


class Counter:
    """Made of what methods assign."""

    made = None

    def __init__(self) -> None:
        self.made = 0

    def step(self) -> None:
        self.counted += 1
        self.pair[0], (self.second, _) = 1, (2, 3)

    @property
    def asked(self) -> int:
        self.looked: int = 1
        return self.looked


def test_what_methods_assign_is_found():
    assert attributes.assigned_later(Counter) == {f"Counter.{name}" for name in ("counted", "pair", "second", "looked")}


@pytest.mark.row("R5")
def test_a_state_on_disk_gives_every_tensor_back(tmp_path, figures):
    """All tensors of the state are other numbers; fresh objects that load it hold them, each at its place."""
    config = load(PretrainConfig, "pretrain/smoke.yaml", small.VIT)

    def made(seed: int) -> tuple[dict, torch.optim.Optimizer]:
        modules = build_modules(config.model_copy(update={"seed": seed}), torch.device("cpu"), 1)
        optimizer = build_optimizer(modules["student"], OptimConfig())
        for number, parameter in enumerate(modules["student"].parameters()):
            if seed == 0 and parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, 1 + number)
        optimizer.step()
        return modules, optimizer

    (modules, optimizer), (fresh, other) = made(0), made(1)
    walk = Walk({"modules": modules, "optimizer": optimizer.state})
    rng = torch.Generator().manual_seed(0)
    tensors = {path: t for path, t in walk.tensors.items() if not DERIVED.keys() & set(walk.owners[path])}
    for tensor in tensors.values():
        new = torch.rand(tensor.shape, generator=rng, dtype=torch.float64) * 100
        with torch.no_grad():
            tensor.copy_(new.to(tensor.dtype))
    expected = Walk({"modules": modules, "optimizer": optimizer.state})
    checkpoint.save_state(tmp_path, modules, (modules["student"], [optimizer]), 8, 1)
    checkpoint.load_state(checkpoint.states(tmp_path)[0], fresh, (fresh["student"], [other]))
    found = Walk({"modules": fresh, "optimizer": other.state})
    wrong = [path for path in tensors if found.leaves.get(path) != expected.leaves[path]]
    figures("R5", injected="other numbers in each tensor", times=len(tensors), lost=0, wrong=len(wrong))
    assert wrong == []
    assert len(tensors) > 100


KINDS = (
    ["centering.kind=centre", "precision=no", "backbone.drop_path=0.3"],
    ["heads.shared=false", "heads.norm_last_layer=false", "loader.batch_per_device=4"],
    ["losses.patch_weight=0", "losses.koleo_weight=0.1"],
    ["backbone.stem=ics", "backbone.patch_size=16", "views.global_size=[64,32]", "views.local_size=[32,16]"],
    ["backbone.registers=2", "optim.clip_by=global", "loader.workers=2"],
    ["health.on_spike=roll_back", "log_every=4"],
)


@pytest.mark.soak
@pytest.mark.row("R5")
def test_every_kind_of_training_remembers_all(tmp_path, monkeypatch, figures):
    looked, changed, missing = 0, 0, []
    for number, more in enumerate(KINDS):
        found = checked(monkeypatch, "pretrain/run.py", tmp_path / str(number), *more)
        looked, changed, missing = looked + found[0], changed + found[1], missing + found[2]
    note = f"{len(KINDS)} kinds of pretraining; {changed} tensors changed one by one, 100 % in the state"
    figures("R5", injected="a restart; each tensor changed", times=looked, lost=len(missing), wrong=0, note=note)
    assert missing == [], "\n".join(missing)
