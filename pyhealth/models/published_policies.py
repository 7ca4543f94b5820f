"""Learned policies that come with the package, by the name of their label.

``policies/<NAME>.md`` in the repository is a policy's card: the records it was learned
on, how it was learned, how it scored, and what it cannot do.
"""

from __future__ import annotations

from importlib.resources import as_file, files

from .taskaug_policy import TaskAugPolicy

__all__ = ["published_policies", "published_policy"]

#: Package of data files alone: ``policies/`` of the repository.
FOLDER = "pyhealth.models.policies"


def published_policies() -> tuple[str, ...]:
    """Return the names that :func:`published_policy` knows.

    Examples:
        >>> published_policies()
        ('CD', 'HYP', 'MI', 'STTC')
    """
    names = (entry.name for entry in files(FOLDER).iterdir())
    return tuple(sorted(n.removesuffix(".json") for n in names if n.endswith(".json")))


def published_policy(name: str) -> TaskAugPolicy:
    """Return a published policy, to train on with or to look at.

    Args:
        name: one of :func:`published_policies`, the label that it was learned for.

    Returns:
        The policy, on the CPU; its ``provenance`` has what its card says.

    Raises:
        ValueError: if there is no such policy.

    Examples:
        >>> published_policy("MI").provenance["task"]
        'MI'
    """
    names = published_policies()
    if name not in names:
        raise ValueError(
            f"There is no published policy {name!r}; there are {', '.join(names)}."
        )
    with as_file(files(FOLDER) / f"{name}.json") as path:
        return TaskAugPolicy.load(path)
