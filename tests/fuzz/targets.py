"""What is fuzzed: any bytes give a result, or an error of this package.

    python tests/fuzz/targets.py header -max_total_time=60 tests/fuzz/corpus/header
    python tests/fuzz/targets.py scp_codes -runs=100000 tests/fuzz/corpus/scp_codes

lets atheris (libFuzzer) look for bytes that reach new code; those that do are added to
the folder. tests/test_fuzz.py goes through what was found.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")

import numpy as np

FUZZ = Path(__file__).parent
#: MiB that an input may take beside what is taken before the first.
ROOM = 1024
#: 24 samples of two leads.
SAMPLES = np.arange(-24, 24, dtype="<i2").tobytes()


@functools.cache
def folder() -> Path:
    """Return a folder of this process with the samples that every header is for."""
    path = Path(tempfile.mkdtemp(prefix="fuzz"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    for name in ("r.dat", "s.dat"):
        (path / name).write_bytes(SAMPLES)
    return path


def header(content: bytes) -> None:
    """Read a record with this header; it is what wfdb reads, or both refuse it."""
    import wfdb

    from pyhealth.processors.ecg_record_processor import ECGRecordProcessor, RecordError
    from pyhealth.processors.wfdb_record import read_digital

    path = folder() / "r"
    path.with_suffix(".hea").write_bytes(content)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            signal = ECGRecordProcessor(100, ["I", "II"]).process(path)
        except RecordError as error:
            assert str(error).startswith(str(path))
        else:
            assert signal.shape[0] == 2
            assert signal.isfinite().all()
        ours = attempt(read_digital, str(path))
        if isinstance(ours, ValueError) and "the header announces" in str(ours):
            return  # before wfdb makes room for it
        theirs = attempt(by_wfdb, str(path))
    assert isinstance(ours, Exception) == isinstance(theirs, Exception), (ours, theirs)
    if isinstance(ours, wfdb.Record):
        assert np.array_equal(ours.d_signal, theirs.d_signal)
        for name in ("fs", "sig_name", "units", "adc_gain", "baseline", "checksum"):
            assert getattr(ours, name) == getattr(theirs, name), name


def by_wfdb(path: str) -> object:
    import wfdb

    return wfdb.rdrecord(path, physical=False, m2s=False)


def attempt(read: Callable, path: str) -> object:
    try:
        return read(path)
    except Exception as error:  # whichever: it is compared
        return error


def scp_codes(content: bytes) -> None:
    """Parse this text; codes with likelihoods, or a ValueError."""
    from pyhealth.datasets.ptbxl_statements import parse_scp_codes

    text = content.decode("utf-8", errors="surrogateescape")
    try:
        codes = parse_scp_codes(text)
    except ValueError as error:
        assert "scp_codes must be a dict" in str(error)
        return
    assert all(isinstance(code, str) for code in codes)
    assert all(0 <= likelihood <= 100 for likelihood in codes.values())


TARGETS = {"header": header, "scp_codes": scp_codes}


def main() -> None:
    """Fuzz one target."""
    import resource

    import atheris

    name, *rest = sys.argv[1:]
    with atheris.instrument_imports(include=["pyhealth.processors", "wfdb.io"]):
        import pyhealth.processors.ecg_record_processor
    with atheris.instrument_imports(include=["pyhealth.datasets.ptbxl_statements"]):
        import pyhealth.datasets.ptbxl_statements  # noqa: F401
    # libFuzzer looks at the peak, which on Linux begins with that of the parent.
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10 + ROOM
    atheris.Setup([sys.argv[0], f"-rss_limit_mb={limit}", *rest], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
