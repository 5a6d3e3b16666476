"""The batches that a run leaves out, and how it goes back to leave out some more.

A roll-back is the remedy of PaLM (arXiv 2204.02311, section 5.1) for a spike of the loss: go on from a state before it
without the batches around it. They are cut out of the data once and for all: a step takes the batch with its number of
those that are not left out, so a run that is stopped and continued takes the same ones.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from pretrain import checkpoint, committed
from pretrain.health import HealthConfig
from pretrain.spikes import RollBack, Spikes
from recipes.errors import UserError, disk_sentence
from recipes.whole import write_text
from shards.order import Order

T = TypeVar("T")
SKIPPED, VERSION = "skipped_batches.json", 1


class Gaps:
    """The batches that a run leaves out, in OUT/skipped_batches.json: for each roll-back a span [start, end) of the
    batches as they would come without any."""

    def __init__(self, told: Sequence[dict[str, Any]] = ()):
        """told: the entries of the file, oldest first; "batches" is the span of each."""
        self.told = list(told)
        self.spans: list[tuple[int, int]] = []  # in order, apart from each other
        for start, end in sorted(one["batches"] for one in self.told):
            if self.spans and start <= self.spans[-1][1]:
                start, end = self.spans[-1][0], max(end, self.spans.pop()[1])
            self.spans.append((start, end))

    def __len__(self) -> int:
        """Roll-backs."""
        return len(self.told)

    def data_step(self, step: int) -> int:
        """Which batch step `step` takes: the one with this number, counted from 0, of those that are not left out."""
        for start, end in self.spans:
            if step < start:
                break
            step += end - start
        return step

    def and_steps(self, first: int, last: int) -> dict[str, Any]:
        """An entry that leaves out what the steps `first` to `last` take now; no step before them takes another batch
        then."""
        return {"steps": [first, last], "batches": [self.data_step(first), self.data_step(last) + 1]}

    @staticmethod
    def read(out: Path) -> "Gaps":
        """Those of a run folder; none where nothing was left out. UserError where the file is damaged."""
        path = out / SKIPPED
        try:
            whole = json.loads(path.read_text(encoding="utf-8"))
            if whole["format_version"] != VERSION:
                raise ValueError(f"it has format {whole['format_version']!r}, not {VERSION}")
            for one in whole["skipped"]:
                start, end = one["batches"]
                if not (type(start) is type(end) is int and 0 <= start < end):
                    raise ValueError(f"{one['batches']!r} is no span of batches")
            return Gaps(whole["skipped"])
        except FileNotFoundError:
            return Gaps()
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{path} is damaged ({error}): it tells which batches this run leaves out; put it right, or choose "
                "another --out to begin anew"
            ) from error

    def write(self, out: Path) -> None:
        """Into a run folder; a reader sees the whole file or the one before."""
        entries = ",\n".join(json.dumps(one) for one in self.told)  # one a line: rows are many numbers
        write_text(out / SKIPPED, f'{{"format_version": {VERSION}, "skipped": [\n{entries}\n]}}\n')


def begin(out: Path, spikes: Spikes, accelerator: Accelerator) -> Gaps:
    """What a run that starts, or goes on, leaves out; the same on all processes. spikes: of its state."""

    def read() -> list[dict[str, Any]]:
        gaps = Gaps.read(out)
        if len(gaps) < int(spikes.gaps):
            raise UserError(
                f"{out / SKIPPED} tells of {len(gaps)} roll-backs, the checkpoint of {int(spikes.gaps)}: bring the "
                "file back, or choose another --out to begin anew"
            )
        return gaps.told

    gaps = Gaps(_on_main(accelerator, read))
    spikes.gaps.fill_(len(gaps))
    return gaps


def through(
    train: Callable[[], None], out: Path, order: Order, batch: int, health: HealthConfig, accelerator: Accelerator
) -> None:
    """Call `train`, which goes on from the newest state in the run folder, until it ends without a RollBack.

    order: of the run's samples. batch: global. UserError on all processes after too many roll-backs, or where no state
    from before the spike is left.
    """
    while True:
        try:
            return train()
        except RollBack as spike:
            found = spike.with_traceback(None)  # its frames hold the networks
        accelerator.free_memory()  # so does this
        roll_back(out, found, order, batch, health.max_roll_backs, accelerator)


def roll_back(out: Path, found: RollBack, order: Order, batch: int, most: int, accelerator: Accelerator) -> None:
    """Prepare the run folder so that a training that starts in it goes on before the spike, without its batches.

    To be called on all processes, when nothing is being written any more. most: roll-backs of a run.
    """

    def cut() -> str:
        gaps, many = Gaps.read(out), f"health.max_roll_backs = {most}"
        if len(gaps) >= most:
            raise UserError(
                f"the loss has spiked: {found.spike.text}; this run went back {len(gaps)} times already, and {many}. "
                "Lower schedules.lr or schedules.teacher_temperature in a new run, or raise health.max_roll_backs"
            )
        start = _discard_after(out, found.first * batch) // batch
        entry = gaps.and_steps(found.first, found.last)
        positions = range(*(edge * batch for edge in entry["batches"]))
        entry |= {"positions": [positions.start, positions.stop], "loss": found.spike._asdict()}
        entry["rows"] = [order(position)[1] for position in positions]
        Gaps([*gaps.told, entry]).write(out)
        return (
            f"roll-back {len(gaps) + 1} of at most {most}: {found.spike.text}; going on from step {start}, without the "
            f"batches of the steps {found.first} to {found.last} ({out / SKIPPED})"
        )

    told = _on_main(accelerator, cut)
    if accelerator.is_main_process:
        print(told, file=sys.stderr, flush=True)


def _discard_after(out: Path, samples: int) -> int:
    """Delete states and teachers of more samples; returns the samples of the newest state that stays, 0 without."""
    states = {path: int(path.name.partition("-")[2]) for path in checkpoint.states(out / "checkpoints")}
    before = [count for count in states.values() if count <= samples]
    if states and not before:
        raise UserError(
            f"there is no checkpoint from before the spike in {out / 'checkpoints'}: set a higher checkpoint.keep or a "
            "lower log_every, so that it is seen earlier; with health.on_spike=warn the same command goes on after it"
        )
    committed.discard([path for path, count in states.items() if count > samples])
    spoilt = []
    for path in sorted((out / "teachers").glob("epoch-*")):
        try:
            if committed.read_facts(path / checkpoint.CONFIG, sealed=False).get("samples", 0) > samples:
                spoilt.append(path)
        except committed.Damaged:
            continue  # nobody can take it for a good one
    committed.discard(spoilt)
    return max(before, default=0)


def _on_main(accelerator: Accelerator, act: Callable[[], T]) -> T:
    """What `act` returns on the main process, on all of them; so with its UserErrors and those of the disk."""
    told: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            told[0] = act()
        except UserError as error:
            told[1] = str(error)
        except OSError as error:
            if (sentence := disk_sentence(error)) is None:
                raise
            told[1] = sentence
    if accelerator.num_processes > 1:
        broadcast_object_list(told)
    if told[1] is not None:
        raise UserError(told[1])
    return told[0]
