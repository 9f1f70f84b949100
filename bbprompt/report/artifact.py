"""The page of a prompt artifact: which upstream tasks share modules (MP2, section 4 and figure 5)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bbprompt.prompts import ModularPrompt
from bbprompt.report.figures import partition
from bbprompt.report.page import Html, bullets, details, heat, page, paragraph, section, table
from bbprompt.report.run import leaves

__all__ = ["Partition", "artifact_page", "task_groups"]

GROUPS = 8
"""Groups that the tasks are cut into: MP2 finds eight among its 38 tasks."""


@dataclass(frozen=True, slots=True)
class Partition:
    """Tasks in groups by their routers.

    Attributes:
        links: The hierarchy, as `scipy.cluster.hierarchy.linkage` has it.
        cut: Distance at which it was cut.
        groups: Tasks of each group, in the order of the hierarchy's leaves.
    """

    links: NDArray[np.float64]
    cut: float
    groups: tuple[tuple[str, ...], ...]


def task_groups(weights: NDArray[np.float64], names: tuple[str, ...], most: int = GROUPS) -> Partition:
    """Cluster tasks by their mixing weights: Ward's hierarchy over Euclidean distances, leaves in their best order.

    Args:
        weights: `(T, L * K)`, T at least 2.
        names: Of the T tasks.
        most: Groups at most.
    """
    from scipy.cluster.hierarchy import fcluster, leaves_list, linkage

    links = np.asarray(linkage(weights, method="ward", optimal_ordering=True))
    count = min(most, len(names))
    marks = fcluster(links, count, criterion="maxclust")
    groups: dict[int, list[str]] = {}
    for place in leaves_list(links).tolist():
        groups.setdefault(int(marks[place]), []).append(names[place])
    # The cut lies between the last merge inside a group and the first one between groups.
    heights = np.concatenate(([0.0], links[:, 2]))
    inside = len(names) - len(groups)
    cut = float(heights[inside] + heights[min(inside + 1, len(heights) - 1)]) / 2
    return Partition(links, cut, tuple(tuple(tasks) for tasks in groups.values()))


def artifact_page(directory: Path) -> str:
    """The page of an artifact directory.

    Raises:
        ArtifactError: It is not a whole artifact.
    """
    prompt = ModularPrompt.load(directory)
    config = prompt.config
    weights = config.rule.weights(prompt.routers)
    tasks, layers, modules = weights.shape
    parts: list[Html] = []
    if tasks >= 2:
        flat = weights.reshape(tasks, -1)
        found = task_groups(flat, config.tasks)
        parts.append(
            section(
                "Task partitions",
                paragraph(
                    "Upstream tasks by hierarchical clustering (Ward) of their routers' mixing weights, under the rule "
                    f"of the training ({config.gates} gates, {config.mixing}). The dashed line is the cut."
                ),
                partition(found.links, config.tasks, flat, layers, found.cut),
            )
        )
        groups = [[str(number), ", ".join(group)] for number, group in enumerate(found.groups, start=1)]
        parts.append(section("Groups", table(["group", "tasks"], groups)))
    if tasks:
        mean = weights.mean(axis=1)
        low = float(mean.min())
        parts.append(
            section(
                "Routers",
                paragraph(f"Mixing weights of each module, mean over the prompted layers; white is {low:.2f}."),
                heat([f"z{number + 1}" for number in range(modules)], config.tasks, mean.tolist(), ".2f", white=low),
                *(
                    details(
                        f"layer {layer + 1}",
                        heat(
                            [f"z{number + 1}" for number in range(modules)],
                            config.tasks,
                            weights[:, layer].tolist(),
                            ".2f",
                        ),
                    )
                    for layer in range(layers)
                    if layers > 1
                ),
            )
        )
    values = config.model_dump(mode="json")
    sources = values.pop("sources")
    parts.append(section("Settings", details("config.json", table(["key", "value"], list(leaves(values))))))
    if sources:
        parts.append(section("Data sources and their terms", details("sources", bullets(sources))))
    lead = (
        f"{config.kind} for {config.backbone}: {layers} prompted layer{'s' if layers > 1 else ''}, K = {modules}, "
        f"d = {config.intrinsic_dim}, P = {config.prompt_length}; {tasks} upstream tasks; licence: "
        f"{config.license or 'not stated'}"
    )
    return page(f"Prompts {directory.resolve().name}", lead, parts)
