"""The HTML of the search page: escaped by jinja2, pictures inside it, nothing that has to be fetched."""

import base64
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import jinja2
import numpy as np

from finetune import app_attention
from finetune.app_originals import data_uri
from finetune.app_search import Found, Hit, Query, Searcher, Settings
from finetune.app_uploads import ENDINGS, TYPES, size_told
from finetune.verification import Calibration
from shards.schema import UNKNOWN

FOLDER = Path(__file__).parent / "templates"
_PAGES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
    lstrip_blocks=True,
)  # fmt: skip
COLUMNS = ("place", "id", "score", "distance", "same", "probability", "image", "camera", "identity")
SAID = (
    "The cosine says how well a sentence and an image fit; there is no threshold for it, and a list always has a first "
    "place. A match is a hint to look at, never proof of who somebody is."
)
FORMULA = "=+-@\t\r"  # what a spreadsheet takes for the beginning of a formula


def render(name: str, **values: Any) -> str:
    """A template, for gr.HTML, which would take ${...} and {{...}} in it for templates of its own."""
    text = _PAGES.get_template(name).render(**values)
    return text.replace("${", "&#36;{").replace("{{", "&#123;{").replace("`", "&#96;")


def source(name: str) -> str:
    """The text of a style sheet or script."""
    return (FOLDER / name).read_text(encoding="utf-8")


def head(searcher: Searcher) -> str:
    """What is searched, and with what."""
    gallery = searcher.loaded().gallery
    model = gallery.facts["model"]
    size = f"{model['input']['height']} × {model['input']['width']}"
    images = f"{len(gallery):,} image{'' if len(gallery) == 1 else 's'}"
    facts = f"Gallery {searcher.folder.name}: {images}. Model {PurePath(model['ckpt']).name}, input {size} pixels."
    return render("app_head.html.j2", facts=facts)


def drop(limit: int) -> str:
    """Where a picture goes in. limit: bytes."""
    return render("app_drop.html.j2", limit=limit, endings=ENDINGS, types=TYPES, size=size_told(limit))


def message(text: str = "") -> str:
    """A sentence that is read out at once, or its empty place."""
    return render("app_message.html.j2", text=text)


def camera(camid: int) -> str:
    """A camera for people."""
    return "unknown camera" if camid == UNKNOWN else f"camera {camid}"


def _pictures(pixels: np.ndarray | None, attention: np.ndarray | None, alt: str) -> list[dict[str, str]]:
    """The image, and what the model looks at in it."""
    if pixels is None:
        return []
    found = [{"uri": data_uri(pixels), "alt": alt}]
    if attention is not None:
        over = app_attention.over(pixels, attention)
        found.append({"uri": data_uri(over), "alt": f"attention in {alt}"})
    return found


def cosine(score: float, scores: Sequence[float]) -> str:
    """With as many digits as tell the scores of a list apart."""
    return f"{score:.3f}" if max(scores) - min(scores) >= 0.01 or len(scores) < 2 else f"{score:.5f}"


def percent(probability: float) -> str:
    """For people: never 0 or 100, which no model knows."""
    return "under 1%" if probability < 0.01 else "over 99%" if probability > 0.99 else f"{probability:.0%}"


def _tile(place: int, hit: Hit, scores: Sequence[float], has_cameras: bool) -> dict[str, Any]:
    """One match for the template."""
    lines = [{"kind": "score", "text": f"{place} · cosine {cosine(hit.answer.score, scores)}"}]
    if hit.probability is not None:
        sign = "✓ " if hit.same else ""
        lines.append({"kind": "same" if hit.same else "other", "text": f"{sign}{percent(hit.probability)} same person"})
    if hit.right is not None:
        lines.append({"kind": "label", "text": "label: same person" if hit.right else "label: another person"})
    if has_cameras:
        lines.append({"kind": "camera", "text": camera(hit.answer.camid)})
    lines.append({"kind": "name", "text": hit.label})
    mark = "" if hit.right is None else "right" if hit.right else "wrong"
    pictures = _pictures(hit.pixels, hit.attention, f"match {place}")
    return {"id": hit.answer.id, "mark": mark, "pictures": pictures, "missing": hit.missing, "lines": lines}


def _calibrated(known: Calibration | None) -> str:
    """What a per cent and a tick mean."""
    if known is None:
        return (
            "The model has no threshold for “same person”: finetune/eval.py --calibrate measures one. A list always "
            "has a first place, also when the person was never seen."
        )
    return (
        f"✓: the cosine is at least {known.threshold:.4g}, which on {known.title} accepted {known.tar:.1%} of the "
        f"pairs of one person and {known.far:.2%} of the others. Per cent: how likely one person is where "
        f"{known.prior:.0%} of all pairs are of one. A match is a hint to look at, never proof of who somebody is."
    )


def found(searcher: Searcher, query: Query, settings: Settings, result: Found, number: int, back: bool) -> str:
    """The matches. number: of the query in this session, so that the page knows a new one; back: whether there was one
    before."""
    gallery, hits = searcher.loaded().gallery, result.hits
    scores = [hit.answer.score for hit in hits]
    title = f"{len(hits)} nearest image{'' if len(hits) == 1 else 's'}" if hits else "No image found"
    tiles = [_tile(place, hit, scores, searcher.has_cameras) for place, hit in enumerate(hits, start=1)]
    notes = [*result.notes, SAID if query.sentence else _calibrated(gallery.calibration)]
    if settings.attention and not searcher.no_attention:
        notes.insert(0, "Second picture: the attention of the CLS token in the last block, mean over its heads; black "
                        "none, yellow the most in that picture. It says where the model looked, not why.")  # fmt: skip
    if any(hit.right is not None for hit in hits):
        notes.append("Frames: the labels of the gallery; solid: the query's person, dashed: another one.")
    attention = query.attention if settings.attention else None
    facts = [] if query.camid == UNKNOWN else [camera(query.camid)]
    facts += [f"identity {query.pid}"] if query.pid > 0 else []
    about = {"name": query.name, "facts": facts, "notes": query.notes, "missing": query.missing,
             "pictures": _pictures(query.pixels, attention, "the query")}  # fmt: skip
    rows = exported(hits)
    facts = {"gallery": searcher.folder.name, "model": PurePath(gallery.facts["model"]["ckpt"]).name,
             "images": len(gallery), "query": query.name, "settings": settings._asdict(), "answers": rows}  # fmt: skip
    return render(
        "app_found.html.j2", number=number, title=title, back=back, stem=f"matches-{searcher.folder.name}", query=about,
        tiles=tiles, pairs=bool(hits) and any(len(tile["pictures"]) > 1 for tile in tiles), notes=notes,
        csv=_inside("text/csv", as_csv(rows)), json=_inside("application/json", as_json(facts)),
    )  # fmt: skip


def browse(hits: Sequence[Hit], total: int, text: str, page: int, number: int, has_cameras: bool) -> str:
    """The page before a search: images of the gallery to begin with. total: how many there are with this name."""
    tiles = []
    for hit in hits:
        name = {"kind": "name", "text": hit.label}
        where = [{"kind": "camera", "text": camera(hit.answer.camid)}] if has_cameras else []
        pictures = _pictures(hit.pixels, None, "image of the gallery")
        tiles.append({"id": hit.answer.id, "pictures": pictures, "missing": hit.missing, "lines": [*where, name]})
    lead = "Choose an image of a person above, or one of the gallery here: the images that are nearest to it come up."
    if text and not total:
        lead = f"No image of the gallery has “{text}” in its name. Try a shorter piece of it, or leave the field empty."
    elif text:
        lead = f"{total:,} image{' has' if total == 1 else 's have'} “{text}” in the name. Choose one to search with."
    elif not total:
        lead = "The gallery is empty: finetune/search.py add puts images into it."
    title = "Images of the gallery" if tiles else "No images"
    more = total > len(hits)
    return render("app_browse.html.j2", number=number, title=title, lead=lead, tiles=tiles, text=text, page=page,
                  more=more)  # fmt: skip


def exported(hits: Sequence[Hit]) -> list[dict[str, Any]]:
    """The list for a program; what nobody knows is null, `image` is the name below its folder or in its set."""
    return [
        {
            "place": place,
            "id": hit.answer.id,
            "score": round(hit.answer.score, 6),  # cosine
            "distance": None if hit.distance is None else round(hit.distance, 6),
            "same": hit.same,
            "probability": None if hit.probability is None else round(hit.probability, 6),
            "image": hit.label,
            "camera": None if hit.answer.camid == UNKNOWN else hit.answer.camid,
            "identity": None if hit.answer.pid == UNKNOWN else hit.answer.pid,
        }
        for place, hit in enumerate(hits, start=1)
    ]


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """With a line of names; an image whose name a spreadsheet would compute gets a ' before it."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        name = row["image"]
        writer.writerow(row | {"image": f"'{name}" if name.startswith(tuple(FORMULA)) else name})
    return buffer.getvalue()


def as_json(facts: dict[str, Any]) -> str:
    """As text."""
    return json.dumps(facts, indent=1, ensure_ascii=False) + "\n"


def _inside(kind: str, text: str) -> str:
    """A file inside its own address, so that none lies on the server."""
    return f"data:{kind};charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}"
