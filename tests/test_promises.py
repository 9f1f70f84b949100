"""The promises, on whole runs: killed, cut off from power or refused by the disk, a run ends as if nothing had been.

The counts here are those of every commit; ``python tests/promises.py nightly`` repeats the same with greater ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import crashes
import deepproperties
import faults
import fuzz
import fuzztargets
import httpfaults
import ledgerwalk
import promises
import pytest
from audit import Execution, audit, settled
from faultdisk import FaultDisk

from bbprompt.run import Prepared


@pytest.fixture(scope="module")
def run() -> Prepared:
    return crashes.small()


def test_a_power_cut_at_every_operation(run: Prepared) -> None:
    operations = crashes.alone(run)[1]
    images = ("nothing", "everything", "prefix", "renamed")
    # Every operation with one image here, and with all four at night; the loop of test_rundir_crashes takes all four.
    count = sum(crashes.crash_points(run, [images[at % 4]], [at]) for at in range(1, operations + 1))
    assert count == operations > 40


def test_power_cuts_in_a_row(run: Prepared) -> None:
    assert crashes.crash_chains(run, 15, seed=1) > 15


def test_a_disk_that_refuses_every_operation(run: Prepared) -> None:
    operations = crashes.alone(run)[1]
    assert crashes.failing_disk(run, [28]) == 2 * operations


def test_a_journal_that_ends_after_every_record(run: Prepared) -> None:
    assert crashes.prefixes(run) > 15


def test_a_journal_that_ends_after_every_byte(run: Prepared) -> None:
    assert crashes.repairs(run) > 2000


def test_random_kills(tmp_path: Path) -> None:
    script = Path(__file__).parent / "kills.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "40", "--seed", "1"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] >= 40
    assert min(counts["instant"], counts["sent"], counts["carried out"]) > 3


def test_a_long_walk_of_the_ledger() -> None:
    counts = ledgerwalk.walks(100_000, seed=1)
    assert counts["operations"] == 100_000
    assert counts["crashes"] > 8_000


@pytest.mark.parametrize("protocol", httpfaults.PROTOCOLS)
def test_every_kind_of_fault_of_a_server_at_first_middle_and_last_call(protocol: httpfaults.Protocol) -> None:
    # One form of each kind here, all forms in promises.py.
    assert httpfaults.matrix(protocol, faults.ONE_OF_EACH)["cases"] == 24 * 9


def test_faults_of_a_server_at_random() -> None:
    counts = httpfaults.schedules(100, 1, httpfaults.Stage())
    assert counts["faults"] > 400
    assert counts["deaths"] > 20


def test_a_call_that_was_settled_and_is_asked_again_after_a_crash_is_noticed(run: Prepared) -> None:
    expected, _ = crashes.alone(run)
    whole = crashes.Lives(run)
    whole.going(disk := FaultDisk())
    whole.ended(disk).finished(disk, expected, "a finished run goes on")
    again = whole.ended(disk)
    again.log.append(replace(whole.log[0], life=1))
    with pytest.raises(AssertionError, match="gone on once more: a call was asked for again though its value"):
        again.finished(disk, expected, "gone on once more")


# ------------------------------------------------------------------------------------------- the demands


@pytest.mark.parametrize("tier", promises.TIERS)
def test_a_total_below_its_demand_has_not_held(tier: str) -> None:
    demands = {figure: counts[promises.TIERS.index(tier)] for figure, counts in promises.DEMANDED.items()}
    lines, below = promises.totalled(tier, demands)
    assert (len(lines), below) == (8, 0)
    assert not any("NOT HELD" in line for line in lines)
    for figure, count in demands.items():
        lines, below = promises.totalled(tier, demands | {figure: count - 1})
        assert below == 1
        assert f"{figure}: {count - 1} of {count}: NOT HELD" in lines
    assert promises.totalled(tier, {})[1] == sum(count > 0 for count in demands.values())


def test_more_than_is_demanded_holds() -> None:
    assert "real SIGKILLs: 1155 of 1000" in promises.totalled("nightly", {promises.KILLS: 1155})[0]


@pytest.mark.parametrize("tier", promises.TIERS)
def test_what_a_tier_sets_out_to_kill_meets_its_demand(tier: str) -> None:
    checks = list(promises.checks(tier, 1))
    for figure in (promises.KILLS, promises.RAY):
        wanted = sum(check.least.get("kills", 0) for check in checks if check.figure == figure)
        assert wanted >= promises.DEMANDED[figure][promises.TIERS.index(tier)]
    figures = {figure for figure, counts in promises.DEMANDED.items() if counts[promises.TIERS.index(tier)]}
    assert figures == {check.figure for check in checks} - {""}


def judged(monkeypatch: pytest.MonkeyPatch, check: promises.Check) -> tuple[str, bool, int]:
    monkeypatch.setattr(promises, "checks", lambda tier, seed: iter([check]))
    monkeypatch.setattr(promises.logging, "disable", lambda level: None)
    return promises.judged("commit", 1, 0)


def test_a_check_that_ends_short_has_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"kills": 40, "no nodes": "network namespaces are not permitted"}
    check = promises.Check("Ray", lambda: found, promises.RAY, "kills", {"kills": 40, "nodes": 5})
    line, held, counted = judged(monkeypatch, check)
    assert line.startswith("Ray: SHORT, nodes: 0 of 5: {")
    assert (held, counted) == (False, 40)
    found["nodes"] = 5
    assert judged(monkeypatch, check)[1:] == (True, 40)


def test_a_check_whose_package_is_missing_has_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    check = promises.Check("guided", lambda: 1 / 0, needs="no_such_package")
    line, held, counted = judged(monkeypatch, check)
    assert line == "guided: NOT HELD: no_such_package is not installed, which the extra `dev` brings"
    assert (held, counted) == (False, 0)


@pytest.mark.parametrize(
    ("system", "processor", "python", "expected"),
    [
        ("linux", "x86_64", "3.11", True),
        ("linux", "aarch64", "3.11", False),
        ("darwin", "x86_64", "3.11", False),
        ("linux", "x86_64", "3.14", False),
    ],
)
def test_an_extra_brings_what_its_markers_say(system: str, processor: str, python: str, expected: bool) -> None:
    machine = {"sys_platform": system, "platform_machine": processor, "python_version": python}
    assert promises._brought("atheris", "fuzz", machine) == expected
    assert promises._brought("ray", "ray", machine)
    assert not promises._brought("atheris", "ray", machine)


@pytest.mark.parametrize("brought", [True, False])
def test_the_fuzz_has_the_tiers_seed_and_says_whether_it_is_guided(
    brought: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(promises, "_script", lambda *words: asked.append(words))
    monkeypatch.setattr(promises, "_brought", lambda package, extra: brought)
    (check,) = (check for check in promises.checks("nightly", 17) if check.name.startswith("fuzz "))
    (words,) = (words for words in asked if words[0] == "fuzz.py")
    assert "--seed=17" in words
    unguided = {"targets": 99, "guided": False}
    if brought:
        assert (check.name, check.needs) == ("fuzz with coverage", "atheris")
        assert check.short(unguided) == "guided: False of 1"
        assert not check.short(unguided | {"guided": True})
    else:
        assert (check.name, check.needs) == ("fuzz without coverage, which needs atheris", "")
        assert not check.short(unguided)


@pytest.mark.parametrize("guided", [True, False])
def test_the_last_line_of_the_fuzz(
    guided: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds: list[int] = []

    def forked(target: object, name: str, seconds: int, corpus: Path, seed: int) -> tuple[int, str]:
        seeds.append(seed)
        return 5, ""

    one = {"json": fuzztargets.Target((b"{}",), json.loads, (ValueError, RecursionError))}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if guided else None)
    monkeypatch.setattr(fuzz, "instrumented", lambda: one)
    monkeypatch.setattr(fuzztargets, "targets", lambda: one)
    monkeypatch.setattr(fuzz, "forked", forked)
    monkeypatch.setattr("logging.disable", lambda level: None)
    monkeypatch.setattr("warnings.simplefilter", lambda action: None)
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--seconds", "1", "--seed", "17"])
    with pytest.raises(SystemExit) as ended:
        fuzz.main()
    assert not ended.value.code
    *lines, last = capsys.readouterr().out.splitlines()
    said = json.loads(last)
    assert (said["seed"], said["guided"], said["targets"]) == (17, guided, 1)
    assert seeds == ([17] if guided else [])
    assert [line.endswith(", guided") for line in lines] == [guided]


# ------------------------------------------------------------------------------------------- the checker


def scene() -> tuple[list[dict[str, Any]], list[Execution]]:
    """Two reserved and settled batches, as the journal's records, and what the oracle logged of them."""
    import hashlib

    rows = (b"\0" * 48, b"\1" * 48)
    ids = [hashlib.sha256(f"train:0:{n}:".encode() + row).hexdigest()[:24] for n, row in enumerate(rows)]
    look = [hashlib.sha256(b"dev:2:0:" + rows[0]).hexdigest()[:24]]
    records: list[dict[str, Any]] = [
        {"op": "reserve", "kind": "train", "ids": ids},
        {"op": "settle", "ids": ids, "values": [{"loss": (0.5).hex()}, {"loss": (0.25).hex()}]},
        {"op": "reserve", "kind": "dev", "ids": look},
        {"op": "settle", "ids": look, "values": [{"loss": (0.75).hex()}]},
    ]
    log = [Execution("train", rows, (0.5, 0.25), 0), Execution("dev", rows[:1], (0.75,), 0)]
    return records, log


def written(records: list[dict[str, Any]]) -> bytes:
    from bbprompt.store.journal import Journal

    path, disk = Path("/journal.log"), FaultDisk()
    journal = Journal(path, "run", disk)
    for record in records:
        journal.append(record)
    return disk.durable(path)


def test_the_property_tests_that_are_repeated_at_night_are_found() -> None:
    names = {path.name for path in deepproperties.files()}
    assert {"test_ledger.py", "test_journal.py", "test_wire.py", "test_properties.py"} <= names
    assert names < {path.name for path in Path(__file__).parent.glob("test_*.py")}


def test_the_checker_is_content_with_what_is_right() -> None:
    records, log = scene()
    found = audit(written(records), 3, log, [])
    assert (found.reserved, found.settled, found.executed, found.repeated) == (3, 3, 3, 0)
    again = [*log[:1], *log[:1], *log[1:]]
    assert audit(written(records), 3, again, [frozenset()]).repeated == 2


CHANGES: dict[str, tuple[Callable[[list[dict[str, Any]], list[Execution]], Any], int, list[frozenset[str]], str]] = {
    "over the budget": (lambda records, log: None, 2, [], "the budget is 2"),
    "charged twice": (lambda records, log: records.insert(1, records[0]), 9, [], "charged twice"),
    "settled twice": (lambda records, log: records.append(records[1]), 9, [], "settled twice"),
    "settled unreserved": (lambda records, log: records.pop(2), 9, [], "never reserved"),
    "sent unpaid": (lambda records, log: (records.pop(3), records.pop(2)), 9, [], "no reservation pays for"),
    "another loss": (
        lambda records, log: log.__setitem__(1, Execution("dev", log[1].rows, (0.7,), 0)),
        9,
        [],
        "another value than was answered",
    ),
    "never answered": (lambda records, log: log.pop(1), 9, [], "the oracle never gave"),
    "repeated without a death": (lambda records, log: log.append(log[0]), 9, [], "more than was in doubt"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_checker_sees(name: str) -> None:
    change, budget, kept, message = CHANGES[name]
    records, log = scene()
    change(records, log)
    with pytest.raises(AssertionError, match=message):
        audit(written(records), budget, log, kept)


def test_the_checker_sees_what_was_settled_and_asked_for_again() -> None:
    records, log = scene()
    journal = written(records)
    kept = settled(journal[: journal.index(b"\n", journal.index(b"\n") + 1) + 7])
    assert len(kept) == 2
    late = Execution("train", log[0].rows, log[0].losses, 1)
    with pytest.raises(AssertionError, match="though its value was on disk"):
        audit(journal, 3, [*log, late], [kept])
