"""The curve of a pretraining that was followed with labels: which teacher is the best, told as JSON, table and picture.

Two teachers search with the same queries, so their difference is looked at query by query: a bootstrap over the queries
(Efron 1979) of the difference in average precision says whether it is more than chance.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pretrain.verdict import Interval, interval
from recipes.record import environment, write_json, write_text

LEVEL, RESAMPLES, SEED = 0.95, 1000, 0  # of the intervals of differences
TUNED = "finetuned"  # key of a row: numbers after a short fine-tune
BY = {False: "mAP of direct retrieval", True: "mAP after a short fine-tune"}
BLUE, ORANGE, BLACK = "#0072b2", "#d55e00", "#000000"  # told apart also without colour: by markers and line styles


def deciding(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The numbers by which a teacher is judged: those after the fine-tune where there was one."""
    return row.get(TUNED, row)


def best_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of the highest mAP, of equals the earliest; if some were fine-tuned, among these."""
    tuned = [row for row in rows if TUNED in row]
    return max(tuned or rows, key=lambda row: deciding(row)["mAP"])


def below(rows: Sequence[dict[str, Any]], best: dict[str, Any]) -> list[Interval | None]:
    """By how much the best scores above each in mAP, with its interval; None where only one of them was fine-tuned.

    rows: with "average_precision" of the same queries, null for skipped ones.
    """
    found: list[Interval | None] = []
    for row in rows:
        if (TUNED in best) != (TUNED in row):
            found.append(None)
            continue
        own, top = (np.array(deciding(one)["average_precision"], float) for one in (row, best))
        valid = ~np.isnan(own)
        assert (valid == ~np.isnan(top)).all(), "all teachers are scored on the same queries"
        found.append(interval(own[valid], top[valid], LEVEL, RESAMPLES, SEED))
    return found


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _with_interval(row: Mapping[str, Any], name: str) -> str:
    low, high = row["intervals"][name]
    return f"{_percent(row[name])} ({_percent(low)}–{_percent(high)})"


def _note(row: Mapping[str, Any], best: Mapping[str, Any]) -> str:
    words = ["best" if row["samples"] == best["samples"] else "as good" if row["as_good"] else ""]
    words.append("" if row["ckpt"] else "deleted by the pretraining")
    return ", ".join(word for word in words if word)


def table(rows: Sequence[dict[str, Any]], best: dict[str, Any], facts: Mapping[str, Any]) -> str:
    """Markdown: one line a teacher. rows: with "below_best", "as_good" and "ckpt"."""
    tuned = TUNED in best
    lines = ["# The teachers of a pretraining, scored with labels", ""]
    lines += [f"* {key}: {value}" for key, value in facts.items()]
    lines += [f"* best by: {BY[tuned]}; in brackets: 95 % interval of a bootstrap over the queries", ""]
    head = ["epochs", "mAP %", "Rank-1 %", "Rank-5 %", "mINP %", *(["mAP % fine-tuned"] if tuned else [])]
    head += ["below the best %", "", "teacher"]
    lines += [" | ".join(["", *head, ""]).strip(), "|" + "---|" * len(head)]
    for row in rows:
        gap = row["below_best"]
        cells = [f"{row['epochs']:g}", _with_interval(row, "mAP"), _with_interval(row, "rank1")]
        cells += [_percent(row["rank5"]), _percent(row["mINP"])]
        if tuned:
            cells.append(_percent(row[TUNED]["mAP"]) if TUNED in row else "–")
        away = "–" if gap is None else f"{_percent(gap['mean'])} ({_percent(gap['low'])} to {_percent(gap['high'])})"
        cells += [away, _note(row, best), f"`{row['ckpt'] or row['name']}`"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", "![mAP and Rank-1 of each teacher against its epochs; the best is ringed](curve.png)", ""]
    )


def picture(path: Path, rows: Sequence[dict[str, Any]], best: dict[str, Any], title: str) -> None:
    """mAP and Rank-1 against epochs with their intervals, the best ringed; written whole."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="epochs of the pretraining", ylabel="%", title=title)
    epochs = [row["epochs"] for row in rows]
    for name, label, look in (
        ("mAP", "mAP", {"color": BLUE, "marker": "o", "linestyle": "-"}),
        ("rank1", "Rank-1", {"color": ORANGE, "marker": "s", "linestyle": "--"}),
    ):
        values = 100 * np.array([row[name] for row in rows])
        ends = 100 * np.array([row["intervals"][name] for row in rows]).T
        axes.errorbar(
            epochs, values, yerr=np.maximum([values - ends[0], ends[1] - values], 0), capsize=3, label=label, **look
        )
    tuned = [row for row in rows if TUNED in row]
    if tuned:
        values = [100 * row[TUNED]["mAP"] for row in tuned]
        axes.plot(
            [row["epochs"] for row in tuned], values, color=BLUE, marker="^", linestyle=":", label="mAP, fine-tuned"
        )
    ring = {"marker": "o", "markersize": 14, "fillstyle": "none", "color": BLACK, "linestyle": "none"}
    axes.plot(best["epochs"], 100 * deciding(best)["mAP"], label=f"best: epoch {best['epochs']:g}", **ring)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    draft = path.with_name(f".{path.name}.tmp")
    figure.savefig(draft, format="png", dpi=120)
    os.replace(draft, path)


def publish(out: Path, rows: Sequence[dict[str, Any]], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write curve.json, table.md, curve.png and, last, best.json into `out`; returns what best.json holds.

    rows: one a teacher in the order of the epochs: name, samples, epochs, ckpt (None: deleted), the numbers of
    Retrieval.numbers, "intervals", "average_precision", and "finetuned" with numbers of the same names.
    """
    best = best_of(rows)
    gaps = below(rows, best)
    told = []
    for row, gap in zip(rows, gaps, strict=True):
        one = {key: value for key, value in row.items() if key not in ("average_precision", "facts", TUNED)}
        if TUNED in row:
            one[TUNED] = {key: value for key, value in row[TUNED].items() if key != "average_precision"}
        as_good = gap is not None and gap.low <= 0 and row is not best
        told.append({**one, "below_best": gap and gap._asdict(), "as_good": as_good})
    chosen, last = told[rows.index(best)], told[-1]
    write_json(out / "curve.json", {"facts": facts, "teachers": told, "environment": environment()})
    write_text(out / "table.md", table(told, chosen, facts))
    picture(out / "curve.png", told, chosen, f"Teachers of a pretraining; the best by {BY[TUNED in best]}")
    kept = ("ckpt", "name", "epochs", "samples", "sha256", "mAP", "rank1", "intervals", TUNED)
    found = {key: chosen[key] for key in kept if key in chosen}
    found |= {"by": BY[TUNED in best], "as_good": [row["ckpt"] or row["name"] for row in told if row["as_good"]]}
    found |= {"last": {"epochs": last["epochs"], "mAP": deciding(last)["mAP"], "below_best": last["below_best"]}}
    write_json(out / "best.json", found)
    return found


def sentence(told: Mapping[str, Any], out: Path) -> str:
    """What follow.follow returns, in words: the best teacher, how sure that is, how to use it."""
    count = len(told["as_good"])
    others = f"; {count} other{'s are' if count > 1 else ' is'} as good by these queries" if count else ""
    numbers = f"{_percent(deciding(told)['mAP'])} %"
    use = f"python finetune/run.py --ckpt {told['ckpt']}" if told["ckpt"] else "the pretraining deleted it"
    return (
        f"best by {told['by']}: epoch {told['epochs']:g}, {numbers}{others}\n"
        f"curve: {out / 'curve.png'}, {out / 'table.md'}\nuse it: {use}"
    )
