"""ECGProcessor on records written by WFDB's own writer, expected values by hand."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from records import write
from tblib import pickling_support

from pyhealth.processors import ecg_processor, ecg_record_processor
from pyhealth.processors.ecg_processor import ECGProcessor
from pyhealth.processors.ecg_record_processor import (
    STANDARD_LEADS,
    ECGRecordProcessor,
    MissingRecordError,
    RecordError,
)

MODES = ["lead", "record", "dataset", "none"]
THREE = ("I", "II", "V1")


def random_signal(leads=12, samples=1000, seed=0):
    """Whole microvolts, which format 16 with a gain of 1000 / mV holds exactly."""
    noise = np.random.default_rng(seed).normal(size=(leads, samples))
    return noise.round(3).clip(-30, 30)


def seconds(rate, duration=10):
    return np.arange(duration * rate) / rate


def fitted(mode, leads, length, rate=100):
    processor = ECGProcessor(rate, length, mode, leads)
    if mode == "dataset":
        processor.mean, processor.std = 0.5, 2.0
    return processor


@pytest.fixture
def said():
    """What the processor's logger says, from a state in which nothing was said."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    ecg_record_processor._say_missing.cache_clear()
    ecg_processor._say_length.cache_clear()
    loggers = (ecg_processor.logger, ecg_record_processor.logger)
    for logger in loggers:
        logger.addHandler(handler)
    yield lines
    for logger in loggers:
        logger.removeHandler(handler)


# Leads ------------------------------------------------------------------------------


def test_a_plain_record_comes_back_as_written(tmp_path):
    signal = random_signal()
    out = ECGProcessor(100, 1000, "none").process(write(tmp_path, signal))
    np.testing.assert_array_equal(out.numpy(), signal.astype(np.float32))


@pytest.mark.parametrize("spell", [str, str.lower, lambda name: f"a{name[1:]}"])
def test_leads_are_taken_by_name_whatever_their_order_and_case(tmp_path, spell):
    signal = random_signal()
    order = np.random.default_rng(1).permutation(12)
    assert (order != np.arange(12)).any()
    # "aVR" is how many recorders write AVR.
    names = [STANDARD_LEADS[i] for i in order]
    names = [spell(name) if name.startswith("A") else name for name in names]
    path = write(tmp_path, signal[order], leads=names)
    out = ECGProcessor(100, 1000, "none").process(path)
    np.testing.assert_array_equal(out.numpy(), signal.astype(np.float32))


def test_every_name_may_be_in_lower_case_on_both_sides(tmp_path):
    signal = random_signal(3)
    path = write(tmp_path, signal, leads=["v1", "i", "ii"])
    for asked in (THREE, [name.lower() for name in THREE]):
        out = ECGProcessor(100, 1000, "none", asked).process(path)
        np.testing.assert_array_equal(out.numpy(), signal[[1, 2, 0]].astype("f4"))


def test_further_leads_are_left_out(tmp_path):
    signal = random_signal(15)
    path = write(tmp_path, signal, leads=["X", "Y", "Z", *STANDARD_LEADS])
    out = ECGProcessor(100, 1000, "none").process(path)
    np.testing.assert_array_equal(out.numpy(), signal[3:].astype(np.float32))


def test_a_subset_of_leads_in_the_asked_order(tmp_path):
    signal = random_signal()
    processor = ECGProcessor(100, 1000, "none", leads=("V6", "I", "AVF"))
    out = processor.process(write(tmp_path, signal))
    np.testing.assert_array_equal(out.numpy(), signal[[11, 0, 5]].astype(np.float32))


def test_a_missing_lead_is_told_with_record_found_and_remedy(tmp_path):
    path = write(tmp_path, random_signal(3), leads=["II", "V1", "V9"])
    with pytest.raises(RecordError) as error:
        ECGProcessor(100, 1000, leads=["II", "V1", "V2", "AVR"]).process(path)
    assert str(error.value) == (
        f"{path}: lead V2, AVR is missing, found II, V1, V9. "
        "Pass leads=... with those you have."
    )
    assert error.value.path == path


# Units ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "factor"), [("mV", 1.0), ("uV", 1e3), ("V", 1e-3), ("UV", 1e3)]
)
def test_units_become_millivolt(tmp_path, unit, factor):
    signal = random_signal(3, 50)
    gain = 1000.0 / factor
    path = write(tmp_path, signal * factor, unit=unit, gain=gain, leads=THREE)
    assert f"/{unit}" in Path(f"{path}.hea").read_text()
    out = ECGProcessor(100, 50, "none", THREE).process(path)
    np.testing.assert_allclose(out.numpy(), signal, rtol=1e-6, atol=1e-9)


def test_each_lead_has_its_own_unit(tmp_path):
    path = write(tmp_path, random_signal(3, 50), leads=THREE)
    header = Path(f"{path}.hea")
    lines = header.read_text().splitlines()
    lines[2] = lines[2].replace("/mV", "/uV")
    header.write_text("\n".join(lines) + "\n")
    out = ECGProcessor(100, 50, "none", THREE).process(path).numpy()
    expected = random_signal(3, 50) * [[1.0], [1e-3], [1.0]]
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-9)


def test_an_unknown_unit_is_refused(tmp_path):
    path = write(tmp_path, random_signal(3, 50), unit="mmHg", leads=THREE)
    with pytest.raises(RecordError) as error:
        ECGProcessor(100, 50, leads=THREE).process(path)
    assert str(error.value) == (
        f"{path}: unit 'mmHg', expected mV, uV or V. Mend the header's gain field."
    )


def test_the_unit_of_a_lead_that_is_not_asked_for_does_not_matter(tmp_path):
    path = write(tmp_path, random_signal(3, 50), leads=["I", "II", "ABP"])
    header = Path(f"{path}.hea")
    lines = header.read_text().splitlines()
    lines[3] = lines[3].replace("/mV", "/mmHg")
    header.write_text("\n".join(lines) + "\n")
    assert ECGProcessor(100, 50, leads=["II", "I"]).process(path).shape == (2, 50)


# Resampling -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "target", "length"),
    [
        (500, 250, 2500),
        (500, 100, 1000),
        (100, 250, 2500),
        (360, 250, 2500),
        (257, 250, 2500),
        (250, 250, 2500),
    ],
)
def test_ten_seconds_stay_ten_seconds(tmp_path, said, rate, target, length):
    path = write(tmp_path, random_signal(3, 10 * rate), rate, THREE)
    processor = ECGProcessor(target, length, leads=THREE)
    assert processor.read(path).shape == (3, length)
    assert processor.process(path).shape == (3, length)
    assert said == []  # neither cropped nor padded


@pytest.mark.parametrize(
    ("rate", "target"), [(500, 250), (500, 100), (100, 250), (360, 250)]
)
def test_a_slow_sine_keeps_its_amplitude_and_its_place(tmp_path, rate, target):
    frequencies = np.array([[1.0], [10.0], [25.0]])
    wave = np.sin(2 * np.pi * frequencies * seconds(rate))
    path = write(tmp_path, wave, rate, THREE, gain=10000.0)
    out = ECGProcessor(target, 10 * target, "none", THREE).process(path).numpy()
    expected = np.sin(2 * np.pi * frequencies * seconds(target))
    inside = slice(target // 2, -target // 2)  # half a second from both ends
    np.testing.assert_allclose(out[:, inside], expected[:, inside], atol=0.01)


@pytest.mark.parametrize(
    ("rate", "target", "frequency"),
    [
        (500, 250, 200.0),  # Nyquist 125 Hz: would come back as 50 Hz
        (500, 250, 160.0),
        (500, 100, 70.0),  # Nyquist 50 Hz: would come back as 30 Hz
        (360, 250, 150.0),
    ],
)
def test_what_lies_above_the_new_nyquist_frequency_vanishes(
    tmp_path, rate, target, frequency
):
    wave = np.sin(2 * np.pi * frequency * seconds(rate))[None]
    path = write(tmp_path, wave, rate, ["I"], gain=10000.0)
    processor = ECGProcessor(target, 10 * target, "none", ["I"])
    out = processor.process(path).numpy()[0, target // 2 : -target // 2]
    assert np.abs(out).max() < 0.01


def test_offset_and_trend_make_no_ringing_at_the_edges(tmp_path):
    offset = 3.0 + 0.0 * seconds(500)
    offset[2500] += 0.001  # else the lead is constant
    ramp = 1.0 + 0.1 * seconds(500)
    path = write(tmp_path, [offset, ramp], 500, gain=10000.0)
    processor = ECGProcessor(250, 2500, "none", ("I", "II"))
    flat, rising = processor.process(path).numpy()
    np.testing.assert_allclose(flat, 3.0, atol=0.002)
    np.testing.assert_allclose(rising, 1.0 + 0.1 * seconds(250), atol=0.002)


# Normalisation ----------------------------------------------------------------------

SMALL = np.array([[1.0, 2.0, 3.0, 6.0], [-4.0, 4.0, -4.0, 4.0], [0.0, 0.0, 0.0, 10.0]])


def test_lead_takes_mean_and_deviation_of_each_lead(tmp_path):
    path = write(tmp_path, SMALL, leads=THREE)
    out = ECGProcessor(100, 4, "lead", THREE).process(path).numpy()
    # Means 3, 0, 2.5; variances 14/4, 16, 75/4.
    root = np.sqrt([[3.5], [16.0], [18.75]])
    expected = (SMALL - [[3.0], [0.0], [2.5]]) / root
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_record_takes_one_mean_and_deviation(tmp_path):
    path = write(tmp_path, SMALL, leads=THREE)
    out = ECGProcessor(100, 4, "record", THREE).process(path).numpy()
    # Sum 22 and sum of squares 214 over 12 samples.
    mean, std = 22 / 12, np.sqrt(214 / 12 - (22 / 12) ** 2)
    np.testing.assert_allclose(out, (SMALL - mean) / std, rtol=1e-6)


def test_none_is_millivolt(tmp_path):
    path = write(tmp_path, SMALL, leads=THREE)
    out = ECGProcessor(100, 4, "none", THREE).process(path)
    np.testing.assert_array_equal(out.numpy(), SMALL.astype(np.float32))


def test_dataset_fits_one_mean_and_deviation_of_the_training_part(tmp_path):
    other = np.full((3, 4), 1.0) + SMALL * 2
    paths = [
        write(tmp_path, SMALL, leads=THREE, name="a"),
        write(tmp_path, other, leads=THREE, name="b"),
    ]
    processor = ECGProcessor(100, 4, "dataset", THREE)
    assert processor.learns_statistics
    processor.fit(({"ecg": path} for path in paths), "ecg")
    # Sums 22 and 2 * 22 + 12; squares 214 and 4 * 214 + 4 * 22 + 12; 24 samples.
    mean = (22 + 56) / 24
    std = np.sqrt((214 + 956) / 24 - mean**2)
    assert processor.mean == pytest.approx(mean, rel=1e-12)
    assert processor.std == pytest.approx(std, rel=1e-12)
    out = processor.process(paths[0]).numpy()
    np.testing.assert_allclose(out, (SMALL - mean) / std, rtol=1e-6)


def test_dataset_is_fitted_over_the_whole_recording_at_the_tensors_rate(tmp_path):
    path = write(tmp_path, random_signal(3, 5000), 500, THREE)
    processor = ECGProcessor(100, 10, "dataset", THREE)
    processor.fit([{"ecg": path}], "ecg")
    signal = processor.read(path)
    assert signal.shape == (3, 1000)
    assert processor.mean == pytest.approx(signal.mean(), rel=1e-9)
    assert processor.std == pytest.approx(signal.std(), rel=1e-9)


def test_normalisation_sees_the_whole_recording_not_the_crop(tmp_path):
    path = write(tmp_path, SMALL, leads=THREE)
    whole = ECGProcessor(100, 4, "lead", THREE).process(path)
    cropped = ECGProcessor(100, 2, "lead", THREE).process(path)
    torch.testing.assert_close(cropped, whole[:, 1:3], rtol=0, atol=0)


def test_dataset_unfitted_is_an_error_that_says_what_to_do(tmp_path):
    path = write(tmp_path, SMALL, leads=THREE)
    with pytest.raises(ValueError, match=r"not fitted yet: call fit .* set_task\("):
        ECGProcessor(100, 4, "dataset", THREE).process(path)


def test_dataset_refuses_a_training_part_without_signal(tmp_path):
    flat = write(tmp_path, np.zeros((3, 8)), leads=THREE)
    processor = ECGProcessor(100, 8, "dataset", THREE)
    for samples in ([], [{"ecg": flat}]):
        with pytest.raises(ValueError, match="no signal that varies"):
            processor.fit(samples, "ecg")
    assert processor.mean is None
    assert processor.std is None


@pytest.mark.parametrize("mode", ["lead", "record", "none"])
def test_fit_reads_nothing_where_nothing_is_fitted(mode):
    def samples():
        pytest.fail("the samples were read")
        yield

    processor = ECGProcessor(100, 10, mode)
    assert not processor.learns_statistics
    before = copy.deepcopy(vars(processor))
    processor.fit([{"ecg": "/nowhere/at/all"}], "ecg")
    processor.fit(samples(), "ecg")
    assert vars(processor) == before


@pytest.mark.parametrize(("rate", "level"), [(100, 1.7), (500, 0.1), (500, 0.0)])
def test_a_constant_lead_becomes_zeros_in_every_mode(tmp_path, rate, level):
    signal = random_signal(3, 10 * rate)
    signal[1] = level
    path = write(tmp_path, signal, rate, THREE)
    for mode in MODES:
        processor = fitted(mode, THREE, 1000)
        out = processor.process(path)
        assert (out[1] == 0).all(), mode
        assert (out[[0, 2]].std(dim=1) > 0.1).all(), mode
        processor = ECGRecordProcessor(100, THREE)
        constant = np.ptp(processor.process(path).numpy(), axis=1) == 0
        assert constant.tolist() == [False, True, False]


def test_a_record_of_constant_leads_becomes_zeros_in_every_mode(tmp_path):
    path = write(tmp_path, np.full((3, 100), 0.1) * [[1], [2], [3]], leads=THREE)
    for mode in MODES:
        assert (fitted(mode, THREE, 100).process(path) == 0).all(), mode


# Missing samples --------------------------------------------------------------------

NAN = float("nan")


def test_gaps_are_filled_linearly_and_that_is_said_once(tmp_path, said):
    gappy = [
        [NAN, NAN, 3.0, NAN, NAN, NAN, -1.0, NAN],
        [1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0],
        [0.0, NAN, 2.0, 5.0, NAN, 1.0, NAN, 0.0],
    ]
    path = write(tmp_path, gappy, leads=THREE)
    processor = ECGProcessor(100, 8, "none", THREE)
    out = processor.process(path)
    expected = [
        [3.0, 3.0, 3.0, 2.0, 1.0, 0.0, -1.0, -1.0],
        [1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0],
        [0.0, 1.0, 2.0, 5.0, 3.0, 1.0, 0.5, 0.0],
    ]
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-6)
    assert len(said) == 1
    assert "missing samples; they are filled linearly" in said[0]
    processor.process(path)
    assert len(said) == 1


def test_a_whole_record_says_nothing(tmp_path, said):
    path = write(tmp_path, random_signal(3, 50), leads=THREE)
    ECGProcessor(100, 50, leads=THREE).process(path)
    assert said == []


def test_a_lead_without_a_sample_becomes_zeros_in_every_mode(tmp_path):
    signal = random_signal(3, 100)
    signal[0] = NAN
    path = write(tmp_path, signal, leads=THREE)
    for mode in MODES:
        out = fitted(mode, THREE, 100).process(path)
        assert (out[0] == 0).all(), mode
        assert torch.isfinite(out).all(), mode
        assert (out[1:].std(dim=1) > 0.1).all(), mode


def test_a_record_without_a_sample_is_an_error_in_every_mode(tmp_path):
    path = write(tmp_path, np.full((3, 100), NAN), leads=THREE)
    for mode in MODES:
        with pytest.raises(RecordError) as error:
            fitted(mode, THREE, 100).process(path)
        assert str(error.value) == (
            f"{path}: holds no valid sample. Fetch the record again."
        )


def test_gaps_before_resampling_leave_everything_finite(tmp_path):
    signal = random_signal(3, 5000)
    signal[0, 100:900] = NAN
    signal[2, -10:] = NAN
    path = write(tmp_path, signal, 500, THREE)
    assert torch.isfinite(ECGProcessor(100, 1000, leads=THREE).process(path)).all()


# Length -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "length", "expected"),
    [
        (8, 8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (8, 6, [2, 3, 4, 5, 6, 7]),
        (8, 5, [2, 3, 4, 5, 6]),
        (8, 1, [4]),
        (4, 8, [0, 0, 1, 2, 3, 4, 0, 0]),
        (4, 7, [0, 1, 2, 3, 4, 0, 0]),
        (4, 5, [1, 2, 3, 4, 0]),
    ],
)
def test_the_crop_and_the_padding_are_centred(tmp_path, samples, length, expected):
    path = write(tmp_path, [np.arange(1, samples + 1)], leads=["I"])
    out = ECGProcessor(100, length, "none", ["I"]).process(path)
    assert out[0].tolist() == expected


def test_padding_is_zero_in_every_mode(tmp_path):
    path = write(tmp_path, random_signal(3, 50) + 5, leads=THREE)
    for mode in MODES:
        out = fitted(mode, THREE, 60).process(path)
        assert (out[:, :5] == 0).all(), mode
        assert (out[:, -5:] == 0).all(), mode
        assert (out[:, 5:-5] != 0).float().mean() > 0.9, mode


@pytest.mark.parametrize(
    ("length", "words"),
    [
        (1000, None),
        (900, "Records of 10 s (1000 samples at 100 Hz) are cropped from the centre"),
        (1024, "Records of 10 s (1000 samples at 100 Hz) are padded with zeros"),
    ],
)
def test_another_length_is_said_once(tmp_path, said, length, words):
    processor = ECGProcessor(100, length, leads=THREE)
    for name in "ab":
        processor.process(write(tmp_path, random_signal(3), leads=THREE, name=name))
    if words is None:
        assert said == []
    else:
        assert len(said) == 1
        assert said[0].startswith(words)
        assert f"by {abs(1000 - length)} samples to {length}. (Said once.)" in said[0]


# Damaged records --------------------------------------------------------------------


def truncate(path, size):
    data = Path(f"{path}.dat").read_bytes()
    Path(f"{path}.dat").write_bytes(data[:size])


def header(path, text):
    Path(f"{path}.hea").write_text(text)


DAMAGE = {
    "half a .dat": lambda path: truncate(path, 12_000),
    ".dat one frame short": lambda path: truncate(path, 24_000 - 24),
    ".dat one byte short": lambda path: truncate(path, 24_000 - 1),
    "one frame in the .dat": lambda path: truncate(path, 24),
    "empty .dat": lambda path: truncate(path, 0),
    "empty header": lambda path: header(path, ""),
    "garbage header": lambda path: header(path, "<html>404 Not Found</html>\n" * 9),
    "binary header": lambda path: header(path, "\x00\x01\x7f" * 99),
    "short header": lambda path: header(path, "r 12 100 1000\nr.dat 16 1000/mV\n"),
    "no samples": lambda path: header(
        path, Path(f"{path}.hea").read_text().replace("r 12 100 1000", "r 12 100 0")
    ),
    "unknown format": lambda path: header(
        path, Path(f"{path}.hea").read_text().replace(".dat 16 ", ".dat 99 ")
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_is_named_with_a_remedy(tmp_path, damage):
    path = write(tmp_path, random_signal())
    processor = ECGProcessor(100, 1000)
    processor.process(path)  # whole
    DAMAGE[damage](path)
    for call in (processor.process, processor.read):
        with pytest.raises(RecordError) as error:
            call(path)
        assert not isinstance(error.value, FileNotFoundError)
        assert error.value.path == path
        assert str(error.value).startswith(f"{path}: ")
        assert "Fetch .hea and .dat again, or pass on_error" in str(error.value)
        assert error.value.__cause__ is not None  # what wfdb said


@pytest.mark.parametrize("suffix", [".dat", ".hea"])
def test_a_missing_file_is_named_and_is_a_file_not_found_error(tmp_path, suffix):
    path = write(tmp_path, random_signal())
    Path(path + suffix).unlink()
    with pytest.raises(FileNotFoundError) as error:
        ECGProcessor(100, 1000).process(path)
    assert isinstance(error.value, MissingRecordError)
    assert isinstance(error.value, RecordError)
    assert isinstance(error.value, ValueError)
    assert error.value.path == path
    assert str(error.value) == (
        f"{path}: the file r{suffix} is missing. Fetch .hea and .dat again, or pass "
        "on_error='skip' to the task."
    )


def test_a_missing_folder_is_a_missing_record(tmp_path):
    with pytest.raises(MissingRecordError, match=r"00001_lr\.hea is missing"):
        ECGProcessor(100, 1000).process(tmp_path / "records100" / "00001_lr")


@pytest.mark.parametrize(
    ("old", "new"), [("r 12 100 1000", "r 12 0 1000"), (" 0 AVF", "")]
)
def test_a_header_without_rate_or_lead_name_is_a_record_error(tmp_path, old, new):
    path = write(tmp_path, random_signal())
    text = Path(f"{path}.hea").read_text()
    assert old in text
    header(path, text.replace(old, new))
    with pytest.raises(RecordError):
        ECGProcessor(100, 1000).process(path)


@pytest.mark.parametrize("kind", [RecordError, MissingRecordError])
def test_errors_come_back_whole_from_another_process(kind):
    error = kind("folder/00001_lr", "holds no samples.")
    # A Dask cluster, which PyHealth starts, changes how exceptions are pickled.
    pickling_support.install(kind)
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert back.path == "folder/00001_lr"
    assert str(back) == "folder/00001_lr: holds no samples."


# The object -------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [100, 500])
@pytest.mark.parametrize("gaps", [False, True])
def test_the_tensor_is_float32_contiguous_and_leads_by_length(tmp_path, rate, gaps):
    signal = random_signal(3, 10 * rate)
    if gaps:
        signal[1, 5:9] = NAN
    path = write(tmp_path, signal, rate, THREE)
    for mode in MODES:
        for length in (900, 1000, 1100):
            out = fitted(mode, THREE, length).process(path)
            assert isinstance(out, torch.Tensor)
            assert out.dtype == torch.float32
            assert out.shape == (3, length)
            assert out.is_contiguous()
            assert not out.requires_grad
    assert ECGProcessor.stores_tensor


@pytest.mark.parametrize("mode", MODES)
def test_process_and_read_change_nothing(tmp_path, mode):
    signal = random_signal(3)
    signal[0, 10:20] = NAN
    path = write(tmp_path, signal, leads=THREE)
    processor = fitted(mode, THREE, 900)
    before = copy.deepcopy(vars(processor))
    files = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    read = processor.read(path)
    first = processor.process(path)
    assert vars(processor) == before
    assert read.dtype == np.float64
    kept = first.clone(), read.copy()
    first.zero_()
    read[:] = 0.0
    torch.testing.assert_close(processor.process(path), kept[0], rtol=0, atol=0)
    np.testing.assert_array_equal(processor.read(path), kept[1])
    assert vars(processor) == before
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == files


def test_a_path_object_is_as_good_as_text(tmp_path):
    path = write(tmp_path, random_signal(3), leads=THREE)
    processor = ECGProcessor(100, 1000, leads=THREE)
    torch.testing.assert_close(
        processor.process(Path(path)), processor.process(path), rtol=0, atol=0
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_pickled_processor_is_the_same(tmp_path, mode):
    path = write(tmp_path, random_signal(3), leads=THREE)
    processor = fitted(mode, THREE, 1000)
    back = pickle.loads(pickle.dumps(processor))
    assert vars(back) == vars(processor)
    torch.testing.assert_close(
        back.process(path), processor.process(path), rtol=0, atol=0
    )


def test_repr_is_what_makes_it_again():
    processor = ECGProcessor(100, 1000, "record", ("I", "V6"))
    assert repr(processor) == (
        "ECGProcessor(sampling_rate=100, length=1000, normalize='record', "
        "leads=['I', 'V6'])"
    )
    assert processor.leads == ("I", "V6")
    assert vars(eval(repr(processor))) == vars(processor)


def test_it_describes_its_output_to_pyhealth():
    processor = ECGProcessor()
    assert processor.schema() == ("value",)
    assert processor.dim() == (2,)
    assert len(processor.spatial()) == processor.dim()[0]
    assert processor.spatial() == (False, True)
    assert processor.is_token() is False
    assert (processor.sampling_rate, processor.length) == (250, 2500)
    assert processor.normalize == "lead"
    assert " ".join(processor.leads) == "I II III AVR AVL AVF V1 V2 V3 V4 V5 V6"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"sampling_rate": 0}, "sampling_rate must be positive, got 0"),
        ({"sampling_rate": -100}, "sampling_rate must be positive, got -100"),
        ({"sampling_rate": float("nan")}, "sampling_rate must be positive, got nan"),
        ({"length": 0}, "length must be 1 or more, got 0"),
        ({"length": -5}, "length must be 1 or more, got -5"),
        ({"normalize": "zscore"}, r"\['lead', 'record', 'dataset', 'none'\].*'zscore'"),
        ({"normalize": None}, "normalize must be one of .* got None"),
        ({"leads": []}, r"leads must be different names, got \[\]"),
        ({"leads": ["I", "i"]}, r"leads must be different names, got \['I', 'i'\]"),
        ({"leads": "II"}, "leads must be different names"),
    ],
)
def test_a_wrong_argument_is_named(argument, message):
    with pytest.raises(ValueError, match=message):
        ECGProcessor(**argument)


@pytest.mark.parametrize("argument", [{"sampling_rate": float("inf")}, {"length": 2.5}])
def test_an_argument_that_cannot_work_is_refused_at_once(argument):
    with pytest.raises((TypeError, ValueError)):
        ECGProcessor(**argument)


def test_a_length_that_is_a_whole_float_is_taken_as_one(tmp_path):
    path = write(tmp_path, random_signal())
    assert ECGProcessor(100, 900.0).process(path).shape == (12, 900)


def test_a_lead_that_is_there_twice_is_an_error(tmp_path):
    path = write(tmp_path, random_signal())
    header = Path(f"{path}.hea")
    header.write_text(header.read_text().replace(" V2\n", " V1\n"))
    with pytest.raises(RecordError, match="lead V1 is there twice"):
        ECGProcessor(100, 1000, leads=["V1"]).process(path)
    assert ECGProcessor(100, 1000, leads=["I"]).process(path).shape == (1, 1000)
