"""The server of the search page."""

import asyncio
import contextlib
import datetime
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI

from finetune import app_views
from finetune.app_guard import Guard, is_loopback
from finetune.app_page import Page
from recipes.errors import UserError

KEPT = datetime.timedelta(hours=1)  # after the page was closed: a laptop may sleep, and go on
FONTS = ["ui-sans-serif", "system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # of the visitor's own machine


def forget(holder: Any, now: datetime.datetime) -> None:
    """Drop what visitors left who closed the page an hour ago. holder: gradio's sessions; it would drop their queries
    itself, but keep the lists that it sent them, pictures and all."""
    for name, session in list(holder.session_data.items()):
        if session.is_closed and now - holder.time_last_used.get(name, now) > KEPT:
            holder.session_data.pop(name, None)
            holder.time_last_used.pop(name, None)


def application(page: Page, host: str, port: int) -> Guard:
    """The page as an ASGI application, behind the guard."""

    @contextlib.asynccontextmanager
    async def forgetting(_: FastAPI) -> AsyncIterator[None]:
        async def again_and_again() -> None:
            while True:
                await asyncio.sleep(60)
                forget(outer.routes[-1].app.state_holder, datetime.datetime.now())

        task = asyncio.create_task(again_and_again())
        yield
        task.cancel()

    theme = gr.themes.Default(primary_hue="blue", font=FONTS[0], font_mono=FONTS[1])
    outer = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=forgetting)
    # errors of ours are not told to the visitor: they may name files; the terminal has them
    gr.mount_gradio_app(
        outer, page.blocks(), "/", server_name=host, server_port=port,
        footer_links=[], run_history=False, show_error=False, max_file_size=1, enable_monitoring=False, ssr_mode=False,
        pwa=False, mcp_server=False, theme=theme, css=app_views.source("app.css"),
    )  # fmt: skip
    return Guard(outer, page.max_bytes, is_loopback(host))


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there, before a browser is told; UserError where it cannot. port: 0 for any free one."""
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=kind, backlog=128)
    except (OSError, OverflowError) as error:
        told = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        raise UserError(
            f"nothing can listen at --host {host} --port {port} ({told}); if another program is there, give another "
            "--port, or 0 for any free one"
        ) from error


class Server(uvicorn.Server):
    """Says where it is once it answers."""

    def __init__(self, page: Page, host: str, port: int, told: Callable[[str], None]):
        """Ctrl-C ends it; browsers that stay connected are not waited for."""
        guarded = application(page, host, port)
        super().__init__(uvicorn.Config(guarded, log_level="warning", timeout_graceful_shutdown=1, ws="none"))
        self.url, self.told = f"http://{f'[{host}]' if ':' in host else host}:{port}", told

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.told(f"{self.url}  (Ctrl-C ends it)")
