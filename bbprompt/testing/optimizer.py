"""The conformance suite for optimizers."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bbprompt.testing.checks import equal, refused, require
from bbprompt.testing.losses import sphere

if TYPE_CHECKING:
    from bbprompt.optimizers import Optimizer

__all__ = ["OptimizerContract"]


class OptimizerContract:
    """What every optimizer must do; see `bbprompt.optimizers.Optimizer`.

    Attributes:
        target: "module:name" of a callable that builds the optimizer, importable in another process too.
        arguments: keyword arguments for it, plain JSON values.
        dim: width of a row.
        binary: whether rows hold only 0 and 1; told rows are then drawn from {0, 1}^dim.
        rounds: asks in the tests that look at a sequence.
    """

    target: ClassVar[str]
    arguments: ClassVar[Mapping[str, Any]]
    dim: ClassVar[int]
    binary: ClassVar[bool] = False
    rounds: ClassVar[int] = 4

    def make(self) -> Optimizer:
        """Build a fresh optimizer."""
        return _build(self.target, self.arguments)

    def loss(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Score rows `(n, dim)`: a smooth loss without ties that all kinds of rows can be given."""
        return sphere(rows, np.linspace(0.1, 0.8, self.dim) ** 2)

    def foreign(self) -> NDArray[np.float64]:
        """Return rows that were never asked for, as many as one ask has."""
        count = len(self.make().ask())
        rng = np.random.default_rng(20_000)
        if not self.binary:
            return rng.uniform(-1.0, 1.0, size=(count, self.dim))
        rows = rng.integers(0, 2, size=(count, self.dim)).astype(np.float64)
        rows[:, 0] = 1.0
        return rows

    def test_asked_rows_have_the_promised_shape(self) -> None:
        """Asks give finite float64 arrays `(n, dim)`."""
        optimizer = self.make()
        for _ in range(self.rounds):
            rows = optimizer.ask()
            require(isinstance(rows, np.ndarray) and rows.dtype == np.float64, "ask gives no float64 array")
            require(rows.ndim == 2 and len(rows) >= 1, f"ask gives shape {rows.shape}, not (n, dim), n >= 1")
            require(rows.shape[1] == self.dim, f"rows are {rows.shape[1]} wide instead of {self.dim}")
            require(bool(np.all(np.isfinite(rows))), "an asked row is not finite")
            if self.binary:
                require(bool(np.all((rows == 0) | (rows == 1))), "an asked row is not binary")
            optimizer.tell(rows, self.loss(rows))

    def test_same_arguments_and_tells_give_the_same_asks(self) -> None:
        """Two equal optimizers go the same way, bit for bit."""
        first, second = self.make(), self.make()
        for _ in range(self.rounds):
            rows = first.ask()
            require(equal(rows, second.ask()), "two equal optimizers ask for different rows")
            first.tell(rows, self.loss(rows))
            second.tell(rows, self.loss(rows))

    def test_other_processes_ask_for_the_same_rows(self) -> None:
        """A process with another hash seed goes the same way, bit for bit."""
        here = _digest_of_asks(self.make(), lambda rows: OptimizerContract.loss(self, rows), self.rounds)
        code = (
            "import json, sys; from bbprompt.testing import optimizer as t; a = json.loads(sys.argv[1]);"
            "c = type('C', (t.OptimizerContract,), a); o = c();"
            "print(t._digest_of_asks(o.make(), o.loss, o.rounds))"
        )
        settings = {
            "target": self.target,
            "arguments": dict(self.arguments),
            "dim": self.dim,
            "rounds": self.rounds,
        }
        seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(  # noqa: S603  our own interpreter and code
            [sys.executable, "-c", code, json.dumps(settings)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        require(done.returncode == 0, f"the other process failed:\n{done.stderr}")
        require(done.stdout.strip() == here, "another process asks for other rows")

    def test_replay_restores_it(self) -> None:
        """Telling the same again, with or without asking, leads to the same next ask."""
        original = self.make()
        told = []
        for _ in range(self.rounds):
            rows = original.ask()
            told.append((rows, self.loss(rows)))
            original.tell(*told[-1])
        asking, silent = self.make(), self.make()
        for rows, losses in told:
            asking.ask()
            asking.tell(rows, losses)
            silent.tell(rows, losses)
        expected = original.ask()
        require(equal(asking.ask(), expected), "after replaying asks and tells the next ask differs")
        require(equal(silent.ask(), expected), "after replaying the tells alone the next ask differs")
        require(asking.stop == original.stop == silent.stop, "after a replay stop differs")
        require(asking.best[1] == original.best[1] == silent.best[1], "after a replay best differs")

    def test_asking_twice_is_refused(self) -> None:
        """A second ask needs a tell in between."""
        optimizer = self.make()
        rows = optimizer.ask()
        refused(RuntimeError, optimizer.ask)
        optimizer.tell(rows, self.loss(rows))
        optimizer.ask()

    def test_bad_tells_are_refused_and_change_nothing(self) -> None:
        """NaN, -inf and wrong shapes raise ValueError and leave no trace."""
        optimizer, untouched = self.make(), self.make()
        rows = optimizer.ask()
        untouched.ask()
        losses = self.loss(rows)
        broken_row = rows.copy()
        broken_row[-1, -1] = np.nan
        with_nan, with_minus_inf = losses.copy(), losses.copy()
        with_nan[-1], with_minus_inf[-1] = np.nan, -np.inf
        refused(ValueError, lambda: optimizer.tell(rows, with_nan))
        refused(ValueError, lambda: optimizer.tell(rows, with_minus_inf))
        refused(ValueError, lambda: optimizer.tell(broken_row, losses))
        refused(ValueError, lambda: optimizer.tell(rows[0], losses[:1]))
        refused(ValueError, lambda: optimizer.tell(rows[:, :-1], losses))
        refused(ValueError, lambda: optimizer.tell(np.hstack([rows, rows[:, :1]]), losses))
        refused(ValueError, lambda: optimizer.tell(rows, np.append(losses, 1.0)))
        refused(ValueError, lambda: optimizer.tell(rows[:0], losses[:0]))
        refused(RuntimeError, lambda: optimizer.best)
        optimizer.tell(rows, losses)
        untouched.tell(rows, losses)
        require(equal(optimizer.ask(), untouched.ask()), "a refused tell changed the optimizer")

    def test_global_generators_are_neither_read_nor_changed(self) -> None:
        """Randomness of numpy, random and torch outside plays no part."""
        first, second = self.make(), self.make()
        saved = np.random.get_state(), random.getstate(), _torch_state()
        try:
            for turn in range(self.rounds):
                random.seed(turn)
                np.random.seed(turn)
                before = _global_state()
                rows = first.ask()
                first.tell(rows, self.loss(rows))
                require(_global_state() == before, "a global random generator was used")
                random.seed(1000 + turn)
                np.random.seed(1000 + turn)
                require(equal(second.ask(), rows), "rows depend on a global random generator")
                second.tell(rows, self.loss(rows))
        finally:
            np.random.set_state(saved[0])
            random.setstate(saved[1])
        require(_torch_state() == saved[2], "torch's global generator or number of threads was changed")

    def test_infeasible_rows_are_the_worst(self) -> None:
        """Some or all losses of +inf are taken in."""
        optimizer = self.make()
        for turn in range(self.rounds):
            rows = optimizer.ask()
            losses = self.loss(rows)
            if turn == 0:
                losses[:] = np.inf
            losses[0] = np.inf
            optimizer.tell(rows, losses)
            if turn == 0:
                row, loss = optimizer.best
                require(loss == np.inf and equal(row, rows[0]), "all rows infeasible: best is not the first")
        require(bool(np.all(np.isfinite(optimizer.ask()))), "an asked row is not finite")

    def test_flat_losses_end_nothing(self) -> None:
        """Five rounds of equal losses do not stop it."""
        optimizer = self.make()
        for _ in range(5):
            rows = optimizer.ask()
            optimizer.tell(rows, np.full(len(rows), 0.5))
            require(optimizer.stop in (None, "exhausted"), f"flat losses stopped it: {optimizer.stop}")
        if optimizer.stop is None:
            require(bool(np.all(np.isfinite(optimizer.ask()))), "an asked row is not finite")

    def test_best_is_the_best_of_all_told_rows(self) -> None:
        """The earliest row of the lowest loss is best at any time."""
        optimizer = self.make()
        refused(RuntimeError, lambda: optimizer.best)
        seen: list[NDArray[np.float64]] = []
        scored: list[float] = []
        for _ in range(self.rounds):
            rows = optimizer.ask()
            losses = self.loss(rows)
            optimizer.tell(rows, losses)
            seen.extend(rows)
            scored.extend(losses)
            row, loss = optimizer.best
            require(loss == min(scored), "best has another loss than the lowest told")
            require(equal(row, seen[int(np.argmin(scored))]), "best has another row than that of its loss")

    def test_warm_start(self) -> None:
        """Rows that were never asked for can be told first, and count."""
        optimizer, twin = self.make(), self.make()
        rows = self.foreign()
        losses = np.arange(len(rows), dtype=np.float64) - 100.0
        optimizer.tell(rows, losses)
        twin.tell(rows, losses)
        for _ in range(self.rounds):
            asked = optimizer.ask()
            require(equal(asked, twin.ask()), "after a warm start two equal optimizers differ")
            optimizer.tell(asked, self.loss(asked))
            twin.tell(asked, self.loss(asked))
        row, loss = optimizer.best
        require(loss == -100.0 and equal(row, rows[0]), "best overlooks rows of the warm start")

    def test_arrays_are_not_shared_with_the_caller(self) -> None:
        """Changing arrays given or received changes nothing inside."""
        careful, careless = self.make(), self.make()
        for _ in range(self.rounds):
            rows = careful.ask()
            losses = self.loss(rows)
            careful.tell(rows, losses)
            mutable = careless.ask()
            require(equal(mutable, rows), "an array that the caller changed is still in use")
            mutable[:] = rows
            mutable_losses = losses.copy()
            careless.tell(mutable, mutable_losses)
            mutable[:] = 77.0
            mutable_losses[:] = -77.0
            careless.best[0][:] = 55.0
        require(equal(careless.best[0], careful.best[0]), "best changes with an array of the caller")
        spoiled, kept = self.make(), self.make()
        asked = spoiled.ask()
        original = asked.copy()
        asked[:] = 33.0
        spoiled.tell(original, self.loss(original))
        kept.tell(kept.ask(), self.loss(original))
        require(equal(spoiled.ask(), kept.ask()), "an asked array that the caller changed is still in use")


def _digest_of_asks(
    optimizer: Optimizer, loss: Callable[[NDArray[np.float64]], NDArray[np.float64]], rounds: int
) -> str:
    """Return a SHA-256 over the bytes of all rows asked for in some rounds of ask and tell."""
    digest = hashlib.sha256()
    for _ in range(rounds):
        rows = optimizer.ask()
        digest.update(np.ascontiguousarray(rows).tobytes())
        optimizer.tell(rows, loss(rows))
    return digest.hexdigest()


def _build(target: str, arguments: Mapping[str, Any]) -> Optimizer:
    module, _, name = target.partition(":")
    built: Optimizer = getattr(importlib.import_module(module), name)(**arguments)
    return built


def _global_state() -> tuple[object, object, object]:
    name, numbers, *rest = np.random.get_state()
    return (name, np.asarray(numbers).tobytes(), tuple(rest)), random.getstate(), _torch_state()


def _torch_state() -> object:
    """Return what torch holds globally, or None while nothing has imported it."""
    torch = sys.modules.get("torch")
    return None if torch is None else (bytes(torch.get_rng_state().tolist()), torch.get_num_threads())
