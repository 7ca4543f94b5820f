"""Whatever a file holds: a result or an error of ours, never a foreign one."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from fuzz.targets import FUZZ, header, scp_codes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records import write

from pyhealth.datasets.ptbxl_download import read_sums
from pyhealth.datasets.ptbxl_statements import parse_scp_codes, statement_names
from pyhealth.datasets.ptbxl_table import check_table
from pyhealth.processors.ecg_record_processor import ECGRecordProcessor, RecordError

#: The folder is shared by the examples, which overwrite each other's file.
FEW = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
LIKELIHOODS = st.floats(0, 100)
PLAIN_HEADER = (FUZZ / "corpus" / "header" / "plain").read_bytes()


@given(st.dictionaries(st.text(), LIKELIHOODS))
@FEW
def test_codes_come_back_as_they_were_written(codes):
    assert parse_scp_codes(repr(codes)) == codes


LITERALS = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.text() | LITERALS.map(repr) | st.text("{}[]()'\":,0123456789-+*eE"))
@FEW
def test_any_text_is_codes_or_a_value_error(text):
    scp_codes(text.encode())


NAMES = st.text(
    st.characters(
        codec="ascii", exclude_characters="\\\n\r", categories=("L", "N", "P")
    ),
    min_size=1,
).filter(lambda name: ".." not in name and name[0] not in "/*")
HASHES = st.text("0123456789abcdef", min_size=64, max_size=64)


@given(st.dictionaries(NAMES, HASHES, min_size=1))
@FEW
def test_hashes_come_back_as_they_were_written(tmp_path, sums):
    path = tmp_path / "SHA256SUMS.txt"
    path.write_text("".join(f"{digest} {name}\n" for name, digest in sums.items()))
    assert read_sums(path) == sums


@given(
    st.binary()
    | st.lists(st.tuples(HASHES, st.text())).map(
        lambda lines: "\n".join(f"{digest} {name}" for digest, name in lines).encode()
    )
)
@FEW
def test_any_bytes_are_hashes_or_a_value_error(tmp_path, content):
    path = tmp_path / "SHA256SUMS.txt"
    path.write_bytes(content)
    try:
        sums = read_sums(path)
    except ValueError as error:
        assert str(error).startswith(str(path))
        return
    inside = [(tmp_path / name).resolve() for name in sums]
    assert all(target.is_relative_to(tmp_path.resolve()) for target in inside)


COLUMNS = ["ecg_id", "patient_id", "strat_fold", "filename_lr"]
CELLS = st.text(max_size=12) | st.integers(-3, 12).map(str)


@given(st.lists(st.lists(CELLS, min_size=4, max_size=4), max_size=6), st.booleans())
@FEW
def test_any_table_is_right_or_a_value_error(tmp_path, rows, has_header):
    text = io.StringIO()
    csv.writer(text).writerows([COLUMNS, *rows] if has_header else rows)
    path = tmp_path / "ptbxl_database.csv"
    path.write_bytes(text.getvalue().encode("utf-8", "surrogatepass"))
    try:
        check_table(path, "filename_lr")
    except ValueError as error:
        assert str(error).startswith(str(path))
        return
    assert has_header
    assert all(row[2].strip() in map(str, range(1, 11)) for row in rows if any(row))


@given(st.binary(max_size=300))
@FEW
def test_any_bytes_are_a_table_or_a_value_error(tmp_path, content):
    for name, read in (
        ("ptbxl_database.csv", lambda path: check_table(path, "filename_lr")),
        ("scp_statements.csv", statement_names),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A record of half a second, as (path, data's bytes)."""
    signal = np.random.default_rng(0).normal(size=(2, 50)).round(3)
    path = Path(write(tmp_path_factory.mktemp("record"), signal))
    return path, path.with_suffix(".dat").read_bytes()


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@FEW
def test_any_header_is_a_record_or_a_record_error(content):
    header(content)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=3)), max_size=4))
@FEW
def test_a_changed_header_is_a_record_or_a_record_error(changes):
    changed = bytearray(PLAIN_HEADER)
    for place, content in changes:
        place %= len(changed)
        changed[place : place + 1] = content
    header(bytes(changed))


@given(st.integers(0, 199), st.integers(1, 255))
@FEW
def test_a_changed_sample_is_always_found(whole, place, change):
    path, data = whole
    changed = bytearray(data)
    changed[place] ^= change
    path.with_suffix(".dat").write_bytes(bytes(changed))
    with pytest.raises(RecordError, match="disagree with the header's checksum"):
        ECGRecordProcessor(100, ["I", "II"]).process(path)
