"""What the search page keeps of its visitors, and for how long."""

import datetime
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("gradio", reason="the extra `app`")

from finetune.app_page import PAST, Page, Session
from finetune.app_search import Query
from finetune.app_server import KEPT, forget


def test_who_left_is_forgotten():
    now = datetime.datetime(2024, 1, 1)
    left = {"open": (False, 9), "left": (True, 9), "just left": (True, 0.9)}
    sessions = {name: SimpleNamespace(is_closed=closed) for name, (closed, _) in left.items()}
    used = {name: now - hours * KEPT for name, (_, hours) in left.items()}
    holder = SimpleNamespace(session_data=sessions, time_last_used=used)
    forget(holder, now)
    assert set(holder.session_data) == set(holder.time_last_used) == {"open", "just left"}


def test_of_earlier_pictures_the_bytes_are_not_kept():
    session = Session()
    for number in range(PAST + 5):
        session = session.ask(Query(f"{number}.jpg", np.zeros(2, np.float32), encoded=b"x"))
    assert session.query.encoded == b"x"
    assert [query.name for query in session.past] == [f"{number}.jpg" for number in range(4, PAST + 4)]
    assert {query.encoded for query in session.past} == {None}
    assert session.number == PAST + 5


def test_settings_come_from_the_labels_that_are_switched_on():
    assert Page.settings(24, [1, 3], ["Re-rank"]) == (24, (1, 3), False, True, False)
    assert Page.settings(12, None, ["Show attention", "Other cameras than the query's"]) == (12, (), True, False, True)


def test_what_a_network_without_attention_offers():
    there = Page._options(SimpleNamespace(has_cameras=False, no_attention="It has none."))
    assert there == {"choices": ["Re-rank"], "info": "It has none."}
