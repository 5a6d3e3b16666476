"""One page about a run: report.html, a single file that opens from disk, on a phone too, without a network.

    python finetune/report.py runs/pretrain              a pretraining, a fine-tune or an evaluation: RUN/report.html
    python finetune/report.py runs/a runs/b runs/c       compares up to 8 of them: compare.html
    python finetune/report.py runs/pretrain --pictures runs/seen      with what pretrain/pictures.py drew

It reads what the run left behind, also while it is still going, and says what is missing (docs/reports.md).
"""

import argparse
from pathlib import Path

from finetune import page
from finetune.config import FinetuneConfig
from finetune.page_run import FINETUNE, PRETRAINING, open_run
from pretrain.config import PretrainConfig
from recipes.errors import UserError, plain_errors

COMPARED = "compare.html"
MODELS = {PRETRAINING: PretrainConfig, FINETUNE: FinetuneConfig}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, or the folder of an evaluation")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help=f"default: RUN/{page.NAME}, or {COMPARED}")
    parser.add_argument(
        "--pictures", type=Path, nargs="+", default=[], metavar="FOLDER", help="that pretrain/pictures.py wrote"
    )
    given = parser.parse_args()
    if given.out is None:
        given.out = given.runs[0] / page.NAME if len(given.runs) == 1 else Path(COMPARED)
    return given


def main() -> None:
    """Entry point."""
    given = arguments()
    if len(given.runs) > page.MOST_RUNS:
        raise UserError(f"{len(given.runs)} runs are too many for one page; give at most {page.MOST_RUNS}")
    if given.pictures and len(given.runs) > 1:
        raise UserError(
            "--pictures belongs to the page of one run, not to a comparison; give one run, or leave it away"
        )
    if given.out.suffix != ".html":
        raise UserError(f"--out {given.out} must end in .html")
    if given.out.is_dir():
        raise UserError(f"--out {given.out} is a folder; give the name of a file in it")
    page.write([open_run(folder) for folder in given.runs], MODELS, given.out, given.pictures)


if __name__ == "__main__":
    with plain_errors():
        main()
