"""ECGBinaryClassification on patients made by hand, then through set_task."""

from __future__ import annotations

import copy
import csv
import logging
import pickle
import shutil
import warnings
from datetime import datetime
from pathlib import Path

import polars as pl
import pytest
import torch
from pyhealth.data import Patient

from pyhealth.datasets import base_dataset, ecg_dataset
from pyhealth.datasets.ptbxl import CohortSplit, PTBXLDataset, StratFoldSplit
from pyhealth.datasets.ptbxl_synthetic import write_synthetic_ptbxl
from pyhealth.processors import ecg_record_processor
from pyhealth.processors.ecg_processor import ECGProcessor
from pyhealth.processors.ecg_record_processor import (
    RECIPE_VERSION,
    STANDARD_LEADS,
    MissingRecordError,
    RecordError,
)
from pyhealth.tasks import BaseTask
from pyhealth.tasks.ecg_classification import SUPERCLASSES, ECGBinaryClassification

# ecg_id: likelihood of each listed superclass.
RECORDS = {
    11: {"NORM": 100.0},
    12: {"MI": 0.0, "CD": 100.0},
    13: {},
    14: {"MI": 80.0, "STTC": 50.0, "HYP": 35.0},
    15: {"MI": 35.0, "NORM": 15.0},
}
# ecg_ids whose label is 1, by class and the task's min_likelihood, counted by hand.
POSITIVE = {
    ("NORM", 0): [11, 15],
    ("NORM", 50): [11],
    ("MI", 0): [12, 14, 15],
    ("MI", 0.5): [14, 15],
    ("MI", 35): [14, 15],
    ("MI", 36): [14],
    ("MI", 80): [14],
    ("MI", 81): [],
    ("STTC", 0): [14],
    ("STTC", 50): [14],
    ("STTC", 50.5): [],
    ("CD", 0): [12],
    ("CD", 100): [12],
    ("HYP", 0): [14],
    ("HYP", 50): [],
}
SHORT = {"sampling_rate": 100, "length": 50}
READ = ecg_record_processor.read_digital


def patient_of(records, dataset_limit=0.0):
    """A patient as PTBXLDataset(min_likelihood=dataset_limit) makes it."""
    rows = []
    for ecg_id, likelihoods in records.items():
        row = {
            "patient_id": "15709",
            "event_type": "ptbxl",
            # The later the earlier, and one without a date.
            "timestamp": None if ecg_id == 13 else datetime(1990, 1, 32 - ecg_id),
            "ptbxl/ecg_id": ecg_id,
            "ptbxl/record_path": f"/nowhere/{ecg_id:05d}_lr",
        }
        for name in SUPERCLASSES:
            value = likelihoods.get(name)
            listed = value is not None and value >= dataset_limit
            row[f"ptbxl/{name.lower()}"] = int(listed)
            row[f"ptbxl/{name.lower()}_likelihood"] = value
        rows.append(row)
    schema = {
        "timestamp": pl.Datetime("ms"),
        **{f"ptbxl/{name.lower()}_likelihood": pl.Float64 for name in SUPERCLASSES},
    }
    return Patient("15709", pl.DataFrame(rows, schema_overrides=schema))


def labels(samples):
    return {sample["ecg_id"]: sample["label"] for sample in samples}


def listen(logger):
    """A list that fills with what a logger says, and the handler to take off."""
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    return lines, handler


@pytest.fixture
def said():
    lines, handler = listen(ecg_dataset.logger)
    yield lines
    ecg_dataset.logger.removeHandler(handler)


@pytest.fixture
def unread(monkeypatch):
    """Fail if a waveform is read."""

    def read_digital(path):
        pytest.fail("a waveform was read")

    monkeypatch.setattr(ecg_record_processor, "read_digital", read_digital)


def opened(root, cache_dir, **settings):
    """A small dataset, its table built by a Dask worker inside this process: 0.6 s."""
    dataset = PTBXLDataset(root, sampling_rate=100, cache_dir=cache_dir, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_dataset, "in_notebook", lambda: True)
        dataset.records()
    return dataset


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A corpus of ten patients in a folder of its own. Never write into it."""
    folder = tmp_path_factory.mktemp("small")
    return write_synthetic_ptbxl(folder / "data", 10, sampling_rates=[100])


@pytest.fixture(scope="module")
def small_dataset(small, cache_dir):
    return opened(small, cache_dir)


# Labels -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "limit"), POSITIVE)
def test_labels_are_those_counted_by_hand(name, limit):
    task = ECGBinaryClassification(name, normalize="none", min_likelihood=limit)
    found = labels(task(patient_of(RECORDS)))
    assert found == {ecg_id: int(ecg_id in POSITIVE[name, limit]) for ecg_id in RECORDS}


@pytest.mark.parametrize(
    ("dataset_limit", "task_limit", "positive"),
    [
        (0, 0, [12, 14, 15]),
        (35, 0, [14, 15]),
        (0, 35, [14, 15]),
        (50, 35, [14]),
        (35, 50, [14]),
        (100, 0, []),
    ],
)
def test_the_stricter_of_both_limits_decides(dataset_limit, task_limit, positive):
    task = ECGBinaryClassification("MI", min_likelihood=task_limit)
    found = labels(task(patient_of(RECORDS, dataset_limit)))
    assert [ecg_id for ecg_id, label in found.items() if label] == positive


def test_a_sample_has_exactly_these_keys(unread):
    samples = ECGBinaryClassification("MI")(patient_of(RECORDS))
    # By ecg_id; by date they would come the other way round.
    assert [sample["ecg_id"] for sample in samples] == [11, 12, 13, 14, 15]
    assert list(samples[1]) == ["patient_id", "ecg_id", "ecg", "label"]
    assert samples[1] == {
        "patient_id": "15709",
        "ecg_id": 12,
        "ecg": "/nowhere/00012_lr",
        "label": 1,
    }
    for sample in samples:
        kinds = [type(value) for value in sample.values()]
        assert kinds == [str, int, str, int]


def test_labels_of_the_synthetic_corpus_are_those_of_its_text(corpus, dataset):
    with open(corpus / "scp_statements.csv", newline="") as file:
        class_of = {
            row[""]: row["diagnostic_class"]
            for row in csv.DictReader(file)
            if row["diagnostic"]
        }
    with open(corpus / "ptbxl_database.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    patients = list(dataset.iter_patients())
    for name in SUPERCLASSES:
        task = ECGBinaryClassification(name, normalize="none")
        found = {}
        for patient in patients:
            found |= labels(task(patient))
        codes = [code for code, group in class_of.items() if group == name]
        expected = {
            int(row["ecg_id"]): int(
                any(f"'{code}'" in row["scp_codes"] for code in codes)
            )
            for row in rows
        }
        assert found == expected, name
        assert 0 < sum(found.values()) < len(found)


# Arguments --------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["mi", "AFIB", "", None])
def test_an_unknown_label_lists_the_known_ones(label):
    with pytest.raises(ValueError) as error:
        ECGBinaryClassification(label)
    assert str(error.value) == (
        f"task_label must be one of ['NORM', 'MI', 'STTC', 'CD', 'HYP'], got {label!r}."
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"on_error": "ignore"}, "on_error must be 'raise' or 'skip', got 'ignore'"),
        ({"on_error": None}, "on_error must be 'raise' or 'skip', got None"),
        ({"min_likelihood": -1}, "percentage, 0 to 100, got -1"),
        ({"min_likelihood": 101}, "percentage, 0 to 100, got 101"),
        ({"min_likelihood": float("nan")}, "percentage, 0 to 100, got nan"),
        ({"sampling_rate": 0}, "sampling_rate must be positive, got 0"),
        ({"length": 0}, "length must be 1 or more, got 0"),
        ({"normalize": "zscore"}, "normalize must be one of .* got 'zscore'"),
        ({"leads": ["I", "I"]}, r"leads must be different names, got \['I', 'I'\]"),
    ],
)
def test_a_wrong_argument_is_refused_when_the_task_is_made(argument, message):
    with pytest.raises(ValueError, match=message):
        ECGBinaryClassification("MI", **argument)


@pytest.mark.parametrize(
    ("rate", "length"), [(250, 2500), (100, 1000), (500, 5000), (360, 3600)]
)
def test_the_default_length_is_ten_seconds(rate, length):
    assert ECGBinaryClassification(sampling_rate=rate).length == length
    assert ECGBinaryClassification(sampling_rate=rate, length=77).length == 77


def test_the_defaults():
    task = ECGBinaryClassification()
    assert isinstance(task, BaseTask)
    assert task.task_name == "ECGBinaryClassification"
    assert (task.task_label, task.sampling_rate, task.length) == ("MI", 250, 2500)
    assert (task.normalize, task.min_likelihood, task.on_error) == ("lead", 0, "raise")
    assert task.leads == STANDARD_LEADS
    assert task.output_schema == {"label": "binary"}
    assert task.recipe_version == RECIPE_VERSION  # so it is in the cache key
    assert list(task.input_schema) == ["ecg"]


def test_the_schema_makes_the_processor_that_was_asked_for():
    task = ECGBinaryClassification("MI", 100, 300, "record", leads=["II", "V1"])
    kind, settings = task.input_schema["ecg"]
    assert kind is ECGProcessor
    processor = kind(**settings)
    assert vars(processor) == vars(ECGProcessor(100, 300, "record", ("II", "V1")))


def test_hypertrophy_by_z_score_of_each_lead_is_warned_of_once_with_the_reason():
    with pytest.warns(UserWarning) as caught:
        ECGBinaryClassification("HYP")
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "HYP is defined by voltage, which normalize='lead' erases" in text
    assert "Use normalize='dataset'" in text
    assert caught[0].filename == __file__  # points at the caller


@pytest.mark.parametrize(
    ("name", "normalize"),
    [("HYP", "dataset"), ("HYP", "none"), ("MI", "lead"), ("NORM", "lead")],
)
def test_nothing_else_is_warned_of(name, normalize):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ECGBinaryClassification(name, normalize=normalize)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_task_goes_to_another_process_and_calls_change_nothing(on_error):
    task = ECGBinaryClassification("CD", on_error=on_error)
    before = copy.deepcopy(vars(task))
    back = pickle.loads(pickle.dumps(task))
    assert vars(back) == before
    assert back(patient_of(RECORDS)) == task(patient_of(RECORDS))
    assert vars(task) == before


# Reading ----------------------------------------------------------------------------


def test_nothing_is_read_before_set_task(corpus, dataset, cache_dir, unread):
    again = PTBXLDataset(corpus, sampling_rate=100, cache_dir=cache_dir)
    patient = again.get_patient(again.unique_patient_ids[0])
    for name in SUPERCLASSES:
        for normalize in ("dataset", "record"):
            task = ECGBinaryClassification(name, normalize=normalize)
            assert task(patient)
    assert len(again.records(task)) == len(dataset.records())


def test_skipping_reads_each_record_and_leaves_out_what_cannot_be_used(small_dataset):
    patient = small_dataset.get_patient(small_dataset.unique_patient_ids[0])
    whole = ECGBinaryClassification("MI")(patient)
    skip = ECGBinaryClassification("MI", on_error="skip")
    assert skip(patient) == whole
    assert skip(patient_of(RECORDS)) == []  # none of these records exists
    with_x = ECGBinaryClassification("MI", leads=["I", "X"], on_error="skip")
    assert with_x(patient) == []


def test_set_task_gives_what_the_processor_makes_of_the_record(small_dataset):
    task = ECGBinaryClassification(
        "MI", normalize="record", leads=["V1", "II"], **SHORT
    )
    samples = small_dataset.set_task(task)
    records = small_dataset.records(task)
    paths = dict(records.select("ecg_id", "record_path").iter_rows())
    found = {sample["ecg_id"]: sample for sample in samples}
    assert labels(found.values()) == dict(records.select("ecg_id", "label").iter_rows())
    assert sorted(found) == sorted(paths)
    processor = ECGProcessor(100, 50, "record", ["V1", "II"])
    for ecg_id, sample in found.items():
        assert list(sample) == ["patient_id", "ecg_id", "ecg", "label"]
        assert sample["ecg"].shape == (2, 50)
        torch.testing.assert_close(
            sample["ecg"], processor.process(paths[ecg_id]), rtol=0, atol=0
        )
        assert sample["label"].shape == (1,)
    assert small_dataset.skipped_records == []


def test_different_settings_give_different_samples(small_dataset):
    settings = [
        {},
        {"task_label": "NORM"},
        {"sampling_rate": 50},
        {"length": 51},
        {"normalize": "record"},
        {"normalize": "dataset"},
        {"min_likelihood": 50.0},
        {"leads": STANDARD_LEADS[::-1]},
        {"leads": STANDARD_LEADS[:3]},
        {"on_error": "skip"},
    ]
    made = [
        small_dataset.set_task(ECGBinaryClassification(**SHORT | changed))
        for changed in settings
    ]
    # What the waveforms do not depend on shares them.
    shared = [0, 1, 3, 4, 5, 6]
    assert len({made[i].path for i in shared}) == 1
    assert len({samples.path for samples in made}) == len(settings) - len(shared) + 1
    ecgs = [samples[0]["ecg"] for samples in made]
    assert ecgs[3].shape == (12, 51)
    assert ecgs[8].shape == (3, 50)
    torch.testing.assert_close(ecgs[7], ecgs[0].flip(0))
    for other in (2, 4, 5):
        assert not torch.allclose(ecgs[other], ecgs[0])
    assert labels(made[1]) != labels(made[0])


@pytest.mark.parametrize("normalize", ["lead", "record", "dataset", "none"])
def test_another_task_or_split_reads_no_waveform_again(
    small_dataset, normalize, unread
):
    """And gives what reading them again would give, to the bit."""
    with pytest.MonkeyPatch.context() as allowed:
        allowed.setattr(ecg_record_processor, "read_digital", READ)
        small_dataset.set_task(ECGBinaryClassification("MI", **SHORT))
    task = ECGBinaryClassification("CD", 100, 40, normalize)
    parts = small_dataset.set_task(task, split=StratFoldSplit())
    assert [len(part) for part in parts] == [len(list(part)) for part in parts]
    table = small_dataset.records(task)
    label_of = dict(table.select("ecg_id", "label").iter_rows())
    for part in parts:
        assert part.ecg_ids == [sample["ecg_id"] for sample in part]
        assert part.patient_ids == [sample["patient_id"] for sample in part]
        assert part.labels == [label_of[ecg_id] for ecg_id in part.ecg_ids]
        assert part.labels == [sample["label"].item() for sample in part]
    with pytest.MonkeyPatch.context() as allowed:
        allowed.setattr(ecg_record_processor, "read_digital", READ)
        path_of = dict(table.select("ecg_id", "record_path").iter_rows())
        processor = ECGProcessor(100, 40, normalize)
        processor.fit(({"ecg": path_of[k]} for k in parts[0].ecg_ids), "ecg")
        if normalize == "dataset":
            assert parts[2].processor.mean == pytest.approx(processor.mean, rel=1e-6)
            assert parts[2].processor.std == pytest.approx(processor.std, rel=1e-6)
            processor = parts[2].processor
        for sample in parts[2]:
            expected = processor.process(path_of[sample["ecg_id"]])
            torch.testing.assert_close(sample["ecg"], expected, rtol=0, atol=0)


def test_samples_go_to_another_process(small_dataset):
    train, *_ = small_dataset.set_task(
        ECGBinaryClassification("MI", 100, 50, "dataset"), split=StratFoldSplit()
    )
    again = pickle.loads(pickle.dumps(train))
    assert again.ecg_ids == train.ecg_ids
    for i in (0, len(train) - 1):
        torch.testing.assert_close(again[i]["ecg"], train[i]["ecg"], rtol=0, atol=0)
    waveforms = 4 * train.record(0).numel() * len(train)
    assert len(pickle.dumps(train)) < waveforms / 10  # none of them goes along


def test_closing_samples_leaves_those_of_others(small_dataset):
    task = ECGBinaryClassification("MI", **SHORT)
    with small_dataset.set_task(task) as samples:
        ecg = samples[0]["ecg"]
    torch.testing.assert_close(small_dataset.set_task(task)[0]["ecg"], ecg)


def test_a_fitted_processor_can_be_given(small_dataset):
    fitted = ECGProcessor(100, 50, "dataset")
    fitted.mean, fitted.std = 0.25, 2.0
    task = ECGBinaryClassification("MI", normalize="dataset", **SHORT)
    samples = small_dataset.set_task(task, input_processors={"ecg": fitted})
    whole = samples.record(0)
    assert whole.shape == (12, 1000)
    torch.testing.assert_close(samples[0]["ecg"], fitted.finish(whole))
    wrong = {"ecg": ECGProcessor(50, 50, "lead")}
    with pytest.raises(ValueError, match="must be an ECGProcessor at 100 Hz"):
        small_dataset.set_task(task, input_processors=wrong)


def test_a_changed_recipe_never_shares_samples(small_dataset, monkeypatch):
    task = ECGBinaryClassification(**SHORT)
    old = small_dataset.set_task(task).path
    monkeypatch.setattr("pyhealth.tasks.ecg_task.RECIPE_VERSION", RECIPE_VERSION + 1)
    changed = ECGBinaryClassification(**SHORT)
    assert changed.recipe_version == RECIPE_VERSION + 1
    assert small_dataset.set_task(changed).path != old


def test_the_same_settings_are_prepared_once(
    small, small_dataset, cache_dir, monkeypatch
):
    samples = small_dataset.set_task(ECGBinaryClassification("MI", **SHORT))
    for name in ("_task_transform", "_proc_transform", "_event_transform"):
        monkeypatch.setattr(
            PTBXLDataset, name, lambda *args: pytest.fail("built again")
        )
    monkeypatch.setattr(
        ecg_record_processor, "read_digital", lambda path: pytest.fail("read again")
    )
    dataset = PTBXLDataset(small, sampling_rate=100, cache_dir=cache_dir)
    again = dataset.set_task(ECGBinaryClassification("MI", **SHORT))
    assert again.path == samples.path
    torch.testing.assert_close(again[0]["ecg"], samples[0]["ecg"], rtol=0, atol=0)


# Damage -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(small, tmp_path_factory):
    """A small corpus with three unusable records, opened; its root and their ids."""
    folder = tmp_path_factory.mktemp("damaged")
    root = shutil.copytree(small, folder / "data")
    dataset = opened(root, folder / "cache")
    records = dataset.records()
    paths = dict(records.select("ecg_id", "record_path").iter_rows())
    of = records.group_by("patient_id").agg("ecg_id").sort("patient_id")["ecg_id"]
    several = next(ids for ids in of.to_list() if len(ids) > 1)
    alone = [ids[0] for ids in of.to_list() if len(ids) == 1]
    train = [k for k in alone if records.filter(ecg_id=k)["strat_fold"][0] <= 8]
    bad = {several[0]: "cut", train[0]: "gone", train[1]: "header"}
    for ecg_id, damage in bad.items():
        data, header = (Path(paths[ecg_id] + suffix) for suffix in (".dat", ".hea"))
        if damage == "cut":
            data.write_bytes(data.read_bytes()[:1000])
        elif damage == "gone":
            data.unlink()
        else:
            header.write_text("not a header\n")
    return dataset, root, {k: (paths[k], bad[k]) for k in bad}


def test_raise_names_the_file_and_the_remedy(damaged):
    dataset, _, bad = damaged
    paths = [path for path, _ in bad.values()]
    for _ in range(2):  # a failed run leaves nothing that a second would take for whole
        with pytest.raises(RecordError) as error:
            dataset.set_task(ECGBinaryClassification("MI", **SHORT))
        assert error.value.path in paths
        assert str(error.value).startswith(f"{error.value.path}: ")
        assert "on_error='skip'" in str(error.value)


def test_raise_in_fitting_names_the_file_too(damaged):
    dataset, _, bad = damaged
    task = ECGBinaryClassification("MI", normalize="dataset", **SHORT)
    with pytest.raises(RecordError) as error:
        dataset.set_task(task)
    assert error.value.path in [path for path, _ in bad.values()]


def test_skip_leaves_out_keeps_the_ids_and_says_them(damaged, said):
    dataset, root, bad = damaged
    task = ECGBinaryClassification("MI", on_error="skip", **SHORT)
    lines, handler = listen(logging.getLogger("pyhealth.tasks.ecg_task"))
    samples = dataset.set_task(task)
    logging.getLogger("pyhealth.tasks.ecg_task").removeHandler(handler)
    skipped = sorted(bad)
    everything = dataset.records()["ecg_id"].to_list()
    assert sorted(labels(samples)) == sorted(set(everything) - set(skipped))
    assert dataset.skipped_records == skipped
    expected = f"3 records were skipped as unreadable; ecg_id {skipped}"
    assert said == [expected]
    # Each is told with its own reason.
    assert len(lines) == 3
    for path, damage in bad.values():
        (line,) = (line for line in lines if path in line)
        assert ("is missing" if damage == "gone" else "cannot be read") in line

    # The same from the cache, which reads nothing.
    again = PTBXLDataset(root, sampling_rate=100, cache_dir=dataset.cache_dir.parent)
    assert again.skipped_records == []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_task_transform", "_proc_transform", "_event_transform"):
            patch.setattr(PTBXLDataset, name, lambda *args: pytest.fail("built again"))
        cached = again.set_task(task)
    assert cached.path == samples.path
    assert again.skipped_records == skipped
    assert said == [expected, expected]


def test_skip_with_a_split_keeps_the_parts_apart(damaged, said):
    dataset, _, bad = damaged
    task = ECGBinaryClassification("NORM", on_error="skip", **SHORT)
    parts = dataset.set_task(task, split=StratFoldSplit())
    records = dataset.records()
    fold = dict(records.select("ecg_id", "strat_fold").iter_rows())
    found = [sorted(labels(part)) for part in parts]
    allowed = [range(1, 9), [9], [10]]
    assert found == [
        [k for k in fold if fold[k] in folds and k not in bad] for folds in allowed
    ]
    assert dataset.skipped_records == sorted(bad)
    assert len(said) == 1


def test_without_damage_nothing_is_skipped_or_said(small_dataset, said):
    small_dataset.set_task(ECGBinaryClassification("MI", on_error="skip", **SHORT))
    assert small_dataset.skipped_records == []
    assert said == []


def test_a_missing_record_can_be_caught_as_file_not_found(damaged):
    bad = damaged[2]
    (path,) = (path for path, damage in bad.values() if damage == "gone")
    with pytest.raises(FileNotFoundError, match=r"\.dat is missing") as error:
        ECGProcessor(**SHORT).process(path)
    assert isinstance(error.value, MissingRecordError)


@pytest.fixture
def breakable(small, tmp_path):
    """A copy of the small corpus that a test may damage, opened; and its records."""
    dataset = opened(shutil.copytree(small, tmp_path / "data"), tmp_path / "cache")
    return dataset, dataset.records()


SKIP = {**SHORT, "on_error": "skip"}


def test_a_part_that_skipping_has_emptied_is_an_error(breakable):
    dataset, records = breakable
    for path in records.filter(strat_fold=9)["record_path"]:
        Path(f"{path}.dat").unlink()
    lost = records.filter(strat_fold=9)["ecg_id"].sort().to_list()
    with pytest.raises(ValueError, match="Fetch the skipped records") as caught:
        dataset.set_task(ECGBinaryClassification(**SKIP), split=StratFoldSplit())
    assert str(lost) in str(caught.value)


@pytest.mark.parametrize("protocol", ["patient", "paper"])
def test_a_part_of_a_cohort_that_skipping_has_emptied_is_one_too(breakable, protocol):
    dataset, records = breakable
    rule = CohortSplit(9, protocol=protocol)
    _, val, _ = dataset.set_task(ECGBinaryClassification(**SHORT), split=rule)
    for path in records.filter(pl.col("ecg_id").is_in(val.ecg_ids))["record_path"]:
        Path(f"{path}.dat").unlink()
    with pytest.raises(ValueError, match=r"left in part 1 of the split"):
        dataset.set_task(ECGBinaryClassification(**SKIP), split=rule)


def test_a_skipped_record_counts_in_the_n_of_a_cohort(breakable):
    dataset, records = breakable
    whole = dataset.set_task(ECGBinaryClassification(**SHORT), split=CohortSplit(9))
    victim = whole[0][0]["ecg_id"]
    Path(records.filter(ecg_id=victim)["record_path"][0] + ".dat").unlink()
    parts = dataset.set_task(ECGBinaryClassification(**SKIP), split=CohortSplit(9))
    # Nobody moves in for it: the same cohort without one record.
    for part, before in zip(parts, whole, strict=True):
        assert sorted(labels(part)) == sorted(set(labels(before)) - {victim})
    assert dataset.skipped_records == [victim]


def test_a_mended_record_is_used_once_the_cache_is_deleted(breakable):
    dataset, records = breakable
    data = Path(records["record_path"][0] + ".dat")
    away = data.rename(data.with_suffix(".away"))
    dataset.set_task(ECGBinaryClassification(**SKIP))
    away.rename(data)
    samples = dataset.set_task(ECGBinaryClassification(**SKIP))
    assert len(samples) == len(records) - 1  # the cache does not see waveforms
    shutil.rmtree(dataset.cache_dir / "tasks")
    samples = dataset.set_task(ECGBinaryClassification(**SKIP))
    assert len(samples) == len(records)
    assert dataset.skipped_records == []


def test_a_mended_record_needs_nothing_where_errors_are_raised(breakable):
    dataset, records = breakable
    data = Path(records["record_path"][0] + ".dat")
    away = data.rename(data.with_suffix(".away"))
    with pytest.raises(RecordError):
        dataset.set_task(ECGBinaryClassification(**SHORT))
    away.rename(data)
    assert len(dataset.set_task(ECGBinaryClassification(**SHORT))) == len(records)


def test_skipped_records_are_those_of_the_last_run_even_if_it_failed(breakable):
    dataset, records = breakable
    Path(records["record_path"][0] + ".dat").unlink()
    dataset.set_task(ECGBinaryClassification(**SKIP))
    with pytest.raises(RecordError):
        dataset.set_task(ECGBinaryClassification(**SHORT))
    assert dataset.skipped_records == []


class OldPatients(BaseTask):
    """A task of a user's own, which leaves out records on purpose."""

    task_name = "OldPatients"
    input_schema = {"ecg": (ECGProcessor, SHORT)}  # noqa: RUF012
    output_schema = {"label": "binary"}  # noqa: RUF012

    def __call__(self, patient):
        return [
            {
                "patient_id": patient.patient_id,
                "ecg_id": event.ecg_id,
                "ecg": event.record_path,
                "label": event.norm,
            }
            for event in patient.get_events("ptbxl")
            if event.age is not None and event.age >= 60
        ]


def test_another_task_can_be_used(small_dataset):
    samples = small_dataset.set_task(OldPatients())
    ages = dict(small_dataset.records().select("ecg_id", "age").iter_rows())
    old = sorted(k for k, age in ages.items() if age is not None and age >= 60)
    assert 0 < len(old) < len(ages)
    assert sorted(sample["ecg_id"] for sample in samples) == old


def test_what_another_task_leaves_out_is_not_called_unreadable(small_dataset, said):
    small_dataset.set_task(OldPatients())
    assert said == []
    assert small_dataset.skipped_records == []


def test_a_cohort_for_a_task_without_labels_says_what_it_needs(small_dataset):
    with pytest.raises(ValueError, match="label"):
        small_dataset.set_task(OldPatients(), split=CohortSplit(5))
