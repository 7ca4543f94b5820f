"""Splits by fold and small cohorts: on tables written here, then on samples."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections import Counter
from itertools import chain, pairwise

import numpy as np
import polars as pl
import pytest
import torch
import wfdb

from pyhealth.datasets import PatientSplit
from pyhealth.datasets.ptbxl import CohortSplit, StratFoldSplit
from pyhealth.tasks.ecg_classification import ECGBinaryClassification

ONE_A_FOLD = pl.DataFrame(
    # Patient p3 has one record, in fold 3, and p4 has two, in fold 4.
    [
        {"patient_id": f"p{fold}", "strat_fold": fold, "label": fold % 2}
        for fold in range(1, 11)
        for _ in range(1 + (fold == 4))
    ]
)


def corpus_table(patients=600, prevalence=0.3, seed=0):
    """Patients with 1 to 4 records in folds 1 to 10; some patients' labels change."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(patients):
        positive = rng.random() < prevalence
        records = 1 + rng.choice(4, p=[0.8, 0.1, 0.06, 0.04])
        for record in range(records):
            label = int(positive and (record == 0 or rng.random() < 0.7))
            fold = number % 10 + 1
            rows.append((f"p{number:04d}", fold, label))
    return pl.DataFrame(rows, ["patient_id", "strat_fold", "label"], orient="row")


TABLE = corpus_table()
TEST_RECORDS = TABLE.with_row_index().filter(pl.col("strat_fold") == 10)["index"]


def samples_of(table):
    """Sample indices of each patient, one sample a row."""
    indices = {}
    for index, patient in enumerate(table["patient_id"]):
        indices.setdefault(patient, []).append(index)
    return indices


def split(rule, table=TABLE):
    parts = rule.bind(table).split_indices(samples_of(table))
    assert all(part.dtype == np.int64 for part in parts)
    assert all(part.tolist() == sorted(set(part.tolist())) for part in parts)
    return [part.tolist() for part in parts]


def patients_of(indices, table=TABLE):
    return set(table["patient_id"].gather(indices))


# Folds ------------------------------------------------------------------------------


def test_the_published_folds_train_validate_and_test():
    # p4's two records are samples 3 and 4.
    parts = split(StratFoldSplit(), ONE_A_FOLD)
    assert parts == [[0, 1, 2, 3, 4, 5, 6, 7, 8], [9], [10]]


def test_other_folds_can_be_named_and_the_rest_is_left_out():
    rule = StratFoldSplit(train=(4, 2), val=iter([7]), test=[1, 10])
    assert (rule.train, rule.val, rule.test) == ((4, 2), (7,), (1, 10))
    assert split(rule, ONE_A_FOLD) == [[1, 3, 4], [7], [0, 10]]


def test_validation_and_test_may_be_empty():
    rule = StratFoldSplit(train=[1], val=[], test=[])
    assert split(rule, ONE_A_FOLD) == [[0], [], []]


def test_samples_of_nobody_in_the_table_belong_to_no_part():
    bound = StratFoldSplit().bind(ONE_A_FOLD)
    parts = bound.split_indices({"stranger": [0, 1], "p9": [2], "p1": [4, 3]})
    assert [part.tolist() for part in parts] == [[3, 4], [2], []]


def test_every_record_of_a_large_table_lies_in_the_part_of_its_fold():
    parts = split(StratFoldSplit())
    folds = TABLE["strat_fold"]
    assert [set(folds.gather(part)) for part in parts] == [set(range(1, 9)), {9}, {10}]
    assert sorted(chain(*parts)) == list(range(len(TABLE)))


@pytest.mark.parametrize(
    "folds",
    [
        {"train": range(1, 10)},  # 9 twice
        {"train": [1, 1]},
        {"val": [10]},
        {"train": [0]},
        {"test": [11]},
        {"val": [-1]},
    ],
)
def test_folds_twice_or_unknown_are_refused(folds):
    with pytest.raises(ValueError, match="needs different folds from 1 to 10, got"):
        StratFoldSplit(**folds)


@pytest.mark.parametrize("rule", [StratFoldSplit(), CohortSplit(50)])
def test_a_split_that_knows_no_folds_says_so(rule):
    name = type(rule).__name__
    for call in (rule.to_dict, lambda: rule.split_indices({"p1": [0]})):
        with pytest.raises(ValueError, match=rf"{name} does not know .*set_task.*bind"):
            call()


@pytest.mark.parametrize("rule", [StratFoldSplit(), CohortSplit(4)])
def test_a_patient_in_two_folds_is_named(rule):
    table = ONE_A_FOLD.vstack(
        pl.DataFrame({"patient_id": ["p6"], "strat_fold": [10], "label": [0]})
    )
    with pytest.raises(ValueError, match="patient p6 lie in two folds"):
        rule.bind(table)


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_part_without_records_is_named_with_the_folds_there_are(part):
    table = ONE_A_FOLD.filter(pl.col("strat_fold") != 7)
    folds = {"train": [1], "val": [2], "test": [3]} | {part: [7]}
    present = r"\[1, 2, 3, 4, 5, 6, 8, 9, 10\]"
    with pytest.raises(ValueError, match=rf"the {part} folds \[7\].*folds {present}"):
        StratFoldSplit(**folds).bind(table)
    # A part is only empty if none of its folds has a record.
    StratFoldSplit(**folds | {part: [7, 8]}).bind(table)


def test_a_training_part_of_no_fold_is_refused():
    with pytest.raises(ValueError):
        StratFoldSplit(train=[]).bind(ONE_A_FOLD)


def test_binding_makes_a_new_split():
    rule = StratFoldSplit()
    bound = rule.bind(ONE_A_FOLD)
    assert bound == rule
    with pytest.raises(ValueError, match="does not know"):
        rule.to_dict()
    # Bound again, it follows the newer table.
    moved = ONE_A_FOLD.with_columns(strat_fold=11 - pl.col("strat_fold"))
    again = bound.bind(moved)
    assert again.to_dict() == rule.bind(moved).to_dict() != bound.to_dict()


def test_the_cache_key_changes_with_the_folds_and_with_the_table():
    moved = ONE_A_FOLD.with_columns(
        pl.when(pl.col("patient_id") == "p8")
        .then(9)
        .otherwise("strat_fold")
        .alias("strat_fold")
    )
    fewer = ONE_A_FOLD.filter(pl.col("patient_id") != "p8")
    keys = [
        StratFoldSplit().bind(ONE_A_FOLD).to_dict(),
        StratFoldSplit().bind(moved).to_dict(),
        StratFoldSplit().bind(fewer).to_dict(),
        StratFoldSplit(train=range(1, 8)).bind(ONE_A_FOLD).to_dict(),
        StratFoldSplit(val=[10], test=[9]).bind(ONE_A_FOLD).to_dict(),
        CohortSplit(8, val_fraction=0.5).bind(ONE_A_FOLD).to_dict(),
    ]
    texts = {json.dumps(key, sort_keys=True) for key in keys}
    assert len(texts) == len(keys)
    assert json.loads(json.dumps(keys[0])) == keys[0]


@pytest.mark.parametrize("rule", [StratFoldSplit(), CohortSplit(300, seed=2)])
def test_the_cache_key_and_the_parts_do_not_follow_the_order_of_rows(rule):
    shuffled = TABLE.sample(fraction=1.0, shuffle=True, seed=0)
    assert rule.bind(shuffled).to_dict() == rule.bind(TABLE).to_dict()
    indices = samples_of(TABLE)
    for one, other in zip(
        rule.bind(TABLE).split_indices(indices),
        rule.bind(shuffled).split_indices(dict(reversed(indices.items()))),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("rule", [StratFoldSplit(val=[8], train=[1]), CohortSplit(90)])
def test_a_split_is_frozen_and_pickles(rule):
    bound = rule.bind(TABLE)
    back = pickle.loads(pickle.dumps(bound))
    assert back.to_dict() == bound.to_dict()
    assert repr(back) == repr(rule)  # without 600 patients
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.test = (1,)


# Cohorts ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("n_records", [25, 100, 173, 400, 600])
def test_a_cohort_has_exactly_n_records_of_patients_on_one_side(n_records, seed):
    train, val, test = split(CohortSplit(n_records, seed))
    assert len(train) + len(val) == n_records
    sides = [patients_of(part) for part in (train, val, test)]
    assert sum(len(side) for side in sides) == len(set().union(*sides))
    assert test == TEST_RECORDS.to_list()  # whatever N and the seed


def test_a_cohort_leaves_out_records_of_one_patient_at_most():
    for n_records in range(100, 130):
        train, val, _ = split(CohortSplit(n_records, seed=4))
        used = Counter(TABLE["patient_id"].gather(train + val))
        whole = Counter(TABLE["patient_id"])
        partly = [patient for patient in used if used[patient] < whole[patient]]
        assert len(partly) <= 1
        for patient in partly:  # its first records
            first = samples_of(TABLE)[patient][: used[patient]]
            assert set(first) <= set(train + val)


@pytest.mark.parametrize("seed", range(5))
def test_cohorts_are_nested_train_in_train_and_validation_in_validation(seed):
    sizes = [60, 150, 375, 700]
    parts = [split(CohortSplit(size, seed)) for size in sizes]
    for (train, val, _), (more_train, more_val, _) in pairwise(parts):
        assert set(train) < set(more_train)
        assert set(val) < set(more_val)


@pytest.mark.parametrize("val_fraction", [0.2, 0.5, 0.35])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("n_records", [50, 137, 333, 600])
def test_prevalence_and_share_are_kept_to_one_patient(n_records, seed, val_fraction):
    rule = CohortSplit(n_records, seed, val_fraction=val_fraction)
    train, val, _ = (patients_of(part) for part in split(rule))
    positives = set(TABLE.filter(pl.col("label") == 1)["patient_id"])
    pool = set(TABLE.filter(pl.col("strat_fold") != 10)["patient_id"])
    prevalence = len(positives & pool) / len(pool)
    cohort = train | val
    assert abs(len(cohort & positives) - prevalence * len(cohort)) <= 1
    for stratum in (cohort & positives, cohort - positives):
        assert abs(len(val & stratum) - val_fraction * len(stratum)) < 1
    assert abs(len(val) - val_fraction * len(cohort)) < 2


def test_by_default_four_fifths_train():
    train, val, _ = (patients_of(part) for part in split(CohortSplit(600)))
    assert len(val) / len(train | val) == pytest.approx(0.2, abs=0.005)


def test_the_whole_pool_can_be_the_cohort():
    size = len(TABLE) - len(TEST_RECORDS)
    train, val, test = split(CohortSplit(size))
    assert sorted(train + val + test) == list(range(len(TABLE)))


def test_seeds_draw_different_cohorts_and_one_seed_the_same():
    cohorts = [split(CohortSplit(100, seed)) for seed in range(6)]
    trains = {tuple(train) for train, _, _ in cohorts}
    vals = {tuple(val) for _, val, _ in cohorts}
    assert len(trains) == len(vals) == 6
    assert split(CohortSplit(100, 3)) == cohorts[3]
    overlap = len(set(cohorts[0][0]) & set(cohorts[1][0]))
    assert overlap < 50  # of 80; a draw of 80 of 700 meets another in about 10


def test_a_cohort_is_drawn_from_all_folds_but_the_tests():
    train, val, test = split(CohortSplit(600, test=(3, 10)))
    folds = TABLE["strat_fold"]
    assert set(folds.gather(test)) == {3, 10}
    assert set(folds.gather(train)) == set(range(1, 10)) - {3}
    assert set(folds.gather(val)) == set(range(1, 10)) - {3}
    assert len(test) == folds.is_in([3, 10]).sum()


def test_a_cohort_without_test_folds_uses_them_all():
    train, val, test = split(CohortSplit(len(TABLE), test=()))
    assert test == []
    assert sorted(train + val) == list(range(len(TABLE)))


def test_the_cache_key_changes_with_all_that_makes_a_cohort():
    other = TABLE.with_columns(label=1 - pl.col("label"))
    keys = [
        CohortSplit(100).bind(TABLE).to_dict(),
        CohortSplit(101).bind(TABLE).to_dict(),
        CohortSplit(100, seed=1).bind(TABLE).to_dict(),
        CohortSplit(100, val_fraction=0.3).bind(TABLE).to_dict(),
        CohortSplit(100, test=[9]).bind(TABLE).to_dict(),
        CohortSplit(100, protocol="paper").bind(TABLE).to_dict(),
        CohortSplit(100).bind(corpus_table(seed=1)).to_dict(),
        CohortSplit(100).bind(other).to_dict(),
    ]
    assert len({json.dumps(key, sort_keys=True) for key in keys}) == len(keys)
    assert len({key["digest"] for key in keys}) == len(keys)


def test_too_few_records_are_counted():
    size = len(TABLE) - len(TEST_RECORDS)
    with pytest.raises(ValueError) as error:
        CohortSplit(size + 1).bind(TABLE)
    assert str(error.value) == (
        f"A cohort of {size + 1} records was asked for, but the folds outside [10] "
        f"hold {size}."
    )


def test_an_empty_test_fold_is_named():
    table = TABLE.filter(pl.col("strat_fold") < 10)
    message = (
        r"No record lies in the test folds \[10\]; this corpus has folds "
        r"\[1, 2, 3, 4, 5, 6, 7, 8, 9\]"
    )
    with pytest.raises(ValueError, match=message):
        CohortSplit(100).bind(table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_records": 1}, "n_records must be 2 or more, got 1"),
        ({"n_records": 0}, "n_records must be 2 or more, got 0"),
        ({"n_records": 9, "val_fraction": 0}, "between 0 and 1, got 0"),
        ({"n_records": 9, "val_fraction": 1.0}, r"between 0 and 1, got 1\.0"),
        ({"n_records": 9, "val_fraction": -0.2}, r"between 0 and 1, got -0\.2"),
        ({"n_records": 9, "val_fraction": float("nan")}, "between 0 and 1, got nan"),
        ({"n_records": 9, "protocol": "random"}, "patient', 'paper'.*got 'random'"),
        ({"n_records": 9, "test": [11]}, r"folds from 1 to 10, got \(11,\)"),
        ({"n_records": 9, "test": [0, 10]}, r"folds from 1 to 10, got \(0, 10\)"),
    ],
)
def test_wrong_arguments_of_a_cohort_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CohortSplit(**arguments)


@pytest.mark.parametrize(
    "arguments", [{"n_records": 4}, {"n_records": 99, "val_fraction": 0.001}]
)
def test_a_cohort_with_nobody_to_validate_on_is_refused(arguments):
    with pytest.raises(ValueError):
        CohortSplit(**arguments).bind(TABLE)


def test_many_strata_are_validated_on_too():
    """Twenty labels, the rarest with a hundredth of the commonest's records."""
    names = [f"L{k:02d}" for k in range(20)]
    weights = np.geomspace(1, 0.01, 20)
    rng = np.random.default_rng(0)
    drawn = rng.choice(20, p=weights / weights.sum(), size=6000)
    table = TABLE.sample(6000, with_replacement=True, seed=0).with_columns(
        pl.Series("label", [[names[k]] for k in drawn]),
        pl.Series("patient_id", [f"p{k}" for k in range(6000)]),
    )
    for size in (100, 250, 1000):
        _, val, _ = split(CohortSplit(size), table)
        assert len(val) / size == pytest.approx(0.2, abs=0.04)
        labels = {table["label"][index][0] for index in val}
        assert len(labels) >= {100: 9, 250: 13, 1000: 17}[size]


# The authors' protocol ---------------------------------------------------------------


def paper(n_records, seed=0, **arguments):
    return split(CohortSplit(n_records, seed, protocol="paper", **arguments))


@pytest.mark.parametrize("n_records", [25, 173, 700])
def test_the_papers_cohort_is_drawn_by_record(n_records):
    train, val, test = paper(n_records)
    assert len(val) == n_records // 5
    assert len(train) == n_records - len(val)
    assert not set(train) & set(val)
    assert test == TEST_RECORDS.to_list()
    assert not patients_of(test) & patients_of(train + val)


def test_in_the_papers_cohort_every_record_has_the_same_chance():
    """The one, two, three or four records of a patient are drawn alike."""
    size = len(TABLE) - len(TEST_RECORDS)
    cohorts = [paper(90, seed)[:2] for seed in range(400)]
    drawn = Counter(chain.from_iterable(chain(*parts) for parts in cohorts))
    pool = set(range(len(TABLE))) - set(TEST_RECORDS)
    assert set(drawn) == pool
    # 400 draws of probability 90 / size each; five standard errors of their mean.
    rank = TABLE.select(pl.int_range(pl.len()).over("patient_id")).to_series()
    for place in range(4):
        group = [index for index in pool if rank[index] == place]
        mean = np.mean([drawn[index] for index in group]) / 400
        error = np.sqrt(90 / size / 400 / len(group))
        assert abs(mean - 90 / size) < 5 * error


def test_the_papers_protocol_puts_patients_on_both_sides():
    train, val, _ = paper(700)
    assert patients_of(train) & patients_of(val)


def test_the_papers_cohorts_are_nested():
    parts = [paper(size) for size in (60, 150, 700)]
    for (train, val, _), (more_train, more_val, _) in pairwise(parts):
        assert set(train) < set(more_train)
        assert set(val) < set(more_val)


# Records without a sample ------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [CohortSplit(300), CohortSplit(300, protocol="paper"), StratFoldSplit()],
)
def test_skipped_records_leave_the_others_where_they_were(rule):
    table = TABLE.with_row_index("ecg_id")
    whole = [table["ecg_id"].gather(part) for part in split(rule, table)]
    skipped = list(range(0, len(table), 3))
    left = table.filter(~pl.col("ecg_id").is_in(skipped))
    parts = rule.bind(table, skipped).split_indices(samples_of(left))
    for part, before in zip(parts, whole, strict=True):
        expected = sorted(set(before) - set(skipped))
        assert left["ecg_id"].gather(part).to_list() == expected


# On samples -------------------------------------------------------------------------


def ids(part):
    return [sample["ecg_id"] for sample in part]


def test_set_task_parts_the_samples_by_fold(dataset, parts):
    records = dataset.records()
    fold = dict(records.select("ecg_id", "strat_fold").iter_rows())
    owner = dict(records.select("ecg_id", "patient_id").iter_rows())
    found = [ids(part) for part in parts]
    assert len(parts) == 3
    assert [{fold[k] for k in part} for part in found] == [set(range(1, 9)), {9}, {10}]
    assert sorted(chain(*found)) == records["ecg_id"].to_list()
    sides = [{owner[k] for k in part} for part in found]
    assert sum(len(side) for side in sides) == len(set().union(*sides)) == 200
    assert [set(part.patient_to_index) for part in parts] == sides
    assert parts[0].fit_split["kind"] == "strat_fold"


def test_set_task_draws_a_cohort_by_the_tasks_label(dataset, parts):
    task = ECGBinaryClassification("MI", sampling_rate=100, length=200)
    train, val, test = dataset.set_task(task, split=CohortSplit(100, seed=5))
    assert len(train) + len(val) == 100
    assert ids(test) == ids(parts[2])
    records = dataset.records(task)
    owner = dict(records.select("ecg_id", "patient_id").iter_rows())
    label = dict(records.select("ecg_id", "label").iter_rows())
    sides = [{owner[k] for k in ids(part)} for part in (train, val, test)]
    assert sum(len(side) for side in sides) == len(set().union(*sides))
    for part in (train, val, test):
        assert {int(s["label"]) == label[s["ecg_id"]] for s in part} == {True}
    pool = records.filter(pl.col("strat_fold") != 10).group_by("patient_id")
    prevalence = pool.agg(pl.col("label").max())["label"].mean()
    cohort = sides[0] | sides[1]
    positives = {owner[k] for k in owner if label[k]} & cohort
    assert abs(len(positives) - prevalence * len(cohort)) <= 1
    # The same as without PyHealth.
    ordered = records.sort("patient_id", "ecg_id")  # as set_task orders its samples
    by_hand = [ordered["ecg_id"].gather(k) for k in split(CohortSplit(100, 5), ordered)]
    assert [ids(train), ids(val), ids(test)] == [part.to_list() for part in by_hand]


def test_pyhealths_own_splits_still_work(dataset):
    task = ECGBinaryClassification("MI", sampling_rate=100, length=200)
    train, rest = dataset.set_task(task, split=PatientSplit((0.7, 0.3), seed=1))
    assert len(train) + len(rest) == len(dataset.records())
    assert not set(train.patient_to_index) & set(rest.patient_to_index)


def test_dataset_statistics_come_from_the_training_part_only(dataset):
    task = ECGBinaryClassification(
        "MI", sampling_rate=100, length=200, normalize="dataset"
    )
    train, val, test = dataset.set_task(task, split=StratFoldSplit())
    records = dataset.records()
    signals = {
        row["ecg_id"]: wfdb.rdrecord(row["record_path"]).p_signal.T
        for row in records.iter_rows(named=True)
    }
    training = records.filter(pl.col("strat_fold") <= 8)["ecg_id"]
    values = np.concatenate([signals[k].ravel() for k in training])
    for part in (train, val, test):
        processor = part.input_processors["ecg"]
        assert processor.mean == pytest.approx(values.mean(), abs=1e-9)
        assert processor.std == pytest.approx(values.std(), rel=1e-9)
    everybody = np.concatenate([signal.ravel() for signal in signals.values()])
    assert abs(everybody.std() / values.std() - 1) > 1e-6  # else nothing was shown
    for part in (train, val, test):
        for sample in (part[0], part[len(part) - 1]):
            signal = signals[sample["ecg_id"]]
            expected = (signal[:, 400:600] - values.mean()) / values.std()
            expected[np.ptp(signal, axis=1) == 0] = 0.0
            torch.testing.assert_close(
                sample["ecg"], torch.tensor(expected, dtype=torch.float32)
            )
