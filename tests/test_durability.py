"""A run that is killed, stopped or fed another run's checkpoint.

A killed run is a real process: forked from this one, whose imports are done, and ended
by SIGKILL. The moment is a number of function calls and returns, in Python and in C,
which is drawn from a seed: any moment can be hit, and a failure can be repeated.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from pyhealth.models.base_model import BaseModel
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pyhealth.bilevel import BiLevelTrainer
from pyhealth.bilevel.checkpoint import CheckpointError
from pyhealth.bilevel.interruption import TrainingInterrupted
from pyhealth.datasets import create_sample_dataset, get_dataloader
from pyhealth.models.taskaug_policy import TaskAugPolicy

LEADS, LENGTH, RATE = 2, 40, 50
#: Kills of each of three kinds of data.
KILLS = 8

# The children are forked on purpose, and what they inherit they do not use.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded"),
]


def raw_samples(name, seed, records=16):
    generator = torch.Generator().manual_seed(seed)
    wave = torch.sin(torch.arange(LENGTH) / 3)
    return [
        {
            "patient_id": f"{name}{i}",
            "ecg": torch.randn(LEADS, LENGTH, generator=generator) + i % 2 * wave,
            "label": i % 2,
        }
        for i in range(records)
    ]


def samples_of(name, seed, records=16, **task):
    samples = [
        {**sample, "ecg": sample["ecg"].tolist()}
        for sample in raw_samples(name, seed, records)
    ]
    return create_sample_dataset(
        samples, {"ecg": "tensor"}, {"label": "binary"}, **task
    )


@pytest.fixture(scope="module")
def train_set():
    return samples_of("train", 0)


@pytest.fixture(scope="module")
def val_set():
    return samples_of("val", 1)


class Net(BaseModel):
    """Convolution, BatchNorm, dropout; no policy of its own."""

    def __init__(self, dataset, leads=LEADS, width=3):
        super().__init__(dataset)
        self.conv = nn.Conv1d(leads, width, 9, stride=4)
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(width, 1)

    def forward(self, **kwargs):
        hidden = self.dropout(self.norm(self.conv(kwargs["ecg"])).tanh())
        logit = self.head(hidden.square().mean(dim=-1))
        return {
            "logit": logit,
            "y_prob": self.prepare_y_prob(logit),
            "loss": self.get_loss_function()(logit, kwargs["label"]),
            "y_true": kwargs["label"],
        }


class Jittered(Dataset):
    """An ordinary dataset whose items change: noise from NumPy and Python."""

    def __init__(self, name, seed):
        self.samples = raw_samples(name, seed)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        sample = self.samples[index]
        noise = 0.1 * np.random.rand() + 0.1 * random.random()
        label = torch.tensor([float(sample["label"])])
        return {**sample, "ecg": sample["ecg"] + noise, "label": label}


def seed_everything():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


class Command:
    """The same run each time it is called, below a folder."""

    def __init__(self, folder, dataset, loaders, leads=LEADS):
        self.folder, self.dataset, self.loaders = folder, dataset, loaders
        self.leads = leads

    def __call__(self, **settings):
        seed_everything()
        settings = {"epochs": 3, "checkpoint_every": 2, "accumulate": 2} | settings
        settings = {"resume": True} | settings
        model = (settings.pop("model", None) or Net)(self.dataset, self.leads)
        policy = {"num_stages": 1, "sampling_rate": RATE} | settings.pop("policy", {})
        before_forward = settings.pop("before_forward", None)
        if before_forward is not None:
            model.register_forward_pre_hook(lambda *_: before_forward())
        trainer = BiLevelTrainer(
            model,
            metrics=["roc_auc"],
            device="cpu",
            output_path=str(self.folder),
            exp_name="run",
            policy=TaskAugPolicy(**policy),
            seed=settings.pop("seed", 0),
        )
        settings = {"inner_lr": 0.01, "outer_lr": 0.05} | settings
        self.trainer = trainer
        trainer.train(*self.loaders(), **settings)
        return trainer

    @property
    def checkpoints(self):
        return sorted((self.folder / "run" / "checkpoints").iterdir())


@pytest.fixture(autouse=True)
def _listens_to_ctrl_c():
    """A shell's background job ignores Ctrl-C, and so would all of these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


POLICY_FILES = ("best.ckpt.policy.json", "last.ckpt.policy.json")


def result_of(trainer):
    """Return all that a run ends with, as one text."""
    states = [trainer.model.state_dict(), trainer.policy.state_dict()]
    weights = [value.numpy().tobytes() for state in states for value in state.values()]
    history = [
        {k: v for k, v in row.items() if k != "seconds"} for row in trainer.history
    ]
    files = [
        (Path(trainer.exp_path) / name).read_bytes()
        for name in ("best.ckpt", "last.ckpt", *POLICY_FILES)
    ]
    after = [torch.rand(1).item(), np.random.rand(), random.random()]
    return repr((weights, history, files, after))


def in_a_process(work):
    """Run ``work`` in a forked process; return its exit code."""

    def alone():
        # By default forked processes share tqdm's lock, and a killed one would keep it.
        tqdm.set_lock(threading.RLock())
        work()

    process = multiprocessing.get_context("fork").Process(target=alone)
    process.start()
    process.join(timeout=100)
    if process.exitcode is None:
        process.kill()
        pytest.fail("the process hangs")
    return process.exitcode


def killed_after(events, command, end):
    """Call the command and write its result to ``end``; die at the given event."""

    def work():
        left = events

        def count(frame, event, argument):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        trainer = command()
        sys.setprofile(None)
        end.write_text(result_of(trainer))

    return in_a_process(work)


def events_of(command):
    """Return the number of events of an undisturbed run, and its result."""
    count = 0

    def one(frame, event, argument):
        nonlocal count
        count += 1

    sys.setprofile(one)
    trainer = command()
    sys.setprofile(None)
    return count, result_of(trainer)


def pyhealth_loaders(train, val):
    return lambda: (
        get_dataloader(train, 6, shuffle=True, seed=3),
        get_dataloader(val, 5, shuffle=True, seed=4),
    )


def torch_loaders():
    """Orders from torch's global generator; policy and evaluation share a loader."""
    return lambda: tuple(
        DataLoader(Jittered(name, seed), size, shuffle=True)
        for name, seed, size in (("train", 0, 6), ("val", 1, 5))
    )


@pytest.fixture(params=["in memory", "on disk", "torch"])
def commands(request, train_set, val_set, tmp_path):
    """Return a function from a folder's name to the command that works in it."""
    leads = LEADS
    if request.param == "torch":
        dataset, loaders = train_set, torch_loaders()
    elif request.param == "in memory":
        dataset, loaders = train_set, pyhealth_loaders(train_set, val_set)
    else:
        train, val, _ = request.getfixturevalue("parts")
        dataset, leads = train, next(iter(val))["ecg"].shape[0]

        def loaders():
            return (
                get_dataloader(train, 50, shuffle=True, seed=3),
                get_dataloader(val, 16),
            )

    return lambda name: Command(tmp_path / name, dataset, loaders, leads)


def test_a_run_killed_at_any_moment_ends_to_the_bit_like_an_undisturbed_one(
    commands, tmp_path
):
    events, expected = events_of(commands("undisturbed"))
    moments, kills, runs = random.Random(0), 0, 0
    while kills < KILLS:
        command, end = commands(f"killed{runs}"), tmp_path / f"end{runs}"
        while not end.exists():
            # Each life does about a quarter of a run, some hardly begin.
            code = killed_after(moments.randint(1, events // 2), command, end)
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
        assert end.read_text() == expected
        runs += 1


def test_a_run_killed_while_it_writes_ends_like_an_undisturbed_one(
    train_set, val_set, tmp_path, monkeypatch
):
    """Before a file is flushed to the disk, renamed, or an old one removed."""
    loaders = pyhealth_loaders(train_set, val_set)
    expected = result_of(Command(tmp_path / "undisturbed", train_set, loaders)())
    command, end = Command(tmp_path / "killed", train_set, loaders), tmp_path / "end"
    lives = 0
    for name in ("fsync", "replace", "unlink") * 4:
        lives += 1

        def work(name=name, at=1 + lives % 4):
            original, left = getattr(os, name), at

            def deadly(*args, **kwargs):
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            setattr(os, name, deadly)
            end.write_text(result_of(command()))

        if in_a_process(work) == 0:
            break
    in_a_process(lambda: end.write_text(result_of(command())))
    assert lives > 5
    assert end.read_text() == expected


# Stopped by a signal


@pytest.fixture
def command_in(train_set, val_set, tmp_path):
    """Return a function from a folder's name to the command that works in it."""
    loaders = pyhealth_loaders(train_set, val_set)
    return lambda name: Command(tmp_path / name, train_set, loaders)


def at_call(number, action):
    """Return a function that acts in its call of this number."""
    calls = 0

    def count():
        nonlocal calls
        calls += 1
        if calls == number:
            action()

    return count


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("call", [1, 5, 12])  # in an epoch, in an evaluation
def test_a_signal_ends_a_process_after_a_checkpoint_to_go_on_from(
    command_in, tmp_path, number, call
):
    end = tmp_path / "end"
    stop = at_call(call, lambda: os.kill(os.getpid(), number))

    def work():
        try:
            command_in("stopped")(before_forward=stop, checkpoint_every=None)
        except TrainingInterrupted as stopped:
            end.write_text(str(stopped))
            os._exit(stopped.exit_code)

    assert in_a_process(work) == 128 + number
    newest = command_in("stopped").checkpoints[-1]
    assert newest.name != "step-00000000.ckpt"
    assert f"{newest} is written. Go on with the same command" in end.read_text()
    assert "resume=True" in end.read_text()
    assert result_of(command_in("stopped")()) == result_of(command_in("whole")())


def test_a_second_signal_acts_at_once(command_in):
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

    code = in_a_process(lambda: command_in("run")(before_forward=at_call(5, twice)))
    assert code == -signal.SIGTERM


def test_handlers_are_put_back(command_in):
    numbers = (signal.SIGTERM, signal.SIGINT)
    before, during = [signal.getsignal(n) for n in numbers], []
    command_in("run")(
        before_forward=lambda: during.append([signal.getsignal(n) for n in numbers]),
        epochs=2,
    )
    assert [signal.getsignal(n) for n in numbers] == before
    assert all(mine != its for mine, its in zip(during[0], before, strict=True))


def test_an_ignored_signal_stays_ignored(command_in):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        command_in("run")(
            before_forward=at_call(3, lambda: signal.raise_signal(signal.SIGINT)),
            epochs=2,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def test_without_a_folder_signals_do_what_they_do(train_set, val_set):
    trainer = BiLevelTrainer(
        Net(train_set),
        metrics=["roc_auc"],
        device="cpu",
        enable_logging=False,
        policy=TaskAugPolicy(1, sampling_rate=RATE),
    )
    handler, during = signal.getsignal(signal.SIGINT), []
    trainer.model.register_forward_pre_hook(
        lambda *_: during.append(signal.getsignal(signal.SIGINT))
    )
    trainer.train(*pyhealth_loaders(train_set, val_set)(), epochs=2)
    assert set(during) == {handler}


def test_outside_the_main_thread_training_takes_no_handlers(command_in):
    errors = []

    def work():
        try:
            command_in("run")(epochs=2)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
    assert command_in("run").checkpoints


# Going on


def test_more_epochs_go_on_where_fewer_ended(command_in):
    command_in("short")(epochs=2)
    assert result_of(command_in("short")(epochs=4)) == result_of(
        command_in("long")(epochs=4)
    )


def test_a_finished_run_is_only_restored(command_in):
    expected = result_of(command_in("run")())
    calls = []
    again = command_in("run")(
        before_forward=lambda: calls.append(torch.is_grad_enabled())
    )
    assert result_of(again) == expected
    assert not any(calls)


def test_a_run_that_stopped_early_does_not_go_on(command_in):
    first = command_in("run")(epochs=20, patience=1)
    expected = result_of(first)
    assert len(first.history) < 20
    assert result_of(command_in("run")(epochs=20, patience=1)) == expected


def test_a_path_names_the_checkpoint(command_in):
    whole = result_of(command_in("whole")())
    path = command_in("whole").checkpoints[0]
    assert result_of(command_in("other")(resume=str(path))) == whole
    assert path.exists()  # in its own folder
    with pytest.raises(CheckpointError, match="There is no checkpoint nowhere"):
        command_in("third")(resume="nowhere")


def test_without_resume_a_run_starts_anew(command_in):
    expected = result_of(command_in("run")())
    anew = command_in("run")(resume=False)
    assert result_of(anew) == expected
    assert sorted(row["epoch"] for row in anew.history) == [0, 1, 2]


def test_a_seed_that_was_drawn_is_kept(command_in):
    """Without a seed the trainer draws one, and the second process another."""
    drawn = command_in("run")(seed=None, epochs=2).seed

    def other_start(dataset, leads):
        torch.manual_seed(99)
        return Net(dataset, leads)

    assert command_in("other")(seed=None, epochs=2, model=other_start).seed != drawn
    assert command_in("run")(seed=None, epochs=2, model=other_start).seed == drawn


def test_a_damaged_newest_checkpoint_costs_its_steps_only(command_in):
    command_in("run")(epochs=2)
    newest = command_in("run").checkpoints[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    assert result_of(command_in("run")()) == result_of(command_in("whole")())


# Another run's checkpoint


class Wider(Net):
    def __init__(self, dataset, leads):
        super().__init__(dataset, leads, width=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner_lr": 0.02}, "argument inner_lr 0.01, this one has 0.02"),
        ({"accumulate": 3}, "argument accumulate 2, this one has 3"),
        ({"hypergradient": None}, "argument hypergradient 'alignment', .* None"),
        ({"seed": 1}, "argument seed 0, this one has 1"),
        ({"policy": {"num_stages": 2}}, "policy num_stages 1, this one has 2"),
        (
            {"policy": {"operations": ("no_op", "time_mask")}},
            r"policy op_names \('gaussian_noise'.* has \('no_op', 'time_mask'\)",
        ),
        ({"model": Wider}, r"conv.weight of shape \(3, 2, 9\), .* \(5, 2, 9\)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_a_run_with_other_settings_is_refused_before_anything_changes(
    command_in, settings, message
):
    command_in("run")(epochs=2)
    command, before = command_in("run"), []
    files = [path.read_bytes() for path in command.checkpoints]

    def start(dataset, leads):
        model = settings.get("model", Net)(dataset, leads)
        before.append({k: v.clone() for k, v in model.state_dict().items()})
        return model

    with pytest.raises(CheckpointError, match=message) as caught:
        command(**{**settings, "model": start})
    assert str(caught.value).count(". ") == 0  # one sentence
    after = command.trainer.model.state_dict()
    assert all(value.equal(before[0][name]) for name, value in after.items())
    assert [path.read_bytes() for path in command.checkpoints] == files


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: samples_of("train", 0, task_name="other"), "task name '', .* 'other'"),
        (lambda: samples_of("train", 0, records=18), "other training data"),
        (lambda: samples_of("others", 0), "other training data"),
    ],
)
def test_other_data_or_another_task_are_refused(
    command_in, val_set, tmp_path, other, message
):
    command_in("run")(epochs=2)
    data = other()
    command = Command(tmp_path / "run", data, pyhealth_loaders(data, val_set))
    with pytest.raises(CheckpointError, match=message):
        command()


def test_a_checkpoint_of_another_layout_is_refused(command_in):
    command_in("run")(epochs=2)
    path = command_in("run").checkpoints[-1]
    state = torch.load(path, weights_only=True)
    torch.save({**state, "format": 99}, path)
    with pytest.raises(CheckpointError, match="format 99, this version reads 1"):
        command_in("run")()


# Disks


def test_a_folder_that_cannot_be_written_to_is_an_error_before_training(
    command_in, tmp_path
):
    calls = []
    (tmp_path / "run" / "run").mkdir(parents=True)
    (tmp_path / "run" / "run" / "checkpoints").write_text("a file, not a folder")
    with pytest.raises(
        OSError, match=r"Checkpoints cannot be written to .*checkpoints"
    ):
        command_in("run")(before_forward=lambda: calls.append(1))
    assert not calls


def test_a_disk_that_fills_up_keeps_the_last_good_checkpoint(command_in, monkeypatch):
    original, left = os.fsync, 14

    def full_later(descriptor):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", full_later)
    with pytest.raises(OSError, match="No space left on device"):
        command_in("run")()
    left = 10**6
    assert [path.suffix for path in command_in("run").checkpoints] == [".ckpt"] * 2
    assert result_of(command_in("run")()) == result_of(command_in("whole")())
