"""WFDB records as they lie on the disk: digital samples and the header's fields."""

from __future__ import annotations

import errno
import os
from typing import TypedDict

import numpy as np
import wfdb
from fsspec.core import url_to_fs
from wfdb.io.header import parse_header_content, rx_record, rx_signal

__all__ = ["disagreeing_leads", "is_address", "is_simple", "read_digital"]

#: Format 16 of the WFDB signal format: 16 bits, the low byte first.
SAMPLE = np.dtype("<i2")
#: FLAC; of the other formats no sample takes less than a byte.
COMPRESSED = ("508", "516", "524")
#: Bytes or samples that are no burden, whatever a header says.
SMALL = 2**20
#: Fields of a header's first line that a plain record does not have.
UNUSUAL = ("counter_freq", "base_counter", "base_time", "base_date")


class _Fields(TypedDict):
    """The fields of a plain record's header, under wfdb's names."""

    record_name: str
    n_sig: int
    fs: float
    sig_len: int
    file_name: list[str]
    fmt: list[str]
    samps_per_frame: list[int]
    adc_gain: list[float]
    baseline: list[int]
    units: list[str]
    checksum: list[int]
    sig_name: list[str]


def is_address(path: str) -> bool:
    """Return whether a path is an fsspec address, such as of an object store.

    Args:
        path: of a file or folder.

    Examples:
        >>> is_address("s3://bucket/ptbxl"), is_address("/data/ptbxl")
        (True, False)
    """
    return "://" in path


def read_digital(path: str) -> wfdb.Record | wfdb.MultiRecord:
    """Read a record without turning its samples into physical units.

    What PTB-XL and most corpora of standard ECGs have, one file of 16-bit samples, is
    taken apart here with wfdb's own expressions: wfdb's parser looks each field up in a
    table of pandas, which takes longer than all the rest that becomes of a record
    (docs/scale.md). Everything else, and whatever is out of order, is read by wfdb.

    Args:
        path: of the record, without suffix; a path or an fsspec address.

    Returns:
        The record; of one segment, ``d_signal`` (samples, leads) holds whole numbers.
        Comments and what does not bear on the samples (adc_res, adc_zero, init_value,
        block_size, byte_offset) may be left out.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the header announces more than there is; wfdb would make room for
            all of it first.
        Exception: whatever wfdb raises where it cannot read it.

    Source:
        WFDB header and signal formats (header(5) and signal(5) of the WFDB
        Applications Guide).

    Examples:
        >>> read_digital("records100/00000/00001_lr").sig_name[:3]  # doctest: +SKIP
        ['I', 'II', 'III']
    """
    record = _read_plain(path)
    if record is None:
        return wfdb.rdrecord(path, physical=False, m2s=False)
    return record


def disagreeing_leads(record: wfdb.Record | wfdb.MultiRecord) -> list[str]:
    """Return the leads whose samples do not add up to the header's checksum.

    Args:
        record: a digital record. Of several segments, or with several samples a frame,
            none disagrees: what was joined has other sums.

    Source:
        WFDB header format, field "checksum": the sum of the samples in 16 bits. A
        checksum of 0 is what programs write that do not compute any.

    Examples:
        >>> disagreeing_leads(read_digital("00001_lr"))  # doctest: +SKIP
        []
    """
    if not is_simple(record):
        return []
    stored = record.checksum or []
    own = record.calc_checksum() if any(stored) else []
    return [
        name
        for name, found, said in zip(record.sig_name, own, stored, strict=False)
        if said and (found - said) % 65536
    ]


def is_simple(record: wfdb.Record | wfdb.MultiRecord) -> bool:
    """Return whether a record is one segment with one sample a frame.

    Args:
        record: a digital record.

    Examples:
        >>> is_simple(wfdb.MultiRecord())
        False
    """
    return isinstance(record, wfdb.Record) and set(record.samps_per_frame) == {1}


def _read_plain(path: str) -> wfdb.Record | None:
    """Return a record of one file of 16-bit samples; None if it is another kind."""
    header = _content(f"{path}.hea").decode("ascii", errors="ignore")
    lines, _ = parse_header_content(header)
    first = rx_record.match(lines[0]) if lines else None
    if first is None:
        return None
    of_record = first.groupdict()
    _check_count(of_record, len(lines) - 1)
    matches = [rx_signal.match(line) for line in lines[1:]]
    if of_record["n_seg"] or None in matches:
        return None
    signals = [match.groupdict() for match in matches]
    # os.path.split and join know both kinds of path: an address has "/" everywhere.
    folder = os.path.split(path)[0]
    _check_room(of_record, signals, folder)
    fields = _fields(of_record, signals)
    if fields is None:
        return None
    start = int(signals[0]["byte_offset"] or 0)
    content = _content(os.path.join(folder, fields["file_name"][0]))
    n_sig, sig_len = fields["n_sig"], fields["sig_len"]
    if len(content) != start + n_sig * sig_len * SAMPLE.itemsize:
        return None
    samples = np.frombuffer(content, SAMPLE, offset=start).reshape(sig_len, n_sig)
    return wfdb.Record(d_signal=samples.astype(np.int64), **fields)


def _check_count(of_record: dict[str, str], lines: int) -> None:
    """Raise if more is announced than described; wfdb would make room for it first."""
    said = int(of_record["n_seg"] or of_record["n_sig"])
    if said > lines:
        what = "segments" if of_record["n_seg"] else "leads"
        raise ValueError(f"the header announces {said} {what} and describes {lines}")


def _check_room(
    of_record: dict[str, str], signals: list[dict[str, str]], folder: str
) -> None:
    """Raise if more samples are announced than the files can hold, for that reason."""
    signals = signals[: int(of_record["n_sig"])]  # wfdb passes over further lines
    frames = int(of_record["sig_len"] or 1)
    said = frames * sum(int(s["samps_per_frame"] or 1) for s in signals)
    skew = max((int(s["skew"] or 0) for s in signals), default=0)
    if said * SAMPLE.itemsize <= SMALL and skew <= SMALL:
        return
    names = {s["file_name"] for s in signals if s["fmt"] not in COMPRESSED}
    sizes = [_size(os.path.join(folder, name)) for name in names - {"~"}]
    if names and (said > sum(sizes) or skew > frames):
        raise ValueError(
            f"the header announces {said} samples and a skew of {skew}, its files hold "
            f"{sum(sizes)} bytes"
        )


def _fields(of_record: dict[str, str], signals: list[dict[str, str]]) -> _Fields | None:
    """Return the header's fields in wfdb's types; None if it is no plain record's."""
    layouts = {(s["file_name"], s["fmt"], s["byte_offset"]) for s in signals}
    plain = (
        len(layouts) == 1
        and signals[0]["fmt"] == "16"
        and signals[0]["file_name"] != "~"
        and not any(of_record[name] for name in UNUSUAL)
        and of_record["n_sig"] == str(len(signals))
        and of_record["fs"]
        and int(of_record["sig_len"] or 0) > 0
        and all(s["samps_per_frame"] in ("", "1") and not s["skew"] for s in signals)
        and all(s[name] for s in signals for name in ("adc_gain", "baseline", "units"))
        and all(s["checksum"] and s["sig_name"] for s in signals)
        and all("-" not in s.values() for s in signals)  # a number without digits
    )
    if not plain:
        return None
    gains = [float(s["adc_gain"]) for s in signals]
    if not all(gains):  # a gain of 0 has a meaning of its own
        return None
    rate = float(of_record["fs"])
    return {
        "record_name": of_record["record_name"],
        "n_sig": len(signals),
        "fs": int(rate) if round(rate, 8).is_integer() else rate,
        "sig_len": int(of_record["sig_len"]),
        "file_name": [s["file_name"] for s in signals],
        "fmt": ["16"] * len(signals),
        "samps_per_frame": [1] * len(signals),
        "adc_gain": gains,
        "baseline": [int(s["baseline"]) for s in signals],
        "units": [s["units"] for s in signals],
        "checksum": [int(s["checksum"]) for s in signals],
        "sig_name": [s["sig_name"] for s in signals],
    }


def _size(path: str) -> int:
    if is_address(path):
        filesystem, name = url_to_fs(path)
        return filesystem.size(name)
    return os.path.getsize(path)


def _content(path: str) -> bytes:
    if is_address(path):
        filesystem, name = url_to_fs(path)
        try:
            return filesystem.cat_file(name)
        except FileNotFoundError as error:  # some stores' errors name no file
            message = os.strerror(errno.ENOENT)
            raise FileNotFoundError(errno.ENOENT, message, path) from error
    with open(path, "rb") as file:
        return file.read()
