"""Change the journal and the ledger in every small way, one at a time, and see whether their tests turn red.

``python tests/mutation.py`` makes mutants of the syntax trees: comparisons, conditions, constants, operators,
statements left out, results lost, exceptions no longer caught. Each runs the tests of both modules in a forked process.
Texts of messages are left alone. Survivors are listed, those of `EQUIVALENT` with the reason why no test can tell them;
the last line is a JSON object with the counts. Fewer than `LEAST` of a hundred killed, of all there are, is a failure.
"""

from __future__ import annotations

import ast
import json
import os
import signal
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depth import VARIABLE

LEAST = 90
#: So many times what the module itself takes, and a mutant that still runs then counts as killed.
PATIENCE = 5.0
#: Part of the examples that property tests draw: what none of the first ones notices is looked at by a person anyway.
DEPTH = "0.2"
HERE = Path(__file__).parent
MODULES = ("journal", "ledger")
TESTS = [str(HERE / f"test_{name}.py") for name in MODULES]
#: What takes its time, for those alone that all else lets live.
SLOW = ["test_any_records_survive_the_round_trip", "TestLedgerMachine"]

#: Mutants that do what the module does, and why.
EQUIVALENT: dict[str, str] = {
    "ledger: True -> False": "`strict` in `settle`, where lengths that differ were refused just before",
}

_SWAPS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Add,),
    ast.BitOr: (ast.BitAnd,),
}


@dataclass(frozen=True)
class Place:
    """Where a node hangs in the tree, and whether it is part of a message."""

    parent: ast.AST
    name: str
    index: int | None
    message: bool

    def put(self, node: Any) -> None:
        if self.index is None:
            setattr(self.parent, self.name, node)
        else:
            getattr(self.parent, self.name)[self.index] = node


def places(parent: ast.AST, message: bool = False) -> Iterator[tuple[Place, ast.AST]]:
    """All nodes but docstrings, type hints, imports and `__all__`."""
    for name, value in ast.iter_fields(parent):
        if name in ("annotation", "returns"):
            continue
        for index, node in enumerate(value) if isinstance(value, list) else ((None, value),):
            if not isinstance(node, ast.AST) or _passive(node):
                continue
            said = message or isinstance(node, ast.Raise | ast.JoinedStr) or "_log" in ast.unparse(node)[:5]
            yield Place(parent, name, index, said), node
            yield from places(node, said)


def _passive(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True  # a docstring
    named = [target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)]
    return isinstance(node, ast.Import | ast.ImportFrom) or bool({"__all__", "Kind", "_RESTORE"} & {*named})


def changes(node: ast.AST, message: bool) -> Iterator[ast.AST]:
    """What may stand in the place of a node."""
    for other in _SWAPS.get(type(node), ()):
        yield other()
    match node:
        case ast.Constant(value=bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(value=int() as value):
            yield ast.Constant(value + 1)
        case ast.Constant(value=str() | bytes() as value) if not message:
            yield ast.Constant(value + ("X" if isinstance(value, str) else b"X"))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield operand
        case ast.Return(value=ast.expr()):
            yield ast.Return(ast.Constant(None))
        case ast.Expr() | ast.Assign() | ast.AugAssign() | ast.Raise():
            yield ast.Pass()
        case ast.AnnAssign(value=ast.expr()):
            yield ast.Pass()


def more(place: Place, node: ast.AST) -> Iterator[ast.AST]:
    """Changes that depend on where a node hangs: conditions, and the members of a list of exceptions."""
    if place.name in ("test", "ifs"):
        yield from (ast.Constant(value=True), ast.Constant(value=False))
    if isinstance(place.parent, ast.ExceptHandler) and place.name == "type" and isinstance(node, ast.Tuple):
        for left in range(len(node.elts)):
            yield ast.Tuple(node.elts[:left] + node.elts[left + 1 :], ast.Load())


@dataclass(frozen=True)
class Mutant:
    """One change: its module, line, and the words before and after."""

    module: str
    line: int
    words: str
    code: types.CodeType

    def __str__(self) -> str:
        return f"{self.module}: {self.words}"


def mutants(module: str) -> Iterator[Mutant]:
    """Every mutant of a module of `bbprompt.store`."""
    path = HERE.parent / "bbprompt" / "store" / f"{module}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    line = 1
    for place, node in list(places(tree)):
        line = getattr(node, "lineno", line)
        for other in [*changes(node, place.message), *more(place, node)]:
            whole = place.parent if isinstance(node, ast.operator | ast.cmpop | ast.boolop) else node
            before = ast.unparse(whole)
            place.put(other)
            after = ast.unparse(place.parent if whole is place.parent else other)
            code = compile(ast.fix_missing_locations(ast.parse(ast.unparse(tree))), str(path), "exec")
            place.put(node)
            yield Mutant(module, line, " ".join(f"{before} -> {after}".split()), code)


def killed(mutant: Mutant | None, seconds: float, *words: str) -> bool:
    """Whether a test notices the mutant within so many seconds, or never ends, in a process of its own."""
    pid = os.fork()
    if not pid:
        os._exit(_tested(mutant, words))
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) != 0
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def _tested(mutant: Mutant | None, words: tuple[str, ...]) -> int:
    import pytest

    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    try:
        if mutant is not None:
            name = f"bbprompt.store.{mutant.module}"
            module = sys.modules[name] = types.ModuleType(name)
            exec(mutant.code, module.__dict__)
        # What `conftest` gives takes seconds to load, and no test of these modules wants it.
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--assert=plain", "--noconftest"]
        return int(pytest.main([*options, *TESTS, *words]))
    except BaseException:  # a module that cannot even be run
        return 1


def _alone(words: str) -> float:
    """Seconds that tests take without any change."""
    began = time.monotonic()
    assert not killed(None, 3600.0, "-k", words), "the tests fail without any change"
    return time.monotonic() - began


def main() -> None:
    os.environ[VARIABLE] = DEPTH
    import faultdisk  # what all tests import and no mutant changes, once for all forks
    import hypothesis.stateful  # noqa: F401
    import pytest  # noqa: F401

    assert faultdisk
    assert not {f"bbprompt.store.{name}" for name in MODULES} & sys.modules.keys()
    fast, slow = "not " + " and not ".join(SLOW), " or ".join(SLOW)
    patience = {words: PATIENCE * _alone(words) for words in (fast, slow)}
    total, lives = 0, []
    for mutant in (mutant for module in MODULES for mutant in mutants(module)):
        total += 1
        if not any(killed(mutant, seconds, "-k", words) for words, seconds in patience.items()):
            lives.append(mutant)
            reason = EQUIVALENT.get(str(mutant), "NOT EXPLAINED")
            print(f"{mutant.module}.py:{mutant.line}: {mutant.words}: {reason}", flush=True)
    score = 100 * (total - len(lives)) / total
    unknown = sum(str(mutant) not in EQUIVALENT for mutant in lives)
    print(
        json.dumps({"mutants": total, "killed": total - len(lives), "score": round(score, 1), "unexplained": unknown})
    )
    sys.exit(score < LEAST)


if __name__ == "__main__":
    main()
