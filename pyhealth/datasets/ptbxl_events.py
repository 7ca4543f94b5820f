"""From the rows of ``ptbxl_database.csv`` to the attributes of events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from ..tasks.ecg_classification import SUPERCLASSES
from ..tasks.record_filter import QUALITY_FLAGS
from .ptbxl_download import PATH_COLUMNS
from .ptbxl_statements import likelihoods_by_name, parse_scp_codes

__all__ = ["events"]

#: In PTB-XL an age of 300 stands for 90 years or more.
CENSORED_AGE = 300
NEEDED = (
    "patient_id",
    "ecg_id",
    "age",
    "sex",
    "strat_fold",
    "scp_codes",
    "recording_date",
    "validated_by_human",
    *QUALITY_FLAGS,
)


def events(
    frame: pd.DataFrame,
    *,
    root: str,
    sampling_rate: int,
    names_of: Mapping[str, Mapping[str, str]],
    min_likelihood: float,
) -> pd.DataFrame:
    """Turn published rows into event attributes with proper types.

    Args:
        frame: rows of the table, all columns as text.
        root: folder or address of the dataset, to which the paths of records belong.
        sampling_rate: 100 or 500, hertz: whose paths to take.
        names_of: what :func:`~pyhealth.datasets.ptbxl_statements.statement_names` says.
        min_likelihood: smallest likelihood of a diagnostic code that counts, percent.

    Returns:
        The attributes that :class:`~pyhealth.datasets.ptbxl.PTBXLDataset` names, one
        row a record.

    Raises:
        ValueError: if a column is missing, or a cell cannot be used.

    Examples:
        >>> columns = [*NEEDED, "filename_lr"]
        >>> row = ["15709.0", "1", "56.0", "1", "3", "{'IMI': 35.0}"]
        >>> row += ["1984-11-09 09:17:34", "True", *[None] * 6, "records100/1_lr"]
        >>> names = {"superclasses": {"IMI": "MI"}}
        >>> table = pd.DataFrame([row], columns=columns, dtype="string")
        >>> made = events(
        ...     table, root="/x", sampling_rate=100, names_of=names, min_likelihood=0
        ... )
        >>> made[["patient_id", "mi", "record_path"]].astype(str).loc[0].tolist()
        ['15709', '1', '/x/records100/1_lr']
    """
    needed = [*NEEDED, PATH_COLUMNS[sampling_rate]]
    missing = [name for name in needed if name not in frame.columns]
    if missing:
        raise ValueError(
            f"ptbxl_database.csv has no column {', '.join(missing)}. Fetch it again."
        )
    result = _described(frame, root, sampling_rate)
    codes = [
        _codes(ecg_id, text)
        for ecg_id, text in zip(result["ecg_id"], result["scp_codes"], strict=True)
    ]
    labels = _labels(codes, frame.index, names_of, min_likelihood)
    return pd.concat([result, labels], axis=1)


def _described(frame: pd.DataFrame, root: str, sampling_rate: int) -> pd.DataFrame:
    """Return who was recorded, when and where, and the remarks on the signal."""
    age = _numbers(frame, "age")
    paths = frame[PATH_COLUMNS[sampling_rate]].astype("string")
    validated = frame["validated_by_human"].astype("string")
    result = pd.DataFrame(
        {
            # PTB-XL writes whole numbers as 15709.0.
            "patient_id": frame["patient_id"].astype("string").str.removesuffix(".0"),
            "recording_date": frame["recording_date"].astype("string"),
            "ecg_id": _integers(frame, "ecg_id"),
            "record_path": f"{root}/" + paths,
            "sampling_rate": pd.array([sampling_rate] * len(frame), dtype="Int64"),
            "age": age,
            "age_is_censored": (age >= CENSORED_AGE).astype("boolean"),
            "sex": _integers(frame, "sex"),
            "strat_fold": _integers(frame, "strat_fold"),
            "validated_by_human": validated == "True",
            "scp_codes": frame["scp_codes"].astype("string"),
        },
        index=frame.index,
    )
    for flag in QUALITY_FLAGS:
        result[flag] = frame[flag].astype("string")
    return result


def _labels(
    codes: Sequence[Mapping[str, float]],
    index: pd.Index,
    names_of: Mapping[str, Mapping[str, str]],
    min_likelihood: float,
) -> pd.DataFrame:
    """Return what the records' codes mean: names, and superclasses as columns."""
    result = pd.DataFrame(index=index)
    known = set().union(*names_of.values())
    unknown = [
        "|".join(code for code in of_row if code not in known) for of_row in codes
    ]
    result["unknown_codes"] = pd.array(unknown, dtype="string")
    for group, name_of in names_of.items():
        # Forms and rhythms have no likelihood: theirs is 0 throughout.
        limit = min_likelihood if group in ("superclasses", "subclasses") else 0
        listed = [
            _listed(likelihoods_by_name(of_row, name_of), limit) for of_row in codes
        ]
        result[group] = pd.array(listed, dtype="string")
    likelihoods = pd.DataFrame(
        [likelihoods_by_name(of_row, names_of["superclasses"]) for of_row in codes],
        columns=list(SUPERCLASSES),
        index=index,
        dtype="Float64",
    )
    for name in SUPERCLASSES:
        present = (likelihoods[name] >= min_likelihood).fillna(False)
        result[name.lower()] = present.astype("Int64")
        result[f"{name.lower()}_likelihood"] = likelihoods[name]
    return result


def _numbers(frame: pd.DataFrame, name: str) -> pd.Series:
    try:
        return pd.to_numeric(frame[name]).astype("Float64")
    except ValueError as error:
        raise ValueError(f"ptbxl_database.csv, column {name}: {error}.") from error


def _integers(frame: pd.DataFrame, name: str) -> pd.Series:
    numbers = _numbers(frame, name)
    broken = numbers[(numbers % 1 != 0).fillna(False)]
    if len(broken):
        raise ValueError(
            f"ptbxl_database.csv, column {name}: expected whole numbers, found "
            f"{broken.iloc[0]}."
        )
    return numbers.astype("Int64")


def _codes(ecg_id: int, scp_codes: str) -> dict[str, float]:
    try:
        return parse_scp_codes("" if pd.isna(scp_codes) else scp_codes)
    except ValueError as error:
        raise ValueError(f"ptbxl_database.csv, ecg_id {ecg_id}: {error}") from error


def _listed(likelihoods: Mapping[str, float], limit: float) -> str:
    return "|".join(f"{name}={p}" for name, p in likelihoods.items() if p >= limit)
