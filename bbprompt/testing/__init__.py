"""Fakes, toy losses and contract suites, for our tests and for those of third parties.

A contract suite is a class of pytest tests without pytest in it. Subclass it under a name that pytest
collects and say what to build::

    class TestMine(OptimizerContract):
        target = "mypackage.mine:Mine"
        arguments: ClassVar = {"bounds": [[-5.0] * 3, [5.0] * 3], "seed": 7}
        dim = 3


    class TestMyOracle(OracleContract):
        def make(self) -> Oracle:
            return MyOracle("somewhere")
"""

from __future__ import annotations

from bbprompt.testing.losses import ellipsoid, onemax, sphere
from bbprompt.testing.optimizer import OptimizerContract
from bbprompt.testing.oracle import OracleContract
from bbprompt.testing.toy import FaultyOracle, ToyOracle

__all__ = [
    "FaultyOracle",
    "OptimizerContract",
    "OracleContract",
    "ToyOracle",
    "ellipsoid",
    "onemax",
    "sphere",
]
