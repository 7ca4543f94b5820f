"""What is read without wfdb's parser is what wfdb reads."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import wfdb
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from pyhealth.processors.wfdb_record import disagreeing_leads, read_digital

FIELDS = ("record_name", "n_sig", "fs", "sig_len", "file_name", "fmt", "adc_gain")
FIELDS += ("baseline", "units", "checksum", "sig_name", "samps_per_frame")
#: The folder is shared by the examples, which overwrite each other's files.
FEW = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
HEADER = """r 3 500 4
r.dat 16 1000.0(0)/mV 16 0 -119 1508 0 I
r.dat 16 200(-3)/uV 16 0 55 723 0 aVR
r.dat 16 4.88e+2(12)/mV 0 0 0 0 0 Lead of V1
# Age: 56
"""
SAMPLES = np.arange(-6, 6, dtype="<i2") * 2731
CONTENT = SAMPLES.tobytes()


def same(ours, theirs):
    for name in FIELDS:
        assert getattr(ours, name) == getattr(theirs, name), name
    np.testing.assert_array_equal(ours.d_signal, theirs.d_signal)
    physical = outcome(wfdb.Record.dac, theirs)
    if isinstance(physical, np.ndarray):
        np.testing.assert_array_equal(ours.dac(), physical)


def outcome(function, argument):
    try:
        return function(argument)
    except Exception as error:  # whichever: it is compared
        return error


def by_wfdb(path):
    return wfdb.rdrecord(str(path), physical=False, m2s=False)


def put(folder, header, content=CONTENT):
    (folder / "r.dat").write_bytes(content)
    (folder / "r.hea").write_bytes(header.encode())
    return str(folder / "r")


@pytest.fixture
def without_wfdb(monkeypatch):
    monkeypatch.setattr(wfdb, "rdrecord", lambda *args, **kwargs: pytest.fail("called"))


def test_a_plain_record_needs_no_parser_of_wfdb(tmp_path, without_wfdb):
    record = read_digital(put(tmp_path, HEADER))
    assert record.sig_name == ["I", "aVR", "Lead of V1"]
    assert record.adc_gain == [1000.0, 200.0, 488.0]
    assert record.baseline == [0, -3, 12]
    assert record.units == ["mV", "uV", "mV"]
    assert (record.fs, record.sig_len) == (500, 4)
    np.testing.assert_array_equal(record.d_signal, SAMPLES.reshape(4, 3))


PLAIN = {
    "as it is": HEADER,
    "a rate that is no whole number": HEADER.replace(" 500 ", " 499.5 "),
    "a rate that is one but for rounding": HEADER.replace(" 500 ", " 500.000000001 "),
    "no comment": HEADER.split("#")[0],
    "one sample a frame, said": HEADER.replace(".dat 16 ", ".dat 16x1 "),
    "Windows' ends of line": HEADER.replace("\n", "\r\n"),
}
OTHERS = {
    "date and time": HEADER.replace(" 500 4", " 500 4 12:00:01 01/02/2003"),
    "a number without digits": HEADER.replace("55 723", "- 723"),
    "no name": HEADER.replace(" Lead of V1", ""),
    "no checksum": "r 3 500 4\n" + "r.dat 16 1000(0)/mV\n" * 3,
    "no baseline": HEADER.replace("200(-3)/uV", "200/uV"),
    "no unit": HEADER.replace("/uV", ""),
    "a gain of nothing": HEADER.replace("200(-3)", "0(-3)"),
    "no sample": HEADER.replace("r 3 500 4", "r 3 500 0"),
    "no length": HEADER.replace("r 3 500 4", "r 3 500"),
    "no rate": HEADER.replace("r 3 500 4", "r 3"),
    "format 61": HEADER.replace(".dat 16 ", ".dat 61 "),
    "a skew": HEADER.replace(" 16 200", " 16:1 200"),
    "two samples a frame": HEADER.replace("t 16 ", "t 16x2 ").replace(" 4\n", " 2\n"),
    "fewer samples than there are": HEADER.replace(" 500 4", " 500 3"),
    "more samples than there are": HEADER.replace(" 500 4", " 500 5"),
    "fewer leads than there are": HEADER.replace("r 3", "r 2"),
    "no header": "",
    "only a comment": "# r 3 500 4",
}


@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_record_is_what_wfdb_reads(tmp_path, kind, request):
    path = put(tmp_path, PLAIN[kind])
    theirs = by_wfdb(path)
    request.getfixturevalue("without_wfdb")
    same(read_digital(path), theirs)


def compare(path):
    """Both are the same record, or neither is one."""
    theirs, ours = (outcome(read, path) for read in (by_wfdb, read_digital))
    if isinstance(theirs, Exception):
        announced = "the header announces" in str(ours)
        assert isinstance(ours, ValueError if announced else type(theirs)), (
            theirs,
            ours,
        )
    elif isinstance(theirs, wfdb.MultiRecord):
        assert isinstance(ours, wfdb.MultiRecord)
    else:
        same(ours, theirs)


@pytest.mark.parametrize("kind", OTHERS)
def test_another_record_is_left_to_wfdb(tmp_path, kind, monkeypatch):
    path = put(tmp_path, OTHERS[kind])
    compare(path)
    monkeypatch.setattr(wfdb, "rdrecord", lambda *args, **kwargs: "asked")
    assert outcome(read_digital, path) == "asked"


@pytest.mark.parametrize("offset", [24, 1])
def test_samples_after_a_head_as_in_the_mat_files_of_challenges(
    tmp_path, offset, request
):
    header = HEADER.replace(".dat 16 ", f".dat 16+{offset} ")
    path = put(tmp_path, header, b"\x07" * offset + CONTENT)
    theirs = by_wfdb(path)
    request.getfixturevalue("without_wfdb")
    same(read_digital(path), theirs)
    np.testing.assert_array_equal(theirs.d_signal, SAMPLES.reshape(4, 3))


def test_two_files_are_left_to_wfdb(tmp_path):
    header = HEADER.replace("r.dat 16 200", "s.dat 16 200")
    (tmp_path / "s.dat").write_bytes(SAMPLES[:4].tobytes())
    compare(put(tmp_path, header, SAMPLES[:8].tobytes()))


def test_segments_are_left_to_wfdb(tmp_path):
    put(tmp_path, HEADER)
    (tmp_path / "m.hea").write_text("m/2 3 500 8\nr 4\nr 4\n")
    record = read_digital(str(tmp_path / "m"))
    assert isinstance(record, wfdb.MultiRecord)
    assert disagreeing_leads(record) == []


@pytest.mark.parametrize("suffix", [".hea", ".dat"])
def test_a_missing_file_is_named(tmp_path, suffix):
    path = put(tmp_path, HEADER)
    Path(path + suffix).unlink()
    with pytest.raises(FileNotFoundError) as error:
        read_digital(path)
    assert error.value.filename == path + suffix


@pytest.mark.parametrize(
    ("first_line", "words"),
    [
        ("r 4444444442 500 4", "announces 4444444442 leads and describes 3"),
        ("r/4444444442 3 500 4", "announces 4444444442 segments and describes 3"),
        ("r 3 500 4444444442", "announces 13333333326 samples .* its files hold 24"),
    ],
)
def test_a_header_that_would_fill_the_memory_is_refused(tmp_path, first_line, words):
    path = put(tmp_path, HEADER.replace("r 3 500 4", first_line))
    with pytest.raises(ValueError, match=words):
        read_digital(path)


@pytest.mark.parametrize(
    ("format", "words"),
    [
        ("16:300000000", "a skew of 300000000, its files hold 24 bytes"),
        ("16x900000000", "announces 3600000008 samples and a skew of 0"),
    ],
)
def test_a_lead_that_would_fill_the_memory_is_refused(tmp_path, format, words):
    path = put(tmp_path, HEADER.replace(".dat 16 ", f".dat {format} ", 1))
    with pytest.raises(ValueError, match=words):
        read_digital(path)


TOKENS = "0 1 16 212 - -1 1.5 e 4 ~ / ( ) x2 +3 :2 mV r.dat s.dat # r é 500 1e3 ."
CHANGES = st.sampled_from([*TOKENS.split(), "", " ", "\n"])


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 3), CHANGES)))
@example([(4, 3, "1000000000")])
@FEW
def test_a_changed_header_means_to_both_the_same(shared_folder, changes):
    header = HEADER
    for place, width, token in changes:
        place %= len(header)
        header = header[:place] + token + header[place + width :]
    compare(put(shared_folder, header))


@pytest.mark.slow
@given(
    gains=st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=15),
    baseline=st.integers(-(2**15), 2**15),
    length=st.integers(1, 20),
    rate=st.floats(0.001, 5000).map(lambda rate: round(rate, 3)),
    data=st.data(),
)
@FEW
def test_what_wfdb_writes_is_what_it_reads(
    shared_folder, gains, baseline, length, rate, data
):
    assume("e" not in f"{rate}")  # no exponent is a rate in a header
    whole = st.integers(-(2**15), 2**15 - 1)
    size = length * len(gains)
    samples = data.draw(st.lists(whole, min_size=size, max_size=size))
    wfdb.wrsamp(
        "w",
        fs=rate,
        units=["mV"] * len(gains),
        sig_name=[f"lead {i}" for i in range(len(gains))],
        d_signal=np.array(samples).reshape(length, -1),
        fmt=["16"] * len(gains),
        adc_gain=gains,
        baseline=[baseline] * len(gains),
        write_dir=str(shared_folder),
    )
    compare(str(shared_folder / "w"))
    assert disagreeing_leads(read_digital(str(shared_folder / "w"))) == []


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("headers")


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["PTBXL_ROOT", "PTBXL100_ROOT"])
def test_published_records_are_what_wfdb_reads(variable, request):
    """All agree with their checksums, and one of eight with wfdb, which is slower."""
    if not os.environ.get(variable):
        pytest.skip(f"{variable} does not name a PTB-XL root")
    headers = sorted(Path(os.environ[variable]).rglob("*.hea"))
    paths = [str(header.with_suffix("")) for header in headers]
    theirs = {path: by_wfdb(path) for path in paths[::8]}
    request.getfixturevalue("without_wfdb")
    for path in paths:
        ours = read_digital(path)
        assert disagreeing_leads(ours) == []
        if path in theirs:
            same(ours, theirs[path])
