"""What a run came to, in a sentence, and the few numbers that stand at the head of its page."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from finetune.curves import short
from finetune.page_charts import Entry
from finetune.page_recipe import data_sets
from finetune.page_results import Intervals, Result
from finetune.page_run import EVALUATION, PRETRAINING, Run
from finetune.page_tables import Versus, best_search
from finetune.reporting import percent
from recipes.progress import clock

# the alarms of docs/health.md, in its words
ALARMS = {
    "hard_targets": "each image gets one hard prototype: teacher temperature near 0, or logits grown too large",
    "one_prototype": "all images get the same prototype: centring is off or too weak, or the learning rate too high",
    "no_centring": "the centre takes nothing away from the logits",
    "equal_features": "the features of all images are the same: the backbone has collapsed",
    "uniform_targets": "the targets say nothing: teacher temperature too high, or learning rate near 0",
    "flat_loss": "the loss stays at ln K: the student does not learn",
    "skipped_steps": "steps were not taken because something was not finite",
    "loss_spike": "losses in a row were far above the usual ones",
}
OF_PATCHES = "_of_patches"


class Fact(NamedTuple):
    """A number at the head of the page."""

    name: str
    value: str
    more: str = ""


class Event(NamedTuple):
    """Something that happened in a run."""

    when: str
    what: str
    told: str


def _many(count: float, one: str, several: str = "") -> str:
    """`3 epochs`."""
    return f"{count:,.10g} {one if count == 1 else several or one + 's'}"


def epochs_done(run: Run) -> float | None:
    """Epochs that the run has done, as far as that is known."""
    if run.kind != PRETRAINING:
        last = run.metrics.last("epoch")
        return None if last is None else last + 1
    samples = run.metrics.last("samples")
    known = run.images_per_epoch
    if samples is None or known is None:
        return None
    return samples / known


def seconds(run: Run) -> float | None:
    """Time of the training from its own rates, without pauses; None where no rate is known."""
    samples, rate = run.metrics.of("samples"), run.metrics.of("images_per_s")
    both = rate.against(samples)  # samples -> images a second
    known = np.isfinite(both.values) & (both.values > 0)
    images, rates = both.steps[known], both.values[known]
    return float((np.diff(images, prepend=0.0).clip(min=0) / rates).sum()) if len(images) else None


def standing(run: Run) -> str:
    """Where the run stands, in a sentence; empty where it is finished."""
    last = run.metrics.last_step
    at = f" at step {last:,}" if last is not None else " before its first line of numbers"
    if run.standing == "going":
        return f"This run is under way: a process is at work in its folder, and was{at} when this page was written."
    if run.standing == "stopped":
        lost = f" ({run.stop.lost[:200]})" if run.stop and run.stop.lost else ""
        where = f" at step {run.stop.step:,}" if run.stop and run.stop.step is not None else at
        return f"This run was stopped{where}{lost}. The same command goes on from there."
    if run.standing == "broken off":
        return (
            f"This run has not come to its end: it was killed, or failed{at}. The same command goes on from its last "
            "checkpoint."
        )
    return ""


def _found(result: Result, name: str) -> str:
    """How well a search went, in a sentence."""
    ends = result.intervals.mAP if result.intervals else None
    interval = f" ({percent(ends[0])} to {percent(ends[1])})" if ends else ""
    queries = f"{_many(result.valid, 'query', 'queries')} on {result.name}"
    first = "" if result.rank1 is None else f" finds the right person first for {percent(result.rank1)} % of"
    return f"{name}{first or ', searched with'} {queries}; mAP {percent(result.mAP)} %{interval}."


def _fell(run: Run) -> str:
    loss = run.metrics.of("loss").known()
    return f"The loss went from {short(loss[0])} to {short(loss[-1])}." if len(loss) > 1 else ""


def _alarms(run: Run) -> str:
    names = dict.fromkeys(alarm.name for alarm in run.metrics.alarms)
    if names:
        return f"Alarms rang: {', '.join(names)}."
    return "No alarm rang." if run.metrics.lines else ""


def _pretrained(run: Run) -> list[str]:
    done, asked = epochs_done(run), run.number("schedules.epochs", 0)
    told = []
    if done is not None:
        of = f" of {asked:g}" if asked and run.standing != "finished" else ""
        told.append(f"{done:.3g}{of} epochs." if of else f"{_many(round(done, 2), 'epoch')}.")
    told += [_fell(run), _alarms(run)]
    if run.verdict:
        told.append(f"Its own verdict, without labels: {run.verdict.verdict}. {run.verdict.reason}.".replace("..", "."))
    for followed in run.followed:
        best = next(
            (each for each in followed.follow.teachers if followed.best and each.name == followed.best.name), None
        )
        if best and best.mAP is not None:
            told.append(f"Best teacher on {followed.name}: epoch {best.epochs:g}, mAP {percent(best.mAP)} %.")
    return told


def verdict(run: Run) -> str:
    """What came out, in one or a few sentences."""
    told = [standing(run)]
    if run.kind == PRETRAINING:
        told += _pretrained(run)
    elif result := best_search(run):
        told.append(_found(result, "This model"))
        if len(run.searched) > 1:
            told.append(f"{len(run.searched)} sets were searched; the table has all.")
    else:
        told.append("Nothing was searched with it yet." if run.standing != "finished" else "Nothing was searched.")
        told.append(_fell(run))
    if run.roll_backs:
        told.append(f"It went back {_many(len(run.roll_backs), 'time')} because of a spike of the loss.")
    if run.faults:
        told.append(f"It ended because of values that are not finite: see faults/{run.faults[-1]}.")
    return " ".join(text for text in told if text)


def compared(entries: Sequence[Entry], differences: Sequence[Versus]) -> str:
    """What a comparison came to."""
    told = []
    for one in differences:
        equal = [other for other in one.others if not other.sure]
        letters = ", ".join(other.letter for other in equal)
        more = f"; by these queries {letters} {'is' if len(equal) == 1 else 'are'} as good" if equal else ""
        gap = f", by {one.others[0].text} points of mAP before {one.others[0].letter}" if one.others else ""
        told.append(f"On {one.data} {one.best} is best{gap}{more}.")
    if not told:
        searched = sum(bool(run.searched) for run, _, _ in entries)
        told.append("No two of these runs searched the same queries, so none is called the best." if searched > 1
                    else "Curves and recipes are compared; there are no two searches to compare.")  # fmt: skip
    waiting = [letter for run, _, letter in entries if run.standing != "finished"]
    if waiting:
        told.append(f"Not finished: {', '.join(waiting)}.")
    return " ".join(told)


def _interval(intervals: Intervals | None, key: str) -> str:
    ends = getattr(intervals, key, None)
    return f"{percent(ends[0])} to {percent(ends[1])}" if ends else ""


def key_facts(run: Run) -> list[Fact]:
    """The few numbers at the head of the page."""
    found = []
    if result := best_search(run):
        for key, name in (("mAP", "mAP"), ("rank1", "Rank-1"), ("mINP", "mINP")):
            if getattr(result, key) is not None:
                found.append(Fact(name, f"{percent(getattr(result, key))} %", _interval(result.intervals, key)))
    done = epochs_done(run)
    if done is not None:
        asked = run.number("schedules.epochs" if run.kind == PRETRAINING else "optim.epochs", 0)
        found.append(Fact("Epochs", f"{done:.4g}", f"of {asked:g}" if asked else ""))
    if run.kind == PRETRAINING:
        samples, accuracy = run.metrics.last("samples"), run.metrics.last("matching_accuracy")
        time = seconds(run)
        found += [Fact("Images seen", short(samples))] if samples is not None else []
        found += [Fact("Training time", clock(time), "hours, minutes, seconds" if time >= 3600 else "minutes, seconds")
                  ] if time else []  # fmt: skip
        found += [Fact("Matching accuracy", f"{percent(accuracy)} %", "of the last teacher")] if accuracy else []
    loss = run.metrics.last("loss")
    found += [Fact("Loss", short(loss), "last")] if loss is not None else []
    if run.kind == EVALUATION and (result := best_search(run)):
        found.append(Fact("Queries", f"{result.valid:,}", f"{result.skipped:,} without a match"))
    sets = [each for each in data_sets(run) if each.use == "trained on"] if run.kind != EVALUATION else []
    return [*found, Fact("Trained on", sets[0].name, sets[0].content)] if sets else found


def events(run: Run) -> list[Event]:
    """Alarms, spikes, skipped steps and roll-backs, in their order."""
    found: list[tuple[int, Event]] = []
    for alarm in run.metrics.alarms:
        name = alarm.name.removesuffix(OF_PATCHES)
        told = ALARMS.get(name, "") + (" (of the patches)" if name != alarm.name else "")
        when = f"step {alarm.first:,}" + (f" to {alarm.last:,}" if alarm.last > alarm.first else "")
        found.append((alarm.first, Event(when, f"alarm {alarm.name}", told)))
    for left in run.roll_backs:
        when = f"steps {left.steps[0]:,} to {left.steps[1]:,}"
        found.append((left.steps[0], Event(when, "roll-back", "the run went back to before these steps, and left their "
                                                             "batches out")))  # fmt: skip
    for step in run.metrics.spikes:
        found.append((step, Event(f"step {step:,}", "spike of the loss", "the first outlier of a row")))
    if run.metrics.skipped:
        first, last = run.metrics.skipped[0], run.metrics.skipped[-1]
        when = f"step {first:,}" + (f" to {last:,}" if last > first else "")
        count = run.metrics.last("skipped_steps") or len(run.metrics.skipped)
        found.append(
            (first, Event(when, "skipped steps", f"{count:,.0f} steps were not taken: something was not finite"))
        )
    return [event for _, event in sorted(found, key=lambda pair: pair[0])]
