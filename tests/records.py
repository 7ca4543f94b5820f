"""Records for tests, written by WFDB's own writer."""

from __future__ import annotations

import numpy as np
import wfdb

from pyhealth.processors.ecg_record_processor import STANDARD_LEADS


def write(
    folder, signal, rate=100, leads=None, unit="mV", gain=1000.0, name="r", fmt="16"
):
    """Write (leads, samples) in `unit`; return the record's path."""
    count = len(signal)
    wfdb.wrsamp(
        name,
        fs=rate,
        units=[unit] * count,
        sig_name=list(leads or STANDARD_LEADS[:count]),
        p_signal=np.asarray(signal, dtype=float).T,
        fmt=[fmt] * count,
        adc_gain=[gain] * count,
        baseline=[0] * count,
        write_dir=str(folder),
    )
    return str(folder / name)
