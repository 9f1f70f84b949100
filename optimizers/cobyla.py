"""COBYLA by scipy, turned inside out: rows are asked for and told instead of a function being called.

Constrained optimization by linear approximation (Powell 1994; scipy runs the PRIMA translation): a simplex of
dim + 1 rows gives a linear model of the loss, which is minimised within a shrinking trust region. It draws no
random numbers. In BBT-RGB (Sun et al. 2023, arXiv:2305.08088) it refines what CMA-ES has found.
"""

from __future__ import annotations

import math
import queue
import threading
import weakref

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize

from bbprompt.optimizers.history import History

__all__ = ["COBYLA"]

_MOST = 10**6  # evaluations; the budget is the caller's
_WORST = 1e30  # what +inf is to a linear model


class COBYLA:
    """A local search without gradients, one row an ask.

    The first dim + 1 rows are the start and one step of `step` along each coordinate; only then does the model have
    a say, so at few calls in many dimensions this is a coordinate search. Rows told from elsewhere count for `best` and
    leave the simplex alone.

    scipy's function waits in a thread of its own for each loss. It runs only while an ask or a tell does, and ends
    when the optimizer is collected.
    """

    def __init__(self, x0: ArrayLike, step: float, tolerance: float = 1e-4) -> None:
        """Set up the search.

        Args:
            x0: `(dim,)`, dim >= 1, where it starts.
            step: first radius of the trust region, > 0.
            tolerance: radius at which it has converged, as a share of `step`, in (0, 1).

        Raises:
            ValueError: an argument is out of range.
        """
        start = np.array(x0, dtype=np.float64)
        if start.ndim != 1 or len(start) < 1 or not np.all(np.isfinite(start)):
            raise ValueError(f"x0 must be finite with shape (dim,) and dim >= 1, not {start.shape}")
        if not (math.isfinite(step) and step > 0):
            raise ValueError(f"step must be finite and above 0, not {step!r}")
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance must lie between 0 and 1, not {tolerance!r}")
        self._history = History(len(start))
        self._channel = _Channel()
        self._arguments = (start, float(step), float(tolerance))
        self._started = False
        self._wanted: NDArray[np.float64] | None = None

    def ask(self) -> NDArray[np.float64]:
        """Return the row that the model wants to know next, `(1, dim)`; see `Optimizer.ask`."""
        wanted = self._pending()
        if wanted is None:
            raise RuntimeError("the search has converged: nothing is left to ask for")
        self._history.begin()
        return wanted[None].copy()

    def tell(self, x: ArrayLike, loss: ArrayLike) -> None:
        """Report losses; see `Optimizer.tell`."""
        rows, losses = self._history.check(x, loss)
        wanted = self._pending()
        self._history.record(rows, losses)
        if wanted is None:
            return
        found = np.flatnonzero((rows == wanted).all(axis=1))
        if len(found):
            self._wanted = self._channel.answer(min(float(losses[found[0]]), _WORST))

    @property
    def best(self) -> tuple[NDArray[np.float64], float]:
        """Best told row and its loss; see `Optimizer.best`."""
        return self._history.best

    @property
    def stop(self) -> str | None:
        """``"converged"`` once the trust region is as small as asked for, else None."""
        return "converged" if self._started and self._wanted is None else None

    def _pending(self) -> NDArray[np.float64] | None:
        """The row that scipy waits for; None once it is done."""
        if not self._started:
            self._started = True
            weakref.finalize(self, self._channel.cancel)
            self._wanted = self._channel.begin(*self._arguments)
        return self._wanted


class _Cancelled(Exception):
    """The optimizer is gone; nobody will answer any more."""


class _Channel:
    """Hands rows out of the thread that scipy runs in, and losses into it."""

    def __init__(self) -> None:
        self._rows: queue.SimpleQueue[NDArray[np.float64] | BaseException | None] = queue.SimpleQueue()
        self._losses: queue.SimpleQueue[float | None] = queue.SimpleQueue()

    def begin(self, start: NDArray[np.float64], step: float, tolerance: float) -> NDArray[np.float64] | None:
        """Start the thread; return its first row."""
        arguments = (start, step, tolerance)
        threading.Thread(target=self._work, args=arguments, name="cobyla", daemon=True).start()
        return self._next()

    def answer(self, loss: float) -> NDArray[np.float64] | None:
        """Give the loss of the last row; return the next one, or None if there is none."""
        self._losses.put(loss)
        return self._next()

    def cancel(self) -> None:
        """End the thread."""
        self._losses.put(None)

    def _next(self) -> NDArray[np.float64] | None:
        row = self._rows.get()
        if isinstance(row, BaseException):
            raise row
        return row

    def _work(self, start: NDArray[np.float64], step: float, tolerance: float) -> None:
        try:
            with np.errstate(all="ignore"):
                options = {"rhobeg": step, "tol": step * tolerance, "maxiter": max(_MOST, 2 * len(start))}
                minimize(self._loss, start, method="COBYLA", options=options)
        except _Cancelled:
            return
        except BaseException as error:  # whatever it is belongs to the thread that waits for a row
            self._rows.put(error)
        else:
            self._rows.put(None)

    def _loss(self, row: NDArray[np.float64]) -> float:
        self._rows.put(np.array(row, dtype=np.float64))
        loss = self._losses.get()
        if loss is None:
            raise _Cancelled
        return loss
