"""A task's data set on the Hugging Face hub, read as if it were files in our form.

Columns are renamed as the task's `hub` says, class numbers become their names, and answers in the columns of SQuAD
become ours. What the hub's client has in its cache is used without a network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from bbprompt.errors import BBPromptError, DataError, OracleError, UsageError
from bbprompt.tasks.task import Hub, Task

__all__ = ["SPLITS", "Reader", "SplitName", "hub_readers", "place_of"]

SplitName = Literal["train", "dev", "test"]

SPLITS: tuple[SplitName, ...] = ("train", "dev", "test")

#: Yields where a record stands, for messages, and the record.
Reader = Callable[[], Iterator[tuple[str, Mapping[str, Any]]]]

_THEIRS = {"train": "train", "dev": "validation", "test": "test"}
_PATIENCE = 5.0  # seconds, to see whether there is a network at all


def place_of(hub: Hub) -> str:
    """The data set in one word: `owner/name:config@revision`."""
    return hub.path + (f":{hub.config}" if hub.config else "") + (f"@{hub.revision}" if hub.revision else "")


def hub_readers(task: Task, hub: Hub) -> dict[SplitName, Reader]:
    """A reader for each split of a data set; what they read is downloaded on first use.

    Raises:
        UsageError: The package datasets is missing.
        DataError: The hub knows no such data set, or it has none of the splits.
        OracleError: The hub is out of reach, and its cache has no such data set.
    """
    place = place_of(hub)
    with _asked(place, "opened") as datasets:
        there = datasets.get_dataset_split_names(hub.path, hub.config, revision=hub.revision)
    readers: dict[SplitName, Reader] = {}
    for name in SPLITS:
        theirs = hub.splits.get(name, _THEIRS[name])
        if theirs in there:
            readers[name] = _reader(task, hub, place, theirs)
    if not readers:
        have = ", ".join(there)
        raise DataError(f"hub data set {place}: has only the splits {have}; say which is which in `hub.splits`")
    return readers


def _reader(task: Task, hub: Hub, place: str, split: str) -> Reader:
    def read() -> Iterator[tuple[str, Mapping[str, Any]]]:
        with _asked(place, "loaded") as datasets:
            table = datasets.load_dataset(hub.path, hub.config, split=split, revision=hub.revision)
        theirs = {name: ours for ours, name in hub.fields.items()}
        # Class labels come as numbers; the task's YAML knows them by their names.
        feature = table.features.get(hub.fields.get("label", "label"))
        names = list(getattr(feature, "names", ()))
        for number, row in enumerate(table, start=1):
            record = {theirs.get(name, name): value for name, value in row.items()}
            where = f"{place}:{split}:{number}"
            if task.labelled and "label" in record:
                record["label"] = _label(record["label"], names, where)
            if task.type == "extractive":
                record["answers"] = _answers(record.get("answers"))
            yield where, record

    return read


def _label(value: Any, names: list[str], where: str) -> Any:
    """A class by its name; a whole number that has none as it is written, for our raw labels are strings."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        return value
    if not names:
        return str(int(value))
    if not 0 <= value < len(names):
        raise DataError(f"{where}: the record has no label ({value})")
    return names[int(value)]


def _answers(value: Any) -> Any:
    """Answers of SQuAD, a column of texts and one of starts, as a list of ours; anything else as it is."""
    if isinstance(value, dict) and set(value) == {"text", "answer_start"}:
        pairs = zip(value["text"], value["answer_start"], strict=True)
        return [{"text": text, "start": start} for text, start in pairs]
    return value


@contextmanager
def _asked(place: str, doing: str) -> Iterator[Any]:
    """The package datasets, and what goes wrong with it as one line of ours."""
    try:
        import datasets
    except ImportError:
        raise UsageError("--data hub needs the package datasets: pip install 'bbprompt[data]'") from None
    try:
        with _without_waiting(datasets):
            yield datasets
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _meaning(error, place, doing, datasets) from error


def _meaning(error: Exception, place: str, doing: str, datasets: Any) -> BBPromptError:
    """What is to blame: the network, which may come back, or the data set."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    out_of_reach = (ConnectionError, TimeoutError, OfflineModeIsEnabled, LocalEntryNotFoundError)
    if isinstance(error, out_of_reach) and not isinstance(error, datasets.exceptions.DatasetsError):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"no way to {constants.ENDPOINT}"
        return OracleError(
            f"hub data set {place}: not in the hub cache, and the hub is out of reach ({why}); check the network, or "
            "give --data DIR"
        )
    return DataError(
        f"hub data set {place}: cannot be {doing}: {reason}; correct the `hub` key of the task, or give --data DIR"
    )


@contextmanager
def _without_waiting(datasets: Any) -> Iterator[None]:
    """Let the hub's client look into its cache alone where there is no network; it would try for half a minute."""
    import httpx2
    from huggingface_hub import constants

    reachable = not constants.HF_HUB_OFFLINE
    if reachable:
        try:
            httpx2.head(constants.ENDPOINT, timeout=_PATIENCE)
        except httpx2.HTTPError:
            reachable = False
    if reachable:
        yield
        return
    # The client reads both at every call; there is no argument for it.
    places = [(constants, constants.HF_HUB_OFFLINE), (datasets.config, datasets.config.HF_HUB_OFFLINE)]
    for module, _ in places:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, before in places:
            module.HF_HUB_OFFLINE = before
