"""The search page in gradio: controls, and what happens when they change.

Only this file and app_server.py know gradio. The state of a visitor is a Session, which the server keeps; of the
browser it believes nothing but what app_uploads.py checked. Pictures travel inside the HTML, so no file is served.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from finetune import app_uploads, app_views
from finetune.app_search import LONGEST, Query, Searcher, Settings
from recipes.errors import UserError

TOPS = (12, 24, 48)  # how many matches may be asked for
EXAMPLES = 12
OPTIONS = {  # switches of Settings
    "other_cameras": "Other cameras than the query's",
    "rerank": "Re-rank",
    "attention": "Show attention",
}
PAST = 20  # queries that "back" goes through
WAITING = 32  # searches that may wait; more visitors are told to come back
SESSIONS = 100  # visitors whose state is kept; each holds up to 5 MB, most of it the list that was sent last
PLAIN = {"apply_default_css": False}  # of gr.HTML: app.css says how it looks


@dataclass(frozen=True)
class Session:
    """What one visitor is doing."""

    gallery: int = 0  # place among those of the server
    query: Query | None = None
    past: tuple[Query, ...] = ()  # queries before it, the last one last
    number: int = 0  # counts queries and pages of examples: tells the page that the list is a new one
    text: str = ""  # that the examples have in their names
    page: int = 0  # of the examples

    def ask(self, query: Query) -> "Session":
        """With another query. Of those before it the bytes go: twenty of them would be 20 MB a visitor."""
        past = self.past if self.query is None else (*self.past, replace(self.query, encoded=None))[-PAST:]
        return replace(self, query=query, past=past, number=self.number + 1)


class Page:
    """The page over some galleries."""

    def __init__(self, searchers: Sequence[Searcher], max_bytes: int, attention: bool):
        self.searchers, self.max_bytes, self.attention = list(searchers), max_bytes, attention

    # ---- what a visitor sees

    def _camera_choices(self, place: int) -> list[tuple[str, int]]:
        return [(app_views.camera(camid), camid) for camid in self.searchers[place].loaded().cameras]

    def _result(self, session: Session, controls: Sequence[Any]) -> str:
        """HTML of the list, or of what to begin with; UserError."""
        searcher = self.searchers[session.gallery]
        if session.query is None:
            hits, total = searcher.examples(session.text, session.page, EXAMPLES)
            told = session.text, session.page, session.number, searcher.has_cameras
            return app_views.browse(hits, total, *told)
        settings = self.settings(*controls)
        found = searcher.search(session.query, settings)
        return app_views.found(searcher, session.query, settings, found, session.number, bool(session.past))

    def _shown(self, session: Session, controls: Sequence[Any]) -> tuple[str, Any]:
        """HTML of the message and of the result; what was shown stays where there is a message."""
        try:
            return app_views.message(), self._result(session, controls)
        except UserError as error:
            return app_views.message(str(error)), gr.skip()

    @staticmethod
    def settings(top: Any, cameras: Any, options: Any) -> Settings:
        """From the controls; gradio has checked that they are among the choices."""
        chosen = {name: label in options for name, label in OPTIONS.items()}
        return Settings(int(top), tuple(int(camid) for camid in cameras or ()), **chosen)

    # ---- what a visitor does; each gives the new session, message and result

    def _asked(self, session: Session, controls: Sequence[Any], query: Callable[[], Query]) -> tuple:
        """A new query, or the sentence why there is none; what was shown then stays."""
        try:
            session = session.ask(query())
        except UserError as error:
            return session, app_views.message(str(error)), gr.skip()
        return session, *self._shown(session, controls)

    def sent(self, event: gr.EventData, session: Session, *controls: Any) -> tuple:
        """A picture was chosen, dropped or pasted."""
        searcher = self.searchers[session.gallery]
        return self._asked(session, controls, lambda: searcher.upload(app_uploads.read(event._data, self.max_bytes)))

    def said(self, session: Session, sentence: str, *controls: Any) -> tuple:
        """A sentence was typed."""
        searcher = self.searchers[session.gallery]
        return self._asked(session, controls, lambda: searcher.sentence(sentence))

    def picked(self, event: gr.EventData, session: Session, *controls: Any) -> tuple:
        """An image of the gallery was clicked."""
        searcher = self.searchers[session.gallery]

        def query() -> Query:
            return searcher.member(app_uploads.whole(app_uploads.field(event._data, "id"), "the id of an image"))

        return self._asked(session, controls, query)

    def back(self, session: Session, *controls: Any) -> tuple:
        """To the query before."""
        if session.past:
            query, past = session.past[-1], session.past[:-1]
            session = replace(session, query=query, past=past, number=session.number + 1)
        return session, *self._shown(session, controls)

    def browse(self, event: gr.EventData, session: Session, *controls: Any) -> tuple:
        """To the images of the gallery: those with a text in their names, or others than now."""
        text, page = (app_uploads.field(event._data, name) for name in ("text", "page"))
        text = text.strip()[:200] if isinstance(text, str) else ""
        page = page if type(page) is int and 0 <= page < 1 << 31 else 0
        session = replace(session, query=None, past=(), text=text, page=page, number=session.number + 1)
        return session, *self._shown(session, controls)

    def changed(self, session: Session, *controls: Any) -> tuple:
        """Another setting."""
        return session, *self._shown(session, controls)

    def arrived(self, _: Session, *controls: Any) -> tuple:
        """The page was opened: the gallery may have changed since the server began."""
        session = Session()  # after a reload the browser shows the controls as at first, so the rest begins anew, too
        try:
            return session, app_views.message(), self._result(session, controls), *self._about(session.gallery)
        except UserError as error:
            return session, app_views.message(str(error)), gr.skip(), gr.skip(), gr.skip()

    def _about(self, place: int) -> tuple[str, gr.Dropdown]:
        """The line on the gallery, and its cameras."""
        searcher = self.searchers[place]
        return app_views.head(searcher), gr.Dropdown(
            choices=self._camera_choices(place), value=[], visible=searcher.has_cameras
        )

    def chosen(self, before: Session, place: int, *controls: Any) -> tuple:
        """Another gallery: the same picture or sentence is searched for there, if that can be done."""
        session, told = Session(int(place), number=before.number + 1), app_views.message()
        searcher = self.searchers[session.gallery]
        if before.query is not None:
            try:
                session = replace(session, query=self._again(before, searcher))
            except UserError as error:
                told = app_views.message(str(error))
        there = self._options(searcher)
        kept = [label for label in there["choices"] if label in controls[2]]
        try:
            about = *self._about(session.gallery), gr.CheckboxGroup(value=kept, **there)
            field = gr.Textbox(visible=searcher.reads_sentences)
            return session, told, self._result(session, (controls[0], (), kept)), *about, field
        except UserError as error:
            return before, app_views.message(str(error)), *[gr.skip()] * 5

    def _again(self, before: Session, searcher: Searcher) -> Query:
        """The query of a session, for another gallery; UserError."""
        query = before.query
        if query.sentence:
            return searcher.sentence(query.name)
        encoded = self.searchers[before.gallery].original(query)
        return searcher.upload(app_uploads.opened(app_uploads.shown_name(query.name), encoded))

    @staticmethod
    def _options(searcher: Searcher) -> dict[str, Any]:
        """What can be switched on with this gallery, and why something cannot."""
        absent = set() if searcher.has_cameras else {"other_cameras"}
        absent |= {"attention"} if searcher.no_attention else set()
        choices = [label for name, label in OPTIONS.items() if name not in absent]
        return {"choices": choices, "info": searcher.no_attention or None}

    # ---- the page

    def blocks(self) -> gr.Blocks:
        """All of it."""
        first = self.searchers[0]
        with gr.Blocks(title="Search people", analytics_enabled=False) as blocks:
            session = gr.State(Session())
            head = gr.HTML(app_views.head(first), js_on_load=None, **PLAIN)
            with gr.Row():
                drop, sentence, message = self._inputs(first)
                place, controls = self._controls(first)
            result = gr.HTML("", js_on_load=app_views.source("app_result.js"), **PLAIN)
            given, shown = [session, *controls], [session, message, result]
            how = {"concurrency_id": "search", "concurrency_limit": 1, "api_visibility": "private"}
            for listen, act in ((drop.sent, self.sent), (result.picked, self.picked), (result.back, self.back),
                                (result.browse, self.browse)):  # fmt: skip
                listen(act, given, shown, show_progress="minimal", show_progress_on=[result], **how)
            sentence.submit(self.said, [session, sentence, *controls], shown, show_progress="minimal",
                            show_progress_on=[result], **how)  # fmt: skip
            for control in controls:
                control.input(self.changed, given, shown, show_progress="minimal", show_progress_on=[result],
                               trigger_mode="always_last", **how)  # fmt: skip
            if place is not None:
                outputs = [*shown, head, *controls[1:], sentence]
                place.input(self.chosen, [session, place, *controls], outputs, show_progress_on=[result], **how)
            blocks.load(self.arrived, given, [*shown, head, controls[1]], show_progress="hidden", **how)
        blocks.queue(max_size=WAITING, api_open=False)
        blocks.state_session_capacity = SESSIONS
        return blocks

    def _inputs(self, first: Searcher) -> tuple[gr.HTML, gr.Textbox, gr.HTML]:
        """What a visitor searches with, and the sentence where that fails."""
        with gr.Column(scale=2, min_width=280):
            drop = gr.HTML(app_views.drop(self.max_bytes), js_on_load=app_views.source("app_drop.js"), **PLAIN)
            sentence = gr.Textbox(
                label="or say in English whom you look for, and press Enter", max_lines=1, max_length=LONGEST,
                placeholder="a woman in a red coat with a white bag", visible=first.reads_sentences,
            )  # fmt: skip
            told = app_views.source("app_message.js")
            return drop, sentence, gr.HTML(app_views.message(), js_on_load=told, **PLAIN)

    def _controls(self, first: Searcher) -> tuple[gr.Radio | None, list]:
        """The gallery, where there are several, and the settings in the order of `settings`."""
        with gr.Column(scale=3, min_width=280):
            names = [(searcher.folder.name, number) for number, searcher in enumerate(self.searchers)]
            if len({name for name, _ in names}) < len(names):
                names = [("/".join(self.searchers[number].folder.parts[-2:]), number) for _, number in names]
            place = gr.Radio(names, value=0, label="Gallery") if len(names) > 1 else None
            with gr.Row():
                top = gr.Radio(TOPS, value=TOPS[0], label="Matches", min_width=180)
                cameras = gr.Dropdown(
                    self._camera_choices(0), value=[], multiselect=True, label="Only these cameras (none: all)",
                    visible=first.has_cameras, min_width=220,
                )  # fmt: skip
            attention = self.attention and first.no_attention is None
            options = gr.CheckboxGroup(
                value=[OPTIONS["attention"]] if attention else [], label="Options", **self._options(first)
            )
        return place, [top, cameras, options]
