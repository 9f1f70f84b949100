"""What is built is what is installed: a wheel and a source distribution with everything in them, and nothing else."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: What is no source.
_OTHERS = (".*_cache", ".git", ".hypothesis", ".servers", ".venv", "__pycache__", "*.egg-info", "build", "dist", "runs")

pytestmark = pytest.mark.slow


def _cannot_build() -> str | None:
    if importlib.util.find_spec("build") is None:
        return "the package `build` is not installed"
    version = importlib.metadata.version("setuptools")
    if int(version.partition(".")[0]) < 77:
        return f"setuptools {version} is older than 77"
    if not (ROOT / "README.md").is_file():
        return "there is no README.md yet"
    return None


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel that was built from the source distribution, and that distribution."""
    if reason := _cannot_build():
        pytest.skip(reason)
    out, source = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("source") / "bbprompt"
    # In a copy, for setuptools works in the source folder itself, where another process may be building.
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(*_OTHERS))
    # Without --wheel and --sdist the wheel is built from the unpacked source distribution, which so is tested too.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    existing = {path.name for path in source.iterdir()}
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert {path.name for path in source.iterdir()} - existing <= {"bbprompt.egg-info"}, "leaves nothing behind"
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def wanted() -> set[str]:
    """Everything that must be installed, as paths from site-packages."""
    endings = {".py", ".yaml", ".typed", ".jsonl", ".json", ".safetensors", ".md"}
    found = set()
    for folder, inside in (
        (ROOT / "bbprompt", "bbprompt"),
        (ROOT / "optimizers", "bbprompt/optimizers"),
        (ROOT / "backends", "bbprompt/backends"),
        (ROOT / "configs", "bbprompt/configs"),
    ):
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix in endings and "__pycache__" not in path.parts:
                found.add(f"{inside}/{path.relative_to(folder).as_posix()}")
    return found


def test_a_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    names = set(zipfile.ZipFile(built[0]).namelist())
    tops = {name.partition("/")[0] for name in names}
    assert "bbprompt" in tops
    assert all(top == "bbprompt" or top.endswith(".dist-info") for top in tops), tops
    assert len(tops) == 2
    installed = {name for name in names if name.startswith("bbprompt/") and not name.endswith("/")}
    assert wanted() - installed == set()
    assert installed - wanted() == set()
    for name in (
        "bbprompt/configs/methods/mp2-deep.yaml",
        "bbprompt/configs/tasks/lcqmc.yaml",
        "bbprompt/optimizers/cmaes.py",
        "bbprompt/backends/local.py",
        "bbprompt/py.typed",
    ):
        assert name in installed
    assert any(name.startswith("bbprompt/bundled/samples/lcqmc/") for name in installed)


def test_a_source_distribution_builds_and_is_tested(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        members = archive.getmembers()
    names = {member.name.partition("/")[2] for member in members}
    assert {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO"} <= names
    assert wanted() - names == set()
    assert not {name for name in names if name.startswith((".git", "runs", ".ci")) or "__pycache__" in name}


def test_an_installed_wheel_works_away_from_the_sources(built: tuple[Path, Path], tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(built[0]).extractall(site)
    code = (
        "import bbprompt, pathlib; from bbprompt.config import load_method, method_names;"
        "from bbprompt.tasks.task import load_task, task_names; from bbprompt.tasks.data import open_data;"
        "print(pathlib.Path(bbprompt.__file__).parent.parent);"
        "[load_method(name) for name in method_names()];"
        "[load_task(name) for name in task_names()];"
        "print(len(method_names()), len(task_names()), len(open_data(load_task('lcqmc'), 'sample').split('test')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    assert done.returncode == 0, done.stderr
    where, counts = done.stdout.splitlines()
    assert Path(where) == site
    methods, tasks, test = map(int, counts.split())
    assert methods >= 4
    assert tasks >= 45
    assert test >= 300


@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_pip_installs_it(kind: str, built: tuple[Path, Path], tmp_path: Path) -> None:
    """Into a new virtual environment, without a network: what it depends on comes from this one."""
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    place = tmp_path / "venv"
    venv.create(place, with_pip=False, symlinks=True)
    site = next(place.glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    source = tmp_path / "source"
    if kind == "editable":
        with tarfile.open(built[1]) as archive:
            archive.extractall(source, filter="data")
        (unpacked,) = source.iterdir()
    what = {"wheel": [str(built[0])], "sdist": [str(built[1])]}.get(kind) or ["--editable", str(unpacked)]
    pip = [sys.executable, "-m", "pip", "--python", str(place / "bin" / "python"), "--disable-pip-version-check"]
    flags = ["--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed"]
    done = subprocess.run([*pip, "install", *flags, *what], capture_output=True, text=True, check=False, env=bare)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    added = {path.name for path in site.iterdir()} - {"dependencies.pth", "__pycache__"}
    ours = {"bbprompt"} if kind != "editable" else {name for name in added if name.startswith("__editable__")}
    assert added == ours | {name for name in added if name.startswith("bbprompt-") and name.endswith(".dist-info")}
    script = place / "bin" / "bbprompt"
    words = ["tasks", "lcqmc", "--json"]
    done = subprocess.run([str(script), *words], capture_output=True, text=True, check=False, cwd=tmp_path, env=bare)
    assert done.returncode == 0, done.stderr
    assert '"lcqmc"' in done.stdout
    code = "import bbprompt.optimizers, bbprompt.backends, pathlib; print(pathlib.Path(bbprompt.__file__).resolve())"
    python = [str(place / "bin" / "python"), "-c", code]
    done = subprocess.run(python, capture_output=True, text=True, check=False, cwd=tmp_path, env=bare)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(unpacked if kind == "editable" else site)


def test_the_version_is_said_once(built: tuple[Path, Path]) -> None:
    import bbprompt

    name = built[0].name
    assert name.startswith(f"bbprompt-{bbprompt.__version__}-py3-none-any")
