"""Which curves a page shows: what each is and how to read it, in the words of docs/health.md, with its thresholds.

One run gives pictures with several lines, a comparison one picture a value with a line a run.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from finetune.curves import STYLES, Chart, Drawn, Level, Line, Mark, draw
from finetune.page_metrics import Column
from finetune.page_run import FINETUNE, PRETRAINING, Followed, Run
from pretrain.health import HealthConfig

MOST_OTHER = 24  # pictures of values that nobody knows here
Levels = Callable[[Run], list[Level]]
Entry = tuple[Run, int, str]  # a run with the style and the letter of its lines


class Spec(NamedTuple):
    """A picture. keys: columns of metrics.jsonl with what they are called; those that are not there are left out."""

    title: str
    keys: tuple[tuple[str, str], ...]
    note: str = ""
    levels: Levels = lambda run: []
    zero: bool = False
    log: bool = False
    percent: bool = False


class Group(NamedTuple):
    """Pictures below one heading."""

    title: str
    charts: list[Drawn]
    note: str = ""


def _threshold(key: str, word: str) -> Levels:
    """The line that docs/health.md names for an alarm: a key of the recipe's section `health`."""

    def levels(run: Run) -> list[Level]:
        value = run.number(f"health.{key}", HealthConfig.model_fields[key].default)
        return [Level(float(value), f"alarm {word} {value:g}")]

    return levels


def _ln_k(run: Run) -> list[Level]:
    prototypes = run.number("heads.out_dim", 0)
    return [Level(math.log(prototypes), f"ln K = {math.log(prototypes):.2f}")] if prototypes > 1 else []


def _shares(run: Run) -> list[Level]:
    return _threshold("sharp", "below")(run) + _threshold("uniform", "above")(run)


LOSSES = [
    Spec("Loss", (("loss", "loss"),), "The sum that is trained. It must fall.", log=True),
    Spec("Terms of the loss", (("loss_cls", "class token"), ("loss_patch", "patches"), ("loss_koleo", "KoLeo")),
         "They begin near ln K and fall; staying there for epochs: nothing is learned.", _ln_k),
    Spec("What the targets tell", (("~divergence", "divergence of student and teacher"),
                                   ("~told", "what a target tells about its image")),
         "In nats. A divergence of 0: the targets are trivial. A target that tells 0 tells nothing, whatever the loss.",
         zero=True),
    Spec("Length of the gradient", (("grad_norm", "before clipping"),), "It falls, then stays; no jumps.", log=True),
]  # fmt: skip
HEALTH = [
    Spec("Entropy of a target", (("teacher_entropy_share", "class token"), ("~patch_share", "patches")),
         "As a share of ln K. Near 0: each image gets one hard prototype. Near 1: the targets say nothing.", _shares),
    Spec("Prototypes in use", (("~prototypes", "class token"), ("~patch_prototypes", "patches")),
         "exp of the entropy of the mean target. Few: all images get the same ones.", _threshold("prototypes", "below"),
         zero=True),
    Spec("Spread of the features", (("feature_std", "features"),),
         "0: all images look alike to the backbone. About 1: they fill the sphere. 0.3 and more is healthy.",
         _threshold("spread", "below"), zero=True),
    Spec("Effective rank", (("effective_rank", "rank"),),
         "Directions that the features use. It rises, or falls at first and then stays; 1 is collapse.", zero=True),
    Spec("Cosine of two views", (("positive_cosine", "same image"), ("negative_cosine", "different images")),
         "The two must stay apart: the upper rises towards 1, the lower stays away from it."),
    Spec("Cosine of student and teacher", (("student_cosine", "same view"),), "Near 1; falling for ever: they part."),
    Spec("What centring takes away", (("centre_share_cls", "class token"), ("centre_share_patches", "patches")),
         "As a share of the mean logits: 1 after some 30 steps.", _threshold("centred", "below"), zero=True),
    Spec("Length of the centre", (("centre_norm_cls", "class token"), ("centre_norm_patches", "patches")),
         "It grows, then settles.", zero=True, log=True),
]  # fmt: skip
MATCHING = Spec("Matching accuracy", (("matching_accuracy", "the same patch"), ("matching_near", "it or a neighbour")),
                "How often a patch finds its own place in another view of the image. Random weights are far above "
                "chance: compare with the beginning.", zero=True, percent=True)  # fmt: skip
SCHEDULES = [
    Spec("Learning rate", (("lr", "learning rate"),), zero=True),
    Spec("Weight decay", (("weight_decay", "weight decay"),)),
    Spec("Momentum of the teacher", (("momentum", "momentum"),)),
    Spec("Temperature of the teacher", (("teacher_temperature", "temperature"),)),
]
SPEED = [
    Spec("Throughput", (("images_per_s", "images a second"),), "Over all processes. It should be steady.", zero=True),
    Spec("Waiting for data", (("data_wait", "share of the time"),),
         "Below 10 % is good; near 100 % the device starves: more loader.workers.",
         lambda run: [Level(0.1, "10 %")], zero=True, percent=True),
    Spec("Use of the device", (("mfu", "share of its peak"),), zero=True, percent=True),
    Spec("Damaged samples", (("bad_samples", "replaced so far"),), "shards/check.py names them.", zero=True),
    Spec("Skipped steps", (("skipped_steps", "so far"),), "Steps that were not finite, and not taken.", zero=True),
]  # fmt: skip
CLUSTERS = [
    Spec("Clusters", (("clusters", "clusters"),), "Before each epoch.", zero=True),
    Spec("Images in no cluster", (("noise", "images"),), zero=True),
    Spec("Size of a cluster", (("mean_size", "mean"), ("largest", "largest")), "Images.", zero=True, log=True),
    Spec("Purity of the clusters", (("purity", "identities"), ("camera_purity", "cameras"), ("ari", "adjusted Rand")),
         "Against labels that the training never sees. Cameras near 100 %: the clusters are cameras, not people.",
         zero=True, percent=True),
]  # fmt: skip
QUIET = {"step", "samples", "epoch", "freeze_last_layer", "teacher_entropy", "mean_entropy", "patch_entropy",
         "patch_mean_entropy"}  # drawn in another form, or an axis  # fmt: skip


def _ratio(column: Column, by: float) -> Column:
    return Column(column.steps, column.values / by) if by > 0 else Column(np.empty(0), np.empty(0))


def _exp(column: Column) -> Column:
    return Column(column.steps, np.exp(np.minimum(column.values, 100.0)))


def _difference(one: Column, other: Column) -> Column:
    _, a, b = np.intersect1d(one.steps, other.steps, return_indices=True)
    return Column(one.steps[a], one.values[a] - other.values[b])


def _column(run: Run, key: str) -> Column:
    """A column of the file, or one computed from it; docs/health.md has the formulas. Only where something varies."""
    of, prototypes = run.metrics.of, run.number("heads.out_dim", 0)
    made: dict[str, Callable[[], Column]] = {
        "~divergence": lambda: _difference(of("loss_cls"), of("teacher_entropy")),
        "~told": lambda: _difference(of("mean_entropy"), of("teacher_entropy")),
        "~patch_share": lambda: _ratio(of("patch_entropy"), math.log(prototypes) if prototypes > 1 else 0),
        "~prototypes": lambda: _exp(of("mean_entropy")),
        "~patch_prototypes": lambda: _exp(of("patch_mean_entropy")),
    }
    found = made[key]() if key in made else of(key)
    # terms with weight 0, and counts of faults that never came
    silent = key in ("loss_patch", "loss_koleo", "bad_samples", "skipped_steps") and not found.known().any()
    return Column(np.empty(0), np.empty(0)) if silent else found


def _marks(run: Run) -> list[Mark]:
    """What happened, on the axis of the steps."""
    marks = [Mark(step, "skip") for step in run.metrics.skipped] + [Mark(step, "spike") for step in run.metrics.spikes]
    marks += [Mark(left.steps[0], "back") for left in run.roll_backs]
    return marks + [Mark(alarm.first, "alarm") for alarm in run.metrics.alarms]


def _one(run: Run, spec: Spec) -> Drawn | None:
    """The picture of one run, a line a key."""
    lines = []
    for key, label in spec.keys:
        column = _column(run, key)
        if len(column.steps):
            lines.append(Line(label, column.steps, column.values, len(lines) % STYLES))
    look = {"zero": spec.zero, "log": spec.log, "percent": spec.percent}
    return draw(Chart(spec.title, lines, "step", spec.note, spec.levels(run), _marks(run), **look))


def _several(entries: Sequence[Entry], spec: Spec, axis: str) -> Iterator[Drawn]:
    """A picture a key, a line a run. Thresholds only where all runs have the same."""
    for key, label in spec.keys:
        lines = []
        for run, style, letter in entries:
            column = _column(run, key)
            column = column if axis == "step" else column.against(run.metrics.of(axis))
            if len(column.steps):
                lines.append(Line(run.name, column.steps, column.values, style, letter))
        levels = {tuple(spec.levels(run)) for run, _, _ in entries}
        title = spec.title if len(spec.keys) == 1 else f"{spec.title}: {label}"
        x_label = {"samples": "images seen"}.get(axis, axis)
        look = {"zero": spec.zero, "log": spec.log, "percent": spec.percent}
        drawn = draw(Chart(title, lines, x_label, spec.note, levels.pop() if len(levels) == 1 else (), **look))
        if drawn:
            yield drawn


def _teachers(followed: Followed, label: str, key: str, style: int, letter: str) -> Line:
    """The numbers of the teachers over their epochs."""
    teachers = followed.follow.teachers
    values = [np.nan if getattr(each, key) is None else getattr(each, key) for each in teachers]
    ends = [getattr(each.intervals, key, None) or (np.nan, np.nan) for each in teachers]
    return Line(label, np.array([each.epochs for each in teachers]), np.array(values), style, letter, np.array(ends))


def _follow(followed: Followed) -> Drawn | None:
    """mAP and Rank-1 of the teachers, the best ringed; after a short fine-tune, where there was one."""
    lines = [_teachers(followed, "mAP", "mAP", 0, ""), _teachers(followed, "Rank-1", "rank1", 1, "")]
    tuned = [(each.epochs, each.finetuned.mAP) for each in followed.follow.teachers if each.finetuned]
    tuned = [pair for pair in tuned if pair[1] is not None]
    if tuned:
        lines.append(Line("mAP, fine-tuned", *(np.array(side) for side in zip(*tuned, strict=True)), 2))
    own = [each for each in followed.follow.teachers if followed.best and each.name == followed.best.name]
    value = (own[0].finetuned.mAP if own[0].finetuned else own[0].mAP) if own else None
    ring = (own[0].epochs, value) if value is not None else None
    note = "The lines across a point are its interval." + (" The ring marks the best teacher." if ring else "")
    return draw(Chart(f"Teachers on {followed.name}", lines, "epoch", note, zero=True, percent=True, ring=ring))


def _followed_by_all(entries: Sequence[Entry]) -> list[Drawn]:
    """The mAP of the teachers of several runs, a picture a set."""
    found = []
    for name in dict.fromkeys(each.name for run, _, _ in entries for each in run.followed):
        lines = [_teachers(each, run.name, "mAP", style, letter)
                 for run, style, letter in entries for each in run.followed if each.name == name]  # fmt: skip
        found.append(draw(Chart(f"mAP of the teachers on {name}", lines, "epoch", zero=True, percent=True)))
    return [drawn for drawn in found if drawn]


def _validation(entries: Sequence[Entry]) -> list[Drawn]:
    """The held-out identities after each epoch that was scored."""
    found = []
    for key, title in (("mAP", "mAP"), ("rank1", "Rank-1")):
        lines = []
        for run, style, letter in entries:
            rows = run.validation.epochs if run.validation else []
            pairs = [(row.epoch, getattr(row, key)) for row in rows if getattr(row, key) is not None]
            if pairs:
                x, y = (np.array(side, np.float64) for side in zip(*pairs, strict=True))
                lines.append(Line(run.name, x, y, style, letter))
        note = "On training identities that were not trained on: for choosing the epoch, not for a report."
        found.append(draw(Chart(f"{title}, held-out identities", lines, "epoch", note, zero=True, percent=True)))
    return [drawn for drawn in found if drawn]


def _other(runs: Sequence[Run], known: Sequence[Spec]) -> list[Spec]:
    """A picture for each value that no other one shows."""
    shown = {key for spec in known for key, _ in spec.keys} | QUIET
    rest = dict.fromkeys(key for run in runs for key in run.metrics.columns if key not in shown)
    return [Spec(key, ((key, key),), log=True) for key in list(rest)[:MOST_OTHER]]


def _specs(runs: Sequence[Run]) -> dict[str, list[Spec]]:
    """The pictures of these runs, which are of one kind, by heading."""
    if runs[0].kind == PRETRAINING:
        found = {"Losses": LOSSES, "Health": [*HEALTH, MATCHING], "Schedules": SCHEDULES, "Speed and data": SPEED}
    else:
        terms = dict.fromkeys(key for run in runs for key in run.metrics.terms)
        terms = [(key, key) for key in terms if key not in ("loss", "lr", "epoch", "samples")]
        note = "What the loss is made of, weighted."
        found = {
            "Losses": [*LOSSES[:1], Spec("Terms of the loss", tuple(terms[:STYLES]), note, log=True), SCHEDULES[0]],
            "Clusters": CLUSTERS,
        }
    return {**found, "Other values": _other(runs, [spec for specs in found.values() for spec in specs])}


def groups(entries: Sequence[Entry]) -> list[Group]:
    """All curves of a run, or of several over each other; headings without a curve are left out."""
    found, alone = [], len(entries) == 1
    for kind in (PRETRAINING, FINETUNE):
        own = [entry for entry in entries if entry[0].kind == kind]
        if not own:
            continue
        if kind == PRETRAINING:
            followed = [_follow(each) for each in own[0][0].followed] if alone else _followed_by_all(own)
            labelled = Group("Teachers, searched with labels", [drawn for drawn in followed if drawn])
        else:
            labelled = Group("Held-out identities", _validation(own))
        has_samples = all(len(run.metrics.of("samples").steps) for run, _, _ in own if run.metrics.columns)
        axis = "samples" if kind == PRETRAINING and has_samples else "step"
        drawn = [labelled]
        for title, specs in _specs([run for run, _, _ in own]).items():
            charts = [_one(own[0][0], spec) for spec in specs] if alone else (
                each for spec in specs for each in _several(own, spec, axis))  # fmt: skip
            drawn.append(Group(title, [chart for chart in charts if chart]))
        prefix = f"{kind.capitalize()}: " if len({run.kind for run, _, _ in entries}) > 1 else ""
        found += [group._replace(title=prefix + group.title) for group in drawn if group.charts]
    return found
