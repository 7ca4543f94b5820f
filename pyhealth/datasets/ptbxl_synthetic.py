"""A small invented corpus in the layout of PTB-XL, for tests, examples and CI.

Layout: Wagner et al. 2020, PTB-XL, Scientific Data 7:154. The signals come from the
model of a heart in :mod:`pyhealth.datasets.ptbxl_synthetic_heart`.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import wfdb
from scipy.signal import resample_poly

from . import ptbxl_synthetic_tables as tables
from .ptbxl_synthetic_heart import Session, draw_body, frontal_axis, synthesise

__all__ = ["write_synthetic_ptbxl"]

#: Folder and file suffix of each published rate (hertz).
RATES = {100: ("records100", "lr"), 500: ("records500", "hr")}
UNITS_PER_MILLIVOLT = 1000
N_FOLDS = 10
MIN_PATIENTS = 10
#: Shares of patients with 1, 2, 3 and 4 records.
RECORDS_SHARES = (0.85, 0.10, 0.03, 0.02)
#: Share of patients whose heart is that of another set of labels.
LABEL_NOISE = 0.04
#: Share of patients with a trait of some other diagnosis, and its largest severity.
VARIANT_SHARE, VARIANT_SEVERITY = 0.35, 0.35
#: Shares of records with one chest electrode that drifts, bursts or has no contact.
SPOILT_SHARES = (0.1, 0.03, 0.005)
FIRST_DAY = datetime(1984, 11, 1)
SPAN_SECONDS = 460_000_000  # to 1999
#: Within this time of the first follow a patient's other records.
STAY_SECONDS = 3_000_000


def write_synthetic_ptbxl(
    root: str | os.PathLike[str],
    n_patients: int = 200,
    seed: int = 0,
    sampling_rates: Iterable[int] = (100, 500),
    nuisance: Mapping[str, float] | None = None,
    nuisance_folds: Iterable[int] = (9, 10),
) -> Path:
    """Write an invented corpus that a reader cannot tell from PTB-XL by its layout.

    About 15 % of the patients have 2 to 4 records; a patient stays in one fold; folds
    are balanced by superclass. Diagnoses change the waves in the direction a
    cardiologist expects, with a severity that reaches down to the invisible, so the
    superclasses can be learned, but not perfectly. Results on it say nothing about
    patients. ``ptbxl_database.csv`` is written last: a folder that has it is whole.

    Args:
        root: folder to write into; created if missing.
        n_patients: number of patients, at least 10; from 200 on every fold has
            positives and negatives of every superclass.
        seed: not negative; the same arguments write the same bytes.
        sampling_rates: 100, 500 or both, hertz. The rows name both files, as
            published; the bytes at one rate do not depend on the other.
        nuisance: magnitudes by the name of an operation of
            :data:`pyhealth.models.ecg_augmentations.AUGMENTATIONS`, in its own unit,
            planted into the records of ``nuisance_folds``; all else stays the same.
            Operations that treat leads one by one break the ties of the limb leads.
        nuisance_folds: folds (1 to 10) that get the nuisance.

    Returns:
        ``root`` as a path.

    Raises:
        FileExistsError: if ``root`` already holds a corpus.
        ValueError: if an argument is out of its range.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = write_synthetic_ptbxl(folder, 10, sampling_rates=[100])
        ...     sorted(path.name for path in root.iterdir())
        ['ptbxl_database.csv', 'records100', 'scp_statements.csv']
    """
    root = Path(root)
    rates = _subset("sampling_rates", sampling_rates, RATES)
    _check_counts(n_patients, seed)
    planted = _checked_nuisance(nuisance or {})
    folds = _subset("nuisance_folds", nuisance_folds, range(1, N_FOLDS + 1))
    database = root / "ptbxl_database.csv"
    if database.exists():
        raise FileExistsError(
            f"{database} already exists; give an empty folder, or delete that corpus."
        )
    records = _draw_records(n_patients, np.random.default_rng([seed, 0]))
    for rate in rates:
        for record in records[:1] + records[999::1000]:
            (root / record.filename(rate)).parent.mkdir(parents=True, exist_ok=True)
    _write_csv(root / "scp_statements.csv", tables.SCP_COLUMNS, tables.STATEMENT_ROWS)
    for record in records:
        moment = np.random.default_rng([seed, 1, record.ecg_id])
        signal = synthesise(record.session, moment)
        if planted and record.patient.fold in folds:
            signal = _plant(signal, planted, [seed, 2, record.ecg_id])
        for rate in rates:
            _write_record(root / record.filename(rate), signal, rate)
    rows = [_row(r, np.random.default_rng([seed, 3, r.ecg_id])) for r in records]
    _write_csv(database, tables.COLUMNS, rows)
    return root


def _subset(name: str, given: Iterable[int], allowed: Iterable[int]) -> list[int]:
    given, allowed = set(given), sorted(allowed)
    if not given or not given <= set(allowed):
        raise ValueError(f"{name} must be some of {allowed}, got {sorted(given)}.")
    return sorted(given)


def _check_counts(n_patients: int, seed: int) -> None:
    if n_patients < MIN_PATIENTS:
        raise ValueError(
            f"n_patients must be at least {MIN_PATIENTS}, one a fold, got {n_patients}."
        )
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}.")


def _checked_nuisance(nuisance: Mapping[str, float]) -> dict[str, float]:
    """Return the magnitudes in registry order: the order they came in is no matter."""
    if not nuisance:
        return {}
    # Imported here: pyhealth.models imports pyhealth.datasets.
    from ..models.ecg_augmentations import AUGMENTATIONS

    for name, magnitude in nuisance.items():
        if name not in AUGMENTATIONS:
            raise ValueError(
                f"Unknown nuisance {name!r}; known are {', '.join(AUGMENTATIONS)}."
            )
        if not (math.isfinite(magnitude) and magnitude >= 0):
            raise ValueError(
                f"The magnitude of nuisance {name!r} must be finite and not negative, "
                f"got {magnitude}."
            )
    return {name: nuisance[name] for name in AUGMENTATIONS if name in nuisance}


@dataclass(frozen=True)
class _Patient:
    number: int
    labels: tuple[str, ...]
    codes: dict[str, str]  # superclass -> the code it would be written as
    fold: int
    age: int
    male: bool
    usual: Session  # the heart as it is, told or not


@dataclass(frozen=True)
class _Record:
    ecg_id: int
    patient: _Patient
    labels: tuple[str, ...]
    taken: datetime
    session: Session

    def filename(self, rate: int) -> str:
        folder, suffix = RATES[rate]
        return f"{folder}/{self.ecg_id // 1000:02d}000/{self.ecg_id:05d}_{suffix}"


def _draw_records(n_patients: int, rng: np.random.Generator) -> list[_Record]:
    labels = _draw_labels(n_patients, rng)
    counts = 1 + rng.choice(len(RECORDS_SHARES), n_patients, p=RECORDS_SHARES)
    folds = _balanced_folds(labels, counts, rng)
    numbers = 1 + rng.permutation(max(22_000, 2 * n_patients))
    visits = []
    for k, told in enumerate(labels):
        heart = labels[rng.integers(n_patients)] if rng.random() < LABEL_NOISE else told
        patient = _draw_patient(int(numbers[k]), told, heart, int(folds[k]), rng)
        first = int(rng.integers(SPAN_SECONDS))
        later = rng.integers(1, STAY_SECONDS, size=counts[k] - 1)
        visits.append((first, False, patient))
        visits += [(first + second, True, patient) for second in later.tolist()]
    # By date, as published: the order tells nothing about the class.
    visits.sort(key=lambda visit: (visit[0], visit[2].number))
    return [_draw_record(k, *visit, rng) for k, visit in enumerate(visits, start=1)]


def _draw_labels(n: int, rng: np.random.Generator) -> list[tuple[str, ...]]:
    """Sets of superclasses by quota (largest remainders), in random order."""
    sets, shares = list(tables.LABEL_SETS), np.array(list(tables.LABEL_SETS.values()))
    quota = np.floor(n * shares).astype(int)
    quota[np.argsort(quota - n * shares, kind="stable")[: n - quota.sum()]] += 1
    drawn = [labels for labels, k in zip(sets, quota, strict=True) for _ in range(k)]
    return [drawn[k] for k in rng.permutation(n)]


def _balanced_folds(
    labels: Sequence[tuple[str, ...]], counts: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Fold (1 to 10) of each patient, balanced from the rarest superclass on.

    Source: iterative stratification, Sechidis et al. 2011 (ECML PKDD), over patients;
    among folds with equally few of a patient's rarest superclass, the least loaded one.
    """
    nothing = len(tables.SUPERCLASSES)
    of = [[tables.SUPERCLASSES.index(c) for c in told] or [nothing] for told in labels]
    patients = np.zeros((N_FOLDS, nothing + 1))
    records = np.zeros(N_FOLDS)
    folds = np.zeros(len(labels), dtype=int)
    order = rng.permutation(len(labels))
    for k in sorted(order, key=lambda k: min(of[k])):
        crowd = patients[:, of[k]].sum(axis=1)
        keys = (rng.random(N_FOLDS), crowd, records, patients[:, min(of[k])])
        folds[k] = fold = np.lexsort(keys)[0]
        patients[fold, of[k]] += 1
        records[fold] += counts[k]
    return folds + 1


def _draw_patient(
    number: int,
    labels: tuple[str, ...],
    heart: tuple[str, ...],
    fold: int,
    rng: np.random.Generator,
) -> _Patient:
    codes = {c: _pick(tables.SUBTYPES[c], rng) for c in tables.SUPERCLASSES}
    severity = {codes[c]: 0.1 + 1.1 * rng.beta(1.6, 1.6) for c in heart}
    if rng.random() < VARIANT_SHARE:
        other = _pick(tables.SUBTYPES[str(rng.choice(tables.SUPERCLASSES[:4]))], rng)
        severity.setdefault(other, VARIANT_SEVERITY * rng.random())
    healthy = "NORM" in labels
    age = float(np.clip(rng.normal(54 if healthy else 65, 17), 3, 96))
    male = bool(rng.random() < 0.52)
    usual = Session(
        body=draw_body(age, male, rng),
        severity=severity,
        stage=str(rng.choice(list(tables.STAGES))),
        fibrillates=bool(rng.random() < 0.11) and not healthy,
    )
    return _Patient(number, labels, codes, fold, round(age), male, usual)


def _draw_record(
    ecg_id: int,
    second: int,
    again: bool,
    patient: _Patient,
    rng: np.random.Generator,
) -> _Record:
    labels, severity = patient.labels, dict(patient.usual.severity)
    if again and labels and "NORM" not in labels and rng.random() < 0.1:
        # One finding has gone since the first record.
        severity.pop(patient.codes[labels[0]], None)
        labels = labels[1:] or ("NORM",)
    drift, burst, loose = (
        int(rng.integers(3, 9)) if rng.random() < share else None
        for share in SPOILT_SHARES
    )
    session = replace(
        patient.usual,
        severity={c: s * math.exp(0.15 * rng.normal()) for c, s in severity.items()},
        rate=float(np.clip(patient.usual.body.rate + 5 * rng.normal(), 50, 110)),
        ectopic=bool(rng.random() < 0.05),
        drift=drift,
        burst=burst,
        loose=loose,
        tremor=math.exp(0.5 * rng.normal()) * (3 if rng.random() < 0.12 else 1),
    )
    taken = FIRST_DAY + timedelta(seconds=second)
    return _Record(ecg_id, patient, labels, taken, session)


def _pick(shares: Mapping[str, float], rng: np.random.Generator) -> str:
    return list(shares)[rng.choice(len(shares), p=list(shares.values()))]


def _row(record: _Record, rng: np.random.Generator) -> list[str]:
    """One line of the database, every value as published or empty."""
    patient, session = record.patient, record.session
    human = patient.fold > 8 or rng.random() < 0.7
    weight = rng.normal(78 if patient.male else 67, 12)
    height = rng.normal(176 if patient.male else 164, 7)
    axis = frontal_axis(session)
    stage = _pick({session.stage: 0.4, "unknown": 0.6}, rng)
    codes = _codes(record, rng)
    chest = {None: ""} | dict(enumerate(tables.ELECTRODES))

    def maybe(share: float, value: float | str) -> float | str:
        return value if rng.random() < share else ""

    values = {
        "ecg_id": record.ecg_id,
        "patient_id": float(patient.number),
        "age": maybe(0.98, 300.0 if patient.age > 89 else float(patient.age)),
        "sex": int(not patient.male),
        "height": maybe(0.32, float(round(height))),
        "weight": maybe(0.43, float(round(weight))),
        "nurse": maybe(0.93, float(rng.integers(12))),
        "site": float(rng.integers(4)),
        "device": rng.choice(tables.DEVICES),
        "recording_date": record.taken,
        "report": _report(codes, rng),
        "scp_codes": codes,
        "heart_axis": maybe(0.6, next(s for end, s in tables.AXES if axis < end)),
        "infarction_stadium1": stage if "MI" in record.labels else "",
        "validated_by": float(rng.integers(12)) if human else "",
        "second_opinion": bool(rng.random() < 0.03),
        "initial_autogenerated_report": not human,
        "validated_by_human": human,
        "baseline_drift": f" , {chest[session.drift]}" if session.drift else "",
        "static_noise": " , alles,  " if session.tremor > 3 else "",
        "burst_noise": chest[session.burst],
        "electrodes_problems": chest[session.loose],
        "extra_beats": "1ES" if session.ectopic else "",
        "strat_fold": patient.fold,
        "filename_lr": record.filename(100),
        "filename_hr": record.filename(500),
    }
    return [str(values.get(column, "")) for column in tables.COLUMNS]


def _codes(record: _Record, rng: np.random.Generator) -> dict[str, float]:
    """Statement -> likelihood: diagnoses first, then form, then rhythm."""
    session, labels = record.session, record.labels
    diagnoses = [record.patient.codes[c] for c in tables.SUPERCLASSES if c in labels]
    form = {
        "QWAVE": "MI" in labels and rng.random() < 0.2,
        "ABQRS": rng.random() < 0.12,
        "NT_": "STTC" in labels and rng.random() < 0.1,
        "VCLVH": "LVH" in diagnoses and rng.random() < 0.25,
        "PVC": session.ectopic,
    }
    codes = {code: float(_pick(tables.LIKELIHOODS, rng)) for code in diagnoses}
    codes |= {code: 0.0 for code, found in form.items() if found}
    return codes | {session.rhythm: 0.0}


def _report(codes: dict[str, float], rng: np.random.Generator) -> str:
    words = [tables.PHRASES[code] for code in reversed(codes) if code in tables.PHRASES]
    if rng.random() < 0.15:
        words.append(str(rng.choice(tables.REMARKS)))
    return (", " if rng.random() < 0.5 else " ").join(words)


def _write_csv(
    path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    """Write under another name and rename, so that the file is whole or absent."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    part.replace(path)


def _plant(
    signal: np.ndarray, planted: Mapping[str, float], seeds: Sequence[int]
) -> np.ndarray:
    """Apply the nuisance operations, in registry order, to (12, T) millivolt."""
    import torch

    from ..models.ecg_augmentations import AUGMENTATIONS

    x = torch.from_numpy(signal)[None]
    for name, magnitude in planted.items():
        op, place = AUGMENTATIONS[name], list(AUGMENTATIONS).index(name)
        # A seed for each operation: one more does not change the others' draws.
        state = np.random.SeedSequence([*seeds, place]).generate_state(1)
        generator = torch.Generator().manual_seed(int(state[0]))
        draw = op.draw(x.shape, dtype=x.dtype, generator=generator)
        x = op.apply(x, x.new_full((1,), magnitude), draw, rate=tables.MODEL_RATE)
    return x[0].numpy()


def _write_record(stem: Path, signal: np.ndarray, rate: int) -> None:
    """Write (12, T) millivolt at MODEL_RATE as a WFDB record of format 16."""
    if rate != tables.MODEL_RATE:
        # Low-pass, then every fifth sample; padded along a line, since a step from
        # the record's last value to zero would ring.
        signal = resample_poly(signal, rate, tables.MODEL_RATE, 1, padtype="line")
    leads = len(signal)
    # -32768 means "no value" in format 16.
    units = np.clip(np.rint(signal * UNITS_PER_MILLIVOLT), -32767, 32767)
    wfdb.wrsamp(
        stem.name,
        fs=rate,
        units=["mV"] * leads,
        sig_name=list(tables.LEADS),
        d_signal=units.T.astype(np.int64),
        fmt=["16"] * leads,
        adc_gain=[float(UNITS_PER_MILLIVOLT)] * leads,
        baseline=[0] * leads,
        write_dir=str(stem.parent),
    )
