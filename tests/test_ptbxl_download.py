"""Download and verification, from a server on loopback that has all faults."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest
from processes import until

from pyhealth.datasets import ptbxl_download
from pyhealth.datasets.ptbxl import PTBXLDataset
from pyhealth.datasets.ptbxl_synthetic import write_synthetic_ptbxl

pytestmark = pytest.mark.slow  # a server on loopback

VICTIM = "records100/00000/00002_lr.dat"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A corpus of a few patients as it is published, with its hashes."""
    root = write_synthetic_ptbxl(tmp_path_factory.mktemp("published") / "data", 10)
    (root / "LICENSE.txt").write_text("CC BY 4.0\n")
    files = sorted(path for path in root.rglob("*") if path.is_file())
    sums = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.relative_to(root)}\n"
        for path in files
        if path.name != "SHA256SUMS.txt"
    ]
    (root / "SHA256SUMS.txt").write_text("".join(sums))
    return root


class Handler(BaseHTTPRequestHandler):
    """Serves a folder; does what the server's faults say, each so often."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        name = self.path.removeprefix("/ptb-xl/1.0.3/")
        server.asked[name] += 1
        times, fault = server.faults.get(name, server.faults.get("*", (0, None)))
        body = (server.root / name).read_bytes()
        if server.asked[name] > times:
            fault = None
        if fault == "drop":
            self.connection.close()
            self.close_connection = True
            return
        if fault == "silent":
            server.stopped.wait(5)
        if isinstance(fault, bytes):
            self.answer(200, fault)
        elif isinstance(fault, int):
            self.answer(fault, b"", {"Retry-After": "0"})
        elif fault == "truncate":
            self.answer(200, body[:100], {}, len(body))
            self.close_connection = True
        elif fault == "wrong":
            self.answer(200, body[:-1] + bytes([body[-1] ^ 1]))
        elif fault == "page":
            self.answer(200, b"<html>Please log in</html>")
        else:
            self.answer(200, body)

    def answer(self, status, body, headers=None, length=None):
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(published):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.root, server.faults, server.asked = published, {}, Counter()
    server.stopped = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/ptb-xl/{{version}}"
    thread = threading.Thread(target=server.serve_forever, args=[0.05])
    thread.start()
    yield server
    server.stopped.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """No pause before another try, and half a second for a server that is silent."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(ptbxl_download, "TIMEOUT", (5, 0.5))


def fetch(server, root, **arguments):
    arguments = {"sampling_rates": [100, 500], "workers": 4} | arguments
    return PTBXLDataset.download(root, base_url=server.url, **arguments)


def files_of(root):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def test_all_of_it_arrives_and_is_verified(server, published, tmp_path, capsys):
    root = fetch(server, tmp_path / "new" / "ptbxl")
    assert files_of(root) == files_of(published)
    assert set(server.asked.values()) == {1}
    report = PTBXLDataset.verify(root)
    assert report.ok and not report.absent and not report.unlisted
    records = len(list(published.rglob("*.dat")))
    assert report.waveforms == records
    assert report.verified == 2 * records + 3
    bar = capsys.readouterr().err
    assert f"{2 * records}/{2 * records}" in bar and "file/s" in bar
    dataset = PTBXLDataset(root, sampling_rate=100, cache_dir=tmp_path / "cache")
    assert len(dataset.records()) == records / 2


def test_a_whole_folder_is_verified_and_nothing_is_asked_for(
    server, published, tmp_path
):
    root = Path(shutil.copytree(published, tmp_path / "data"))
    fetch(server, root)
    assert set(server.asked) == {"SHA256SUMS.txt"}
    server.shutdown()  # nor is a network needed
    server.server_close()
    fetch(server, root)
    (root / VICTIM).unlink()
    with pytest.raises(OSError, match=rf"1 of \d+ files could not be had.*{VICTIM}"):
        fetch(server, root)


def test_only_what_is_missing_or_changed_is_fetched(server, published, tmp_path):
    root = Path(shutil.copytree(published, tmp_path / "data"))
    (root / VICTIM).unlink()
    header = root / VICTIM.replace(".dat", ".hea")
    header.write_text("changed")
    fetch(server, root)
    assert set(server.asked) - {"SHA256SUMS.txt"} == {
        VICTIM,
        VICTIM.replace(".dat", ".hea"),
    }
    assert files_of(root) == files_of(published)


@pytest.mark.parametrize(
    "fault", ["drop", "truncate", "wrong", "page", "silent", 503, 429, 500]
)
@pytest.mark.parametrize("name", [VICTIM, "SHA256SUMS.txt", "ptbxl_database.csv"])
def test_a_passing_fault_is_got_over(server, published, tmp_path, fault, name):
    if name == "SHA256SUMS.txt" and fault in ("wrong", "page"):
        pytest.skip("nothing vouches for the list itself")
    server.faults = {name: (1, fault)}
    root = fetch(server, tmp_path)
    assert server.asked[name] == 2
    assert files_of(root) == files_of(published)


def test_every_file_may_fail_once(server, published, tmp_path):
    server.faults = {"*": (1, "drop")}
    assert files_of(fetch(server, tmp_path)) == files_of(published)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("drop", "Connection"),
        ("truncate", "IncompleteRead|Connection broken"),
        ("wrong", "does not match the known hash"),
        (404, "404 Not Found"),
        (403, "403 Forbidden"),
        (503, "503|too many 503"),
    ],
)
def test_a_lasting_fault_is_one_sentence_and_costs_one_file(
    server, published, tmp_path, fault, words
):
    server.faults = {VICTIM: (10**6, fault)}
    with pytest.raises(OSError, match=words) as caught:
        fetch(server, tmp_path)
    assert f"1 of {2 * len(list(published.rglob('*.dat')))} files" in str(caught.value)
    assert VICTIM in str(caught.value)
    assert "\n" not in str(caught.value)
    expected = files_of(published)
    del expected[VICTIM]
    assert files_of(tmp_path) == expected  # nothing half, nothing left behind
    server.faults = {}
    assert files_of(fetch(server, tmp_path)) == files_of(published)


def test_a_server_that_is_gone_is_not_asked_for_everything(
    server, tmp_path, monkeypatch
):
    monkeypatch.setattr(ptbxl_download, "HOPELESS", 2)
    fetch(server, tmp_path, records=[])
    server.asked.clear()
    server.faults = {"*": (10**6, 404)}
    with pytest.raises(OSError, match="404 Not Found"):
        fetch(server, tmp_path, workers=1)
    assert len(server.asked) <= 4


def test_a_cohort_and_a_rate_alone_can_be_had(server, published, tmp_path):
    root = fetch(server, tmp_path, sampling_rates=[500], records=[3, 1, 3])
    waveforms = sorted(path.name for path in root.rglob("*.dat"))
    assert waveforms == ["00001_hr.dat", "00003_hr.dat"]
    report = PTBXLDataset.verify(root)
    assert report.ok
    assert len(report.absent) == len(files_of(published)) - len(files_of(root))
    with pytest.raises(ValueError, match=r"no record with ecg_id 999999\."):
        fetch(server, tmp_path, records=[1, 999999])


def test_a_killed_download_goes_on(server, published, tmp_path):
    server.faults = {VICTIM: (1, "silent")}
    code = (
        "import sys; from pyhealth.datasets.ptbxl_download import download\n"
        "download(sys.argv[1], sampling_rates=[100, 500], base_url=sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(tmp_path), server.url]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    until(lambda: server.asked[VICTIM] > 0, process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / VICTIM).exists()
    there = [name for name in files_of(tmp_path) if name in files_of(published)]
    assert all((tmp_path / n).read_bytes() == files_of(published)[n] for n in there)
    asked = server.asked.copy()
    fetch(server, tmp_path)
    again = [name for name in there if server.asked[name] > asked[name]]
    assert again == ["SHA256SUMS.txt"]
    assert files_of(tmp_path).items() >= files_of(published).items()


def test_the_disk_is_measured_first(server, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"needs 0\.0 GB more .* 0\.0 GB are free"):
        fetch(server, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_room_that_all_of_it_takes():
    """As the docstring has it: two files for each of 21,799 records, and blocks."""
    names = {
        rate: [f"records/{i}_{kind}{end}" for i in range(21_799) for end in ends]
        for rate, kind, ends in (
            (100, "lr", (".dat", ".hea")),
            (500, "hr", (".dat", ".hea")),
        )
    }
    gigabytes = {
        rate: sum(map(ptbxl_download._bytes_of, of)) / 1e9 for rate, of in names.items()
    }
    assert gigabytes == {
        100: pytest.approx(0.63, abs=0.01),
        500: pytest.approx(2.77, abs=0.01),
    }


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "is empty"),
        ("<html>", "line 1: expected a SHA-256"),
        (f"{'0' * 64} ../../etc/passwd", "a path inside the corpus"),
        (f"{'0' * 64} /etc/passwd", "a path inside the corpus"),
        (f"{'0' * 64} records100\\..\\x", "a path inside the corpus"),
        (f"{'0' * 63} a.csv", "expected a SHA-256"),
    ],
)
def test_a_list_that_is_none_is_refused(server, tmp_path, line, words):
    server.faults = {"SHA256SUMS.txt": (10**6, line.encode())}
    with pytest.raises(ValueError, match=words) as caught:
        fetch(server, tmp_path)
    assert "Fetch it again" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_another_version_takes_the_place_of_the_one_that_is_there(
    server, published, tmp_path
):
    root = Path(shutil.copytree(published, tmp_path / "data"))
    table = root / "ptbxl_database.csv"
    table.write_text("of an older version")
    digest = hashlib.sha256(table.read_bytes()).hexdigest()
    (root / "SHA256SUMS.txt").write_text(f"{digest} ptbxl_database.csv\n")
    fetch(server, root)
    assert files_of(root) == files_of(published)


def test_files_without_a_hash_are_refused(server, tmp_path):
    server.faults = {"SHA256SUMS.txt": (10**6, f"{'0' * 64} a.csv\n".encode())}
    with pytest.raises(OSError, match=r"does not list ptbxl_database\.csv, scp_"):
        fetch(server, tmp_path)


def test_an_address_is_no_folder():
    with pytest.raises(ValueError, match="must be a folder on the disk, got s3://a/b"):
        PTBXLDataset.download("s3://a/b")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sampling_rates": [250]}, r"some of \[100, 500\], got \[250\]"),
        ({"sampling_rates": []}, "got \\[\\]"),
        ({"workers": 0}, "workers must be 1 or more, got 0"),
    ],
)
def test_wrong_arguments_are_named(server, tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        fetch(server, tmp_path, **arguments)
    assert not server.asked


# Verification -----------------------------------------------------------------------


def test_a_report_names_what_is_wrong(published, tmp_path):
    root = Path(shutil.copytree(published, tmp_path / "data"))
    data = root / VICTIM
    content = bytearray(data.read_bytes())
    content[24] ^= 1  # the second sample of lead I
    data.write_bytes(content)
    (root / VICTIM.replace("00002", "00003")).write_bytes(b"")
    (root / "notes.txt").write_text("mine")
    report = PTBXLDataset.verify(root)
    assert not report.ok
    assert report.changed == [VICTIM, VICTIM.replace("00002", "00003")]
    assert report.damaged[VICTIM[:-4]] == "lead I disagrees with the header's checksum"
    assert "cannot be read" in report.damaged[VICTIM[:-4].replace("00002", "00003")]
    assert report.unlisted == ["notes.txt"]
    for words in (VICTIM, "2 changed", "lead I disagrees", "download"):
        assert words in str(report)


def test_linked_folders_are_verified_and_headers_without_checksums_are_told(
    published, tmp_path
):
    root = Path(shutil.copytree(published, tmp_path / "data"))
    elsewhere = (root / "records100").rename(tmp_path / "elsewhere")
    (root / "records100").symlink_to(elsewhere)
    header = root / VICTIM.replace(".dat", ".hea")
    lines = header.read_text().splitlines()
    short = [" ".join(line.split()[:5]) for line in lines[1:]]  # up to the resolution
    header.write_text("\n".join([lines[0], *short]) + "\n")
    report = PTBXLDataset.verify(root)
    assert report.changed == [VICTIM.replace(".dat", ".hea")]
    assert not report.absent
    assert "sampling_rates=[100]" in str(report)


def test_a_folder_without_hashes_cannot_be_verified(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"SHA256SUMS\.txt is missing"):
        PTBXLDataset.verify(tmp_path)


@pytest.mark.parametrize("variable", ["PTBXL_ROOT", "PTBXL100_ROOT"])
def test_the_published_records_are_whole(variable):
    root = os.environ.get(variable)
    if root is None:
        pytest.skip(f"{variable} is not set")
    report = PTBXLDataset.verify(root)
    assert report.ok, str(report)
    assert report.waveforms == len(
        pd.read_csv(Path(root) / "ptbxl_database.csv")
    ) * len(list(Path(root).glob("records?00")))
