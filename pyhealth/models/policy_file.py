"""The JSON text in which an augmentation policy is kept and handed on.

People read the stages: operations, probabilities, and magnitudes in units. Programs
read settings and parameters, whose numbers are written so that they come back to the
bit. A policy file is data only: no code can hide in it.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, TypedDict

import torch
from torch import Tensor

__all__ = ["SETTINGS", "Provenance", "check_shapes", "policy_text", "read_policy"]

FORMAT = "TaskAug policy"
#: Raised when the content changes its meaning; a file of another version is refused.
VERSION = 1
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}
#: Type of each setting of a policy; ``float`` stands for any number.
SETTINGS = {
    "num_stages": int,
    "temperature": float,
    "shared_magnitudes": bool,
    "selection": str,
    "sampling_rate": float,
    "operations": list,
    "initial_magnitude": float,
    "dropout_by": str,
}

type Provenance = Mapping[str, object]


class Settings(TypedDict):
    """Arguments that build a policy again.

    Examples:
        >>> set(Settings.__annotations__) == set(SETTINGS)
        True
    """

    num_stages: int
    temperature: float
    shared_magnitudes: bool
    selection: Literal["sample", "batch"]
    sampling_rate: float
    operations: list[str]
    initial_magnitude: float
    dropout_by: Literal["lead", "electrode"]


class _Content(TypedDict):
    # What is read of a file's JSON.
    settings: Settings
    parameters: dict[str, object]
    provenance: dict[str, object]
    dtype: str


def policy_text(
    settings: Mapping[str, object],
    parameters: Mapping[str, Tensor],
    stages: Sequence[Mapping[Hashable, object]],
    provenance: Provenance,
) -> str:
    """Return a policy as JSON text.

    Args:
        settings: arguments that build the policy again.
        parameters: its parameters by name, (K, O).
        stages: one row a stage and operation, for people.
        provenance: how it came to be; plain values.

    Returns:
        The text; :func:`read_policy` reads it from a file.

    Raises:
        ValueError: if a number is not finite, which JSON cannot say.
        TypeError: if the provenance holds something that JSON cannot say.

    Examples:
        >>> text = policy_text({}, {"logits": torch.zeros(1, 2)}, [], {"seed": 0})
        >>> json.loads(text)["parameters"]
        {'logits': [[0.0, 0.0]]}
    """
    bad = [name for name, p in parameters.items() if not p.isfinite().all()]
    if bad:
        raise ValueError(
            f"The policy's {', '.join(bad)} are not finite, so it is not saved. Take "
            "the policy of an earlier epoch."
        )
    try:
        json.dumps(provenance, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"provenance must be plain, finite values, as in JSON: {error}."
        ) from error
    dtype = next(iter(parameters.values())).dtype
    content = {
        "format": FORMAT,
        "version": VERSION,
        "settings": settings,
        "stages": list(stages),
        "provenance": dict(provenance),
        "written_by": {
            name: _installed(name) for name in ("pyhealth-taskaug", "pyhealth", "torch")
        },
        "dtype": str(dtype).removeprefix("torch."),
        # A float32 is a float64 without loss, and Python writes a float64 with the
        # digits that tell it from all others.
        "parameters": {name: p.tolist() for name, p in parameters.items()},
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def read_policy(
    path: str | Path,
) -> tuple[Settings, dict[str, Tensor], dict[str, object]]:
    """Read a policy file and check it.

    Args:
        path: file with the text of :func:`policy_text`.

    Returns:
        Settings, parameters by name, and provenance. Whether operations and shapes fit
        is for the policy to say.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not a policy file of this version, or is damaged.

    Examples:
        >>> policy.save("mi.json")  # doctest: +SKIP
        >>> settings, parameters, provenance = read_policy("mi.json")  # doctest: +SKIP
    """
    content = _content(path)
    settings, values = content["settings"], content["parameters"]
    missing = [name for name in SETTINGS if name not in settings]
    unknown = [name for name in settings if name not in SETTINGS]
    if missing or unknown:
        raise _damaged(
            path, f"its settings lack {missing} and have the unknown {unknown}"
        )
    for name, value in settings.items():
        if not _is(value, SETTINGS[name]):
            raise _damaged(
                path, f"{name} must be {SETTINGS[name].__name__}, found {value!r}"
            )
    dtype = DTYPES.get(str(content["dtype"]))
    if dtype is None:
        raise _damaged(path, f"dtype must be one of {list(DTYPES)}")
    parameters = {name: _tensor(path, name, v, dtype) for name, v in values.items()}
    return settings, parameters, content["provenance"]


def check_shapes(
    path: str | Path,
    parameters: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
) -> None:
    """See that the parameters of a file fit the policy that its settings build.

    Args:
        path: of the file, for the message.
        parameters: that were read.
        wanted: the policy's own, (K, O) each.

    Raises:
        ValueError: if a name or a shape differs.

    Examples:
        >>> one = {"logits": torch.zeros(1, 8)}
        >>> check_shapes("mi.json", one, one)
    """
    found = {name: tuple(value.shape) for name, value in parameters.items()}
    # Without stages a parameter is an empty list, which shows no second dimension.
    shapes = {n: tuple(p.shape) if len(p) else (0,) for n, p in wanted.items()}
    if found != shapes:
        stages, operations = wanted["logits"].shape
        raise ValueError(
            f"The policy file {path} holds parameters {found}, but {stages} stages of "
            f"{operations} operations need {shapes}. Save the policy again."
        )


def _content(path: str | Path) -> _Content:
    try:
        content: _Content = json.loads(Path(path).read_bytes())  # seen to below
    except ValueError as error:  # of json, and of bytes that are no text
        raise ValueError(
            f"{path} is not a policy file, or it is cut short: {error}. A policy is "
            "saved by TaskAugPolicy.save as JSON text."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(
            f"{path} is JSON, but not a policy saved by TaskAugPolicy.save: it does "
            f"not say format {FORMAT!r}."
        )
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {content.get('version')!r} of the policy file, and "
            f"this program reads {VERSION}. Use the pyhealth-taskaug that wrote it "
            f"({content.get('written_by')})."
        )
    for key, kind in (
        ("settings", dict),
        ("parameters", dict),
        ("provenance", dict),
        ("dtype", str),
    ):
        if not isinstance(content.get(key), kind):
            raise _damaged(path, f"it has no {key}")
    return content


def _tensor(path: str | Path, name: str, value: object, dtype: torch.dtype) -> Tensor:
    try:
        tensor = torch.tensor(value, dtype=torch.float64).to(dtype)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise _damaged(path, f"{name} is not a table of numbers: {error}") from error
    if not tensor.isfinite().all():
        raise _damaged(path, f"{name} has numbers that are not finite")
    return tensor


def _is(value: object, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _damaged(path: str | Path, why: str) -> ValueError:
    return ValueError(f"The policy file {path} is damaged: {why}. Save it again.")


def _installed(name: str) -> str | None:
    """Return a package's version; None where its files came without a package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
