"""A page to search a gallery: drop a picture, click one of the gallery or say whom you look for, and see the nearest.

    python finetune/app.py runs/gallery                     http://127.0.0.1:7860, for this machine only
    python finetune/app.py runs/gallery runs/other          several galleries, also of different models
    python finetune/app.py runs/gallery --ckpt runs/market  where the gallery's model has moved
    python finetune/app.py runs/gallery --attention         with what the model looks at, from the start

finetune/search.py makes galleries. The page has no password: whoever reaches it sees the images. docs/app.md tells
what is stored (nothing), what is refused, and how to use it from another machine.
"""

import argparse
import importlib
import os
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

from finetune.app_guard import is_loopback
from finetune.app_search import Searcher
from finetune.app_uploads import MB
from finetune.extractor import Extractor
from finetune.gallery import Gallery
from recipes.errors import UserError, plain_errors

# before gradio is imported: it tells nobody anything, and asks nobody whether there is a newer one
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("galleries", nargs="+", type=Path, metavar="GALLERY", help="folder of finetune/search.py build")
    parser.add_argument("--ckpt", nargs="+", help="one model for all galleries, or one for each; default: their own")
    parser.add_argument("--device", help="cuda, cuda:1, cpu; default: the GPU if there is one")
    parser.add_argument("--precision", choices=("no", "bf16"), help="of the network; default: bf16 on a GPU, else no")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; default: 127.0.0.1, this machine")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860; 0 is any free one")
    parser.add_argument("--max-upload-mb", type=float, default=10, help="largest picture, in MB; default: 10")
    parser.add_argument("--attention", action="store_true", help="show from the start where the model looks")
    given = parser.parse_args()
    if not 0 <= given.port < 65536:
        parser.error(f"--port {given.port}: expected 0 to 65535")
    if not 0 < given.max_upload_mb <= 100:
        parser.error(f"--max-upload-mb {given.max_upload_mb:g}: expected more than 0 and at most 100")
    if given.ckpt and len(given.ckpt) not in (1, len(given.galleries)):
        parser.error(
            f"--ckpt names {len(given.ckpt)} models for {len(given.galleries)} galleries; give one, or as many"
        )
    return given


def server_module() -> ModuleType:
    """The page and its server; UserError without gradio."""
    os.environ.update(QUIET)
    try:
        return importlib.import_module("finetune.app_server")
    except ModuleNotFoundError as error:
        if error.name not in ("gradio", "fastapi", "uvicorn"):
            raise
        raise UserError(f"the search page needs {error.name}: pip install -e '.[app]'") from error


def searchers(given: argparse.Namespace) -> list[Searcher]:
    """The galleries with their models; equal models are loaded once."""
    found, models = [], {}
    ckpts = (given.ckpt or [None]) * (len(given.galleries) if len(given.ckpt or [None]) == 1 else 1)
    for folder, ckpt in zip(given.galleries, ckpts, strict=True):
        gallery = Gallery.load(folder)
        stored = gallery.facts["model"]
        wanted = ckpt or stored["ckpt"], stored["input"]["flip"]
        if wanted not in models:
            models[wanted] = Extractor(wanted[0], given.device, given.precision, flip=wanted[1])
        found.append(Searcher(gallery, models[wanted]))
    return found


def warn(host: str) -> None:
    """What it means to listen to others."""
    print(
        f"warning: --host {host} shows the images of people in these galleries to everybody who can reach this "
        "machine, without a password and unencrypted. Better: leave --host away and use `ssh -L`, or put a server with "
        "a login and https before it (docs/app.md).",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def main() -> None:
    """Entry point."""
    given = arguments()
    server = server_module()
    with server.listening(given.host, given.port) as sock:
        page = server.Page(searchers(given), int(given.max_upload_mb * MB), given.attention)
        if not is_loopback(given.host):
            warn(given.host)
        port = sock.getsockname()[1]
        server.Server(page, given.host, port, partial(print, flush=True)).run(sockets=[sock])


if __name__ == "__main__":
    with plain_errors():
        main()
