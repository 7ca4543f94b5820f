"""Anybody's own WFDB records: the table's checks, and the same path as PTB-XL."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import wfdb
from scipy.io import savemat

from pyhealth.bilevel.study.data import prepare
from pyhealth.datasets.ecg_folder import ECGFolderDataset
from pyhealth.processors.ecg_record_processor import STANDARD_LEADS
from pyhealth.tasks.ecg_folder_classification import ECGFolderClassification

TASK = {"sampling_rate": 100, "length": 200}


def write_record(folder, name, rng, leads=STANDARD_LEADS):
    signal = rng.normal(size=(500, len(leads))).round(3)
    count = len(leads)
    wfdb.wrsamp(
        name,
        fs=100,
        units=["mV"] * count,
        sig_name=list(leads),
        p_signal=signal,
        fmt=["16"] * count,
        adc_gain=[1000.0] * count,
        baseline=[0] * count,
        write_dir=str(folder),
    )
    return signal


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixty records of thirty patients; every third patient is positive."""
    root = tmp_path_factory.mktemp("own")
    (root / "a").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number in range(60):
        write_record(root / "a", f"r{number:02d}", rng)
        patient = number // 2
        rows.append((f"a/r{number:02d}", f"P{patient}", int(patient % 3 == 0)))
    pd.DataFrame(rows, columns=["record", "patient", "label"]).to_csv(
        root / "records.csv", index=False
    )
    return root


@pytest.fixture
def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "own"))


def edit(root, change):
    table = pd.read_csv(root / "records.csv", dtype=str)
    table = change(table)
    table.to_csv(root / "records.csv", index=False)
    return root


def with_folds(table):
    patient = table["patient"].str.removeprefix("P").astype(int)
    return table.assign(fold=patient % 5 + 1)


def test_given_folds_are_used(copied, tmp_path):
    dataset = ECGFolderDataset(edit(copied, with_folds), cache_dir=tmp_path / "cache")
    data = prepare(dataset, ECGFolderClassification(**TASK))
    table = pd.read_csv(copied / "records.csv")
    for part, folds in ((data.train, [1, 2, 3]), (data.val, [4]), (data.test, [5])):
        rows = table[table["fold"].isin(folds)]
        assert sorted(part.ecg_ids) == (rows.index + 1).tolist()
        own = table.loc[[ecg_id - 1 for ecg_id in part.ecg_ids]]
        assert part.labels == own["label"].tolist()
        assert part.patient_ids == own["patient"].tolist()
    sample = data.train[0]
    assert sample["ecg"].shape == (12, 200)
    assert data.description["test_fold"] == 5


def test_without_folds_patients_are_dealt_out(folder, tmp_path):
    dataset = ECGFolderDataset(folder, cache_dir=tmp_path / "cache")
    records = dataset.records(dataset.default_task).to_pandas()
    assert sorted(records["strat_fold"].unique()) == list(range(1, 11))
    assert (records.groupby("patient_id")["strat_fold"].nunique() == 1).all()
    positive = records.groupby("strat_fold")["label"].sum()
    assert positive.tolist() == [2] * 10  # ten positive patients with two records each
    again = ECGFolderDataset(folder, cache_dir=tmp_path / "other")
    assert again.records().equals(dataset.records())


def test_blanks_make_no_other_patient(copied, tmp_path):
    edit(copied, lambda t: t.assign(patient=t["patient"] + [" ", ""] * 30))
    records = ECGFolderDataset(copied, cache_dir=tmp_path / "cache").records()
    assert records["patient_id"].n_unique() == 30


def test_a_cohort_can_be_drawn(folder, tmp_path):
    dataset = ECGFolderDataset(folder, cache_dir=tmp_path / "cache")
    data = prepare(dataset, ECGFolderClassification(**TASK), n_records=30)
    assert len(data.train) + len(data.val) == 30
    assert not set(data.train.patient_ids) & set(data.test.patient_ids)


def test_a_challenge_record_with_a_mat_file_counts(copied, tmp_path):
    """A WFDB header over a MATLAB 4 file: 16 bits behind 24 bytes of header."""
    rng = np.random.default_rng(1)
    counts = rng.integers(-2000, 2000, (12, 500)).astype(np.int16)
    savemat(copied / "A0001.mat", {"val": counts}, format="4")
    lines = ["A0001 12 100 500"]
    lines += [
        f"A0001.mat 16+24 1000/mV 16 0 {row[0]} {row.sum(dtype=np.int16)} 0 {lead}"
        for row, lead in zip(counts, STANDARD_LEADS, strict=True)
    ]
    (copied / "A0001.hea").write_text("\n".join(lines) + "\n")
    edit(copied, lambda t: t.replace({"record": {"a/r59": "A0001"}}))
    dataset = ECGFolderDataset(copied, cache_dir=tmp_path / "cache")
    samples = dataset.set_task(ECGFolderClassification(**TASK))
    index = samples.ecg_ids.index(60)
    expected = torch.from_numpy(counts / 1000).float()
    torch.testing.assert_close(samples.record(index), expected)


def test_other_leads_can_be_asked_for(tmp_path):
    rng = np.random.default_rng(0)
    signal = write_record(tmp_path, "one", rng, ["II", "V5"])
    write_record(tmp_path, "two", rng, ["II", "V5"])
    write_record(tmp_path, "three", rng, ["II", "V5"])
    (tmp_path / "records.csv").write_text(
        "record,patient,label,fold\none,x,0,1\ntwo,y,1,2\nthree,z,1,3\n"
    )
    dataset = ECGFolderDataset(tmp_path, cache_dir=tmp_path / "cache")
    task = ECGFolderClassification(100, 500, "none", leads=["V5"])
    sample = dataset.set_task(task)[0]
    np.testing.assert_allclose(sample["ecg"][0].numpy(), signal[:, 1], atol=1e-6)


def test_a_missing_table_says_what_it_needs(tmp_path):
    with pytest.raises(FileNotFoundError, match="columns record, patient and label"):
        ECGFolderDataset(tmp_path)


def cell(line, column, value):
    """Change one cell of the table; lines as an editor counts them."""

    def change(table):
        table = with_folds(table).astype(str)
        table.loc[line - 2, column] = value
        return table

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (cell(7, "label", "yes"), r"line 7: label 'yes' is neither 0 nor 1"),
        (cell(2, "label", ""), r"line 2: label is empty"),
        (cell(9, "patient", ""), r"line 9: patient is empty"),
        (cell(5, "record", "a/none"), r"line 5: a/none.hea is missing"),
        (cell(5, "record", "../a"), r"line 5: ../a.hea lies outside"),
        (cell(5, "record", "a/r00"), r"line 5: record 'a/r00' is in line 2 too"),
        (cell(5, "record", "./a/r00"), r"line 5: record './a/r00' is in line 2 too"),
        (cell(3, "fold", "11"), r"line 3: fold '11' is not 1 to 10"),
        (cell(3, "fold", "4"), r"line 3: patient 'P0' is in fold 1 too"),
        (lambda t: t.drop(columns="label"), r"no column label, found record, patient"),
        (lambda t: t.head(0), r"has no row"),
        (lambda t: t.assign(fold=1), r"three folds are needed"),
        (lambda t: t.head(10), r"ten folds need ten patients .* found \{0: 3, 1: 2\}"),
    ],
)
def test_a_bad_table_is_told_row_by_row(copied, change, words):
    with pytest.raises(ValueError, match=words) as error:
        ECGFolderDataset(edit(copied, change))
    assert str(copied / "records.csv") in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "is empty"), (b"record\xff", "not in UTF-8")]
)
def test_what_is_no_table_is_told(copied, content, words):
    (copied / "records.csv").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        ECGFolderDataset(copied)


def test_many_bad_rows_are_counted(copied):
    edit(copied, lambda t: t.assign(label="x"))
    with pytest.raises(ValueError, match="60 of 60 rows cannot be used") as error:
        ECGFolderDataset(copied)
    assert str(error.value).count("line ") == 10
    assert "and 50 more" in str(error.value)
