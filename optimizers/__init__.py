"""Ask-and-tell optimizers that know nothing of models, files or clocks.

They share no base class, only the methods of `Optimizer` (see `protocol.py`)::

    optimizer = RandomSearch([[-5.0] * 8, [5.0] * 8], seed=1, batch=4)
    while optimizer.stop is None and calls_left:
        rows = optimizer.ask()                # (n, dim)
        optimizer.tell(rows, losses_of(rows))  # (n,): NaN refused, +inf = infeasible
    row, loss = optimizer.best

* ``random.RandomSearch``: the baseline, in a box or over bits.
* ``enumerate.Enumeration``: every non-zero binary row, exactly once.
* ``cobyla.COBYLA``: linear models in a shrinking trust region, one row an ask.
* ``cmaes.CMAES``: covariance matrix adaptation (imports cma).
* ``gp.GPUCB``: Gaussian process with an upper confidence bound, in a box or over bits (imports torch,
  botorch).

Each is a deterministic function of its arguments, its seed and what it was told. Import the module you need:
this package itself loads none of them, so that it stays light.
"""

from __future__ import annotations

from bbprompt.optimizers.protocol import Optimizer

__all__ = ["Optimizer"]
