"""The walls of the house: who may import whom, how long a file may get, which names are not to be used."""

import ast
import functools
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("recipes", "shards", "pretrain", "finetune")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
EVERYTHING = sorted([*SOURCES, *(ROOT / "bench").rglob("*.py"), *(ROOT / "tests").rglob("*.py")])
FILE_LINES, ENTRY_LINES, FUNCTION_LINES = 300, 150, 60


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module(path: Path) -> str:
    return name(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def is_entry(path: Path) -> bool:
    """Whether a file is meant to be run: it has `if __name__ == "__main__"` at its top level."""
    return any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree(path).body)


def entries() -> list[Path]:
    return [path for path in SOURCES if is_entry(path)]


@functools.cache
def imports() -> grimp.ImportGraph:
    return grimp.build_graph(*PACKAGES, cache_dir=None)


def test_the_contracts_of_setup_cfg_hold():
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", program, "--config", str(ROOT / "setup.cfg"), "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_nobody_imports_an_entry_script():
    # a class or a global of a script that is run and imported exists twice
    breaches = {module(path): sorted(imports().find_modules_that_directly_import(module(path))) for path in entries()}
    assert not {script: importers for script, importers in breaches.items() if importers}


@pytest.mark.parametrize("package", ["shards", "pretrain", "finetune"])
def test_inside_a_package_only_entry_scripts_import_the_composed_config(package):
    # a later stage may read it, to run this stage from a recipe
    config = f"{package}.config"
    readers = imports().find_modules_that_directly_import(config) if config in imports().modules else set()
    own = {reader for reader in readers if reader.startswith(f"{package}.")}
    assert not own - {module(path) for path in entries()}


@pytest.mark.parametrize("path", entries(), ids=name)
def test_entry_scripts_define_functions_only(path):
    classes = [node.name for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)]
    assert not classes, f"{name(path)} defines {classes}; a class in a script exists twice, as __main__ and as module"


def test_files_and_functions_stay_readable():
    faults = []
    for path in EVERYTHING:
        budget = ENTRY_LINES if is_entry(path) and path in SOURCES else FILE_LINES
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > budget:
            faults.append(f"{name(path)} has {lines} lines of {budget}")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > FUNCTION_LINES:
                    faults.append(f"{name(path)}:{node.lineno} {node.name} has {length} lines of {FUNCTION_LINES}")
    assert not faults, "\n".join(faults)


def test_every_shared_idea_has_a_home():
    drawers = {"common", "utils", "util", "misc", "helpers", "helper", "tools"}
    found = [name(path) for path in EVERYTHING if drawers & {part.removesuffix(".py") for part in path.parts[-3:]}]
    assert not found, f"{found}: put it into the earliest stage that owns the idea"


@functools.cache
def taken_names() -> frozenset[str]:
    """Top-level names of the standard library, of everything installed here, and of likely neighbours."""
    installed = {key for key, owners in metadata.packages_distributions().items() if set(owners) != {"personssl"}}
    return frozenset(installed | set(sys.stdlib_module_names) | {"datasets", "evaluate", "wandb", "cv2", "lmdb"})


@pytest.mark.parametrize("package", [*PACKAGES, "bench"])
def test_no_module_hides_another_package(package):
    # `accelerate launch pretrain/run.py` puts pretrain/ in front of everything on the search path
    own = {path.stem if path.is_file() else path.name for path in python_children(ROOT / package)}
    assert not own & taken_names()


def python_children(folder: Path) -> list[Path]:
    """Modules and packages directly in a folder."""
    packages = [path.parent for path in folder.glob("*/*.py")]
    return [*(path for path in folder.glob("*.py") if path.stem != "__init__"), *packages]


def test_every_folder_with_code_is_a_package():
    # without __init__.py it is missing from an installed copy and invisible to the import checks
    assert [
        name(folder) for folder in {path.parent for path in SOURCES} if not (folder / "__init__.py").is_file()
    ] == []


def test_nothing_knows_the_machine_that_it_was_written_on():
    place = re.compile(r"(?<![\w.}])/(?:home|Users|root|work|scratch|mnt)/\w")
    texts = [*EVERYTHING, *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *(ROOT / "recipes").rglob("*.yaml")]
    texts += [ROOT / "setup.cfg", ROOT / "pyproject.toml", ROOT / "Makefile"]
    found = [
        f"{name(path)}:{number}"
        for path in texts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if place.search(line)
    ]
    assert not found


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_pages_name_files_that_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    pattern = r"(?<![\w/<])((?:recipes|shards|pretrain|finetune|tests|bench|docs)/[\w./]+\.(?:py|yaml|md|json))\b"
    named = {path for path in re.findall(pattern, text) if "NAME" not in path}
    missing = sorted(path for path in named if not (ROOT / path).exists())
    assert not missing, f"{page} names {missing}"


def test_one_faiss_is_installed():
    # the CPU and the GPU builds provide the same module and break each other
    assert len(metadata.packages_distributions()["faiss"]) == 1
