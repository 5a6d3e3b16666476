"""The rules of docs/evaluation.md in plain Python: loops, integers and fractions, nothing fast and nothing rounded.

Scores are exact, so features must be small whole numbers or fractions that a float holds.
"""

from fractions import Fraction

JUNK, DISTRACTOR = -1, 0


def scores_of(feature, features):
    """Inner products of one feature with all others."""
    return [sum(Fraction(float(a)) * Fraction(float(b)) for a, b in zip(feature, f, strict=True)) for f in features]


def visible(query, gallery, i, same_camera):
    """Gallery rows that query i may see."""
    rows = []
    for row in range(len(gallery.keys)):
        if gallery.pids[row] == JUNK:
            continue
        if same_camera == "drop":
            if gallery.pids[row] == query.pids[i] and gallery.camids[row] == query.camids[i]:
                continue
        elif gallery.keys[row] == query.keys[i]:
            continue
        rows.append(row)
    return rows


def is_match(query, gallery, i, row):
    return bool(query.pids[i] > 0 and gallery.pids[row] == query.pids[i])


def search(query, gallery, max_rank, same_camera="drop", scores=scores_of):
    """Of each query a dict of ap, inp (fractions), first, matches and curve; None where it is skipped."""
    found = []
    for i in range(len(query.keys)):
        values = scores(query.features[i], gallery.features)
        rows = sorted(visible(query, gallery, i, same_camera), key=lambda row: (-values[row], row))
        right = [is_match(query, gallery, i, row) for row in rows]
        if not any(right):
            found.append(None)
            continue
        hits, precisions, last = 0, [], 0
        for rank, good in enumerate(right, start=1):
            if good:
                hits, last = hits + 1, rank
                precisions.append(Fraction(hits, rank))
        found.append(
            {
                "ap": sum(precisions) / hits,
                "inp": Fraction(hits, last),
                "first": right.index(True) + 1,
                "matches": hits,
                "curve": [int(any(right[:k])) for k in range(1, max_rank + 1)],
            }
        )
    return found


def pairs(query, gallery, same_camera="drop"):
    """Scores of all pairs of the same person and of different people, of those whose identities are known."""
    same, different = [], []
    for i in range(len(query.keys)):
        if query.pids[i] <= 0:
            continue
        values = scores_of(query.features[i], gallery.features)
        for row in visible(query, gallery, i, same_camera):
            if gallery.pids[row] >= DISTRACTOR:
                (same if is_match(query, gallery, i, row) else different).append(values[row])
    return same, different


def open_set(query, gallery, removed, same_camera="drop"):
    """(best score, whether it is right) of the queries with a mate, and best scores of those without.

    removed: identities that are taken out of the gallery.
    """
    mated, alone = [], []
    for i in range(len(query.keys)):
        if query.pids[i] <= 0:
            continue
        rows = [
            row
            for row in visible(query, gallery, i, same_camera)
            if gallery.pids[row] >= DISTRACTOR and gallery.pids[row] not in removed
        ]
        values = scores_of(query.features[i], gallery.features)
        if not rows:
            continue
        best = min(rows, key=lambda row: (-values[row], row))
        if any(is_match(query, gallery, i, row) for row in rows):
            mated.append((values[best], is_match(query, gallery, i, best)))
        else:
            alone.append(values[best])
    return mated, alone
