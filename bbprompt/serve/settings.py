"""What a server allows: sizes, counts and times, all bounded."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["ServeSettings"]


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """Limits of a server.

    Attributes:
        token: What clients must bring as `Authorization: Bearer`; None for no check (loopback only).
        points: Most candidates in a request. Clients cut larger populations into pieces of this size, whatever
            the number of their workers, so it is also what decides which candidates run together.
        texts: Most texts in a batch.
        body: Most bytes in the body of a request. Requests in the server at once may have four times as many together.
        batches: Batches that are kept; the one that was used longest ago goes first.
        room: Bytes of batches, as they were sent, that are kept.
        lease: Seconds that a batch is kept after its last use.
        replies: Bytes of replies that are kept to answer a repeated request without computing it again.
        at_once: Requests in the server at once, and most that wait for the model, those included that were given up;
            more are asked to come again later.
        receive: Seconds in which the whole of a request must have arrived, headers and body each.
        deadline: Seconds after which a request is given up, waiting for its turn included.
        drain: Seconds that requests are given to finish after a SIGTERM.
        together: Whether requests of several clients on the same texts may be scored in one forward, of `points`
            candidates at most. Answers then depend on who else asks, by what the order of floating point sums changes.
    """

    token: str | None = field(default=None, repr=False)
    points: int = 1024
    texts: int = 4096
    body: int = 64 * 2**20
    batches: int = 64
    room: int = 256 * 2**20
    lease: float = 3600.0
    replies: int = 64 * 2**20
    at_once: int = 64
    receive: float = 10.0
    deadline: float = 600.0
    drain: float = 30.0
    together: bool = False
