"""Several processes train one run: the same numbers as one, to rounding.

Two processes under gloo are forked from this one, whose imports are done.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import socket
import threading
import traceback
from copy import deepcopy

import pytest
import torch
from pyhealth.models.base_model import BaseModel
from torch import nn
from torch.func import functional_call
from tqdm import tqdm

from pyhealth.bilevel import BiLevelTrainer, hypergradient, inner_step_of
from pyhealth.bilevel.classifier import classifier_parameters
from pyhealth.bilevel.distributed import Processes
from pyhealth.bilevel.interruption import TrainingInterrupted
from pyhealth.bilevel.outer_loss import OUTER_LOSSES
from pyhealth.bilevel.step import BiLevelStep
from pyhealth.datasets import create_sample_dataset, get_dataloader
from pyhealth.models.taskaug_policy import TaskAugPolicy

LEADS, LENGTH, RATE = 2, 60, 50

# The children are forked on purpose, and what they inherit they do not use.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded"),
]


def samples_of(name, seed, records):
    generator = torch.Generator().manual_seed(seed)
    wave = torch.sin(torch.arange(LENGTH) / 3)
    return create_sample_dataset(
        [
            {
                "patient_id": f"{name}{i}",
                "ecg": (
                    torch.randn(LEADS, LENGTH, generator=generator) + i % 2 * wave
                ).tolist(),
                "label": i % 2,
            }
            for i in range(records)
        ],
        {"ecg": "tensor"},
        {"label": "binary"},
    )


@pytest.fixture(scope="module")
def train_set():
    return samples_of("train", 0, 22)


@pytest.fixture(scope="module")
def val_set():
    return samples_of("val", 1, 15)


class Net(BaseModel):
    def __init__(self, dataset, norm=True):
        super().__init__(dataset)
        self.conv = nn.Conv1d(LEADS, 3, 9, stride=4)
        self.norm = nn.BatchNorm1d(3) if norm else nn.Identity()
        self.head = nn.Linear(3, 1)

    def forward(self, **kwargs):
        hidden = self.norm(self.conv(kwargs["ecg"])).tanh()
        logit = self.head(hidden.square().mean(dim=-1))
        return {
            "logit": logit,
            "y_prob": self.prepare_y_prob(logit),
            "loss": self.get_loss_function()(logit, kwargs["label"]),
            "y_true": kwargs["label"],
        }


def launched(work, count=2):
    """Run ``work(index)`` in processes that a launcher would have started.

    Returns:
        What each returned, by its index.
    """
    context = multiprocessing.get_context("fork")
    queue, port = context.Queue(), free_port()

    def alone(index):
        # By default forked processes share tqdm's lock.
        tqdm.set_lock(threading.RLock())
        os.environ |= {
            "WORLD_SIZE": str(count),
            "RANK": str(index),
            "LOCAL_RANK": str(index),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
        }
        try:
            queue.put((index, work(index), None))
        except BaseException:
            queue.put((index, None, traceback.format_exc()))

    processes = [context.Process(target=alone, args=(i,)) for i in range(count)]
    for process in processes:
        process.start()
    results = {}
    try:
        for _ in processes:
            index, result, error = queue.get(timeout=120)
            assert error is None, error
            results[index] = result
    finally:
        for process in processes:
            process.join(timeout=5)
            process.kill()
    return [results[index] for index in range(count)]


def free_port():
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


# One step


def batch_of(records, seed):
    generator = torch.Generator().manual_seed(seed)
    label = (torch.arange(records) % 2).double()[:, None]
    x = torch.randn(records, LEADS, LENGTH, generator=generator, dtype=torch.float64)
    return {"ecg": x + label[:, :, None], "label": label}


def step_of(dataset, norm, index, average=None, **settings):
    """A step some inner steps into its training; process ``index``'s generator."""
    torch.manual_seed(0)
    model, policy = Net(dataset, norm).double(), TaskAugPolicy(1, sampling_rate=RATE)
    policy.double().randomize_(torch.Generator().manual_seed(1))
    params = classifier_parameters(model, policy)
    optimizer = torch.optim.Adam(params.values(), lr=0.02)
    step = BiLevelStep(
        model,
        policy,
        params,
        optimizer,
        "ecg",
        "label",
        torch.Generator().manual_seed(index),
        average=average,
        **settings,
    )
    for seed in range(3):  # on the same data and draws in each process
        step.generator.manual_seed(seed)
        step.inner(batch_of(8, 10 + seed))
    step.generator.manual_seed(100 + index)
    return step


def shares_of(batch, count=2):
    """The shares of all processes, computed without them."""
    records = len(batch["ecg"])
    edges = [index * records // count for index in range(count + 1)]
    return [
        {name: value[start:stop] for name, value in batch.items()}
        for start, stop in itertools.pairwise(edges)
    ]


def reference(dataset, norm, batch, val_batch, **settings):
    """The hypergradient of the union batch in one process.

    Of a network without BatchNorm the loss is that of the union batch; with it, each
    share is normalised by itself and the loss is the mean over the records.
    """
    step = step_of(dataset, norm, 0, **settings)
    model, policy = step.classifier.model, step.policy
    batches, val_batches = shares_of(batch), shares_of(val_batch)
    draws = [
        policy.sample(
            share["ecg"].shape,
            share["label"],
            torch.Generator().manual_seed(100 + index),
        )
        for index, share in enumerate(batches)
    ]
    names = dict(policy.named_parameters())
    # Running statistics after the step: the mean over the processes.
    copies = []
    for share, draw in zip(batches, draws, strict=True):
        copy = deepcopy(model).train()
        x = policy.apply(share["ecg"], share["label"], draw)
        copy(**{**share, "ecg": x.detach()})
        copies.append(len(x) / len(batch["ecg"]) * flat_buffers(copy))
    set_buffers(model, sum(copies))

    def train_loss(params, hparams):
        total = 0
        for share, draw in zip(batches, draws, strict=True):
            x = torch.func.functional_call(
                policy, {**hparams}, (share["ecg"], share["label"], draw), strict=False
            )
            buffers = {n: b.clone() for n, b in model.named_buffers()}
            model.train()
            output = functional_call(
                model, ({**params}, buffers), kwargs={**share, "ecg": x}
            )
            total = total + len(x) * output["loss"]
        return total / len(batch["ecg"])

    def val_loss(params):
        model.eval()
        if settings.get("outer_loss"):
            output = functional_call(model, {**params}, kwargs=val_batch)
            return OUTER_LOSSES[settings["outer_loss"]](
                output["logit"], output["y_true"]
            )
        total = sum(
            len(share["ecg"]) * functional_call(model, {**params}, kwargs=share)["loss"]
            for share in val_batches
        )
        return total / len(val_batch["ecg"])

    policy.forward = policy.apply  # functional_call calls forward
    if settings.get("method") == "neumann":
        of_method = {"lr": settings["neumann_lr"], "method": "neumann"}
        of_method["neumann_terms"] = settings["neumann_terms"]
    else:
        of_method = {"inner_step": inner_step_of(step.optimizer, step.params)}
    return hypergradient(train_loss, val_loss, step.params, names, **of_method)


def flat_buffers(model):
    floats = [b for b in model.buffers() if b.is_floating_point() and b.numel()]
    return torch.cat([b.flatten() for b in floats]) if floats else torch.zeros(0)


def set_buffers(model, flat):
    floats = [b for b in model.buffers() if b.is_floating_point() and b.numel()]
    for buffer, piece in zip(
        floats, flat.split([b.numel() for b in floats]), strict=False
    ):
        buffer.copy_(piece.view_as(buffer))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"outer_loss": "ranking"},
        {"outer_loss": "calibrated"},
        {"method": "neumann", "neumann_terms": 2, "neumann_lr": 0.1},
    ],
    ids=["one_step", "ranking", "calibrated", "neumann"],
)
def test_two_processes_give_the_hypergradient_of_the_union_batch(
    train_set, norm, settings
):
    batch, val_batch = batch_of(9, 0), batch_of(7, 1)  # shares of 4 and 5, 3 and 4

    def work(index):
        processes = Processes("cpu")
        together = {"average": processes.average, "gather": processes.gather}
        step = step_of(train_set, norm, index, **together, **settings)
        loss, gradient = step.inner_and_outer(
            processes.share(batch, 9), processes.share(val_batch, 7)
        )
        state = step.classifier.model.state_dict()
        return {
            "loss": loss.tolist(),
            "gradient": {k: v.tolist() for k, v in gradient.items()},
            "state": {k: v.tolist() for k, v in state.items()},
        }

    first, second = launched(work)
    assert first == second  # to the bit
    expected = reference(train_set, norm, batch, val_batch, **settings)
    assert expected["logits"].norm() > 1e-5
    for name, value in expected.items():
        actual = torch.tensor(first["gradient"][name], dtype=torch.float64)
        error = (actual - value).norm() / value.norm()
        assert error <= 1e-5, (name, error)
    alone = step_of(train_set, norm, 0, **settings)
    _, own = alone.inner_and_outer(shares_of(batch)[0], shares_of(val_batch)[0])
    difference = own["logits"] - expected["logits"]
    assert difference.norm() > 1e-2 * expected["logits"].norm()  # a share is not all


def test_shares_of_one_class_are_ranked_with_the_others(train_set):
    batch, val_batch = batch_of(8, 0), batch_of(6, 1)
    order = val_batch["label"].flatten().argsort()
    val_batch = {name: value[order] for name, value in val_batch.items()}

    def work(index):
        processes = Processes("cpu")
        settings = {"method": "alignment", "outer_loss": "ranking"}
        settings |= {"average": processes.average, "gather": processes.gather}
        step = step_of(train_set, False, index, **settings)
        shares = processes.share(batch, 8), processes.share(val_batch, 6)
        return step.inner_and_outer(*shares)[1]["logits"].tolist()

    first, second = launched(work)
    assert first == second
    assert torch.tensor(first).abs().max() > 1e-6


# A whole run


def run(folder, train_set, val_set, norm=True, **settings):
    """Train; every process starts from weights of its own, and the main one's count."""
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    trainer = BiLevelTrainer(
        Net(train_set, norm),
        metrics=["roc_auc"],
        device="cpu",
        output_path=str(folder),
        exp_name="run",
        policy=TaskAugPolicy(1, sampling_rate=RATE),
        seed=0,
    )
    written = []
    trainer.train(
        get_dataloader(train_set, 6, shuffle=True, seed=3),
        get_dataloader(val_set, 5),
        **{"epochs": 3, "inner_lr": 0.01, "resume": True} | settings,
        on_epoch=lambda t: written.append(len(t.history)),
    )
    return trainer, written


def result_of(trainer):
    states = [trainer.model.state_dict(), trainer.policy.state_dict()]
    weights = [{k: v.tolist() for k, v in state.items()} for state in states]
    history = [
        {k: v for k, v in row.items() if k != "seconds"} for row in trainer.history
    ]
    return repr((weights, history))


def test_policy_and_weights_are_equal_in_all_processes_and_files_written_once(
    train_set, val_set, tmp_path
):
    def work(index):
        trainer, written = run(tmp_path, train_set, val_set)
        return result_of(trainer), written, trainer.policy.logits.abs().max().item()

    first, second = launched(work)
    assert first[0] == second[0]
    assert first[2] > 0  # the policy moved
    assert (first[1], second[1]) == ([1, 2, 3], [])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "log.txt",
        "checkpoints",
        *("best.ckpt", "best.ckpt.policy.json", "last.ckpt", "last.ckpt.policy.json"),
    }
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert sum("epoch 1: train_loss" in line for line in lines) == 1


def test_without_randomness_any_number_of_processes_trains_alike(
    train_set, val_set, tmp_path
):
    """No BatchNorm, and a policy that only ever draws no_op."""

    def trained(index):
        torch.manual_seed(0)
        policy = TaskAugPolicy(1, sampling_rate=RATE, operations=("no_op",))
        trainer = BiLevelTrainer(
            Net(train_set, norm=False),
            metrics=["roc_auc"],
            device="cpu",
            enable_logging=False,
            policy=policy,
        )
        trainer.train(
            get_dataloader(train_set, 6, shuffle=True, seed=3),
            get_dataloader(val_set, 5),
            epochs=2,
            inner_lr=0.01,
            hypergradient=None,
        )
        weights = [value.flatten() for value in trainer.model.state_dict().values()]
        losses = [row["train_loss"] for row in trainer.history]
        return torch.cat(weights).tolist(), losses

    (weights, losses), _ = launched(trained)
    alone_weights, alone_losses = trained(0)
    assert weights == pytest.approx(alone_weights, abs=1e-5)
    assert losses == pytest.approx(alone_losses, abs=1e-5)


@pytest.mark.parametrize("how", ["ended", "by a signal"])
def test_a_run_of_two_processes_goes_on_to_the_bit(train_set, val_set, tmp_path, how):
    """The signal reaches one process only; both leave."""

    def interrupted(index):
        steps, original = 0, BiLevelStep.inner_and_outer

        def step(self, *batches):
            nonlocal steps
            steps += 1
            if steps == 3 and index == 1 and how == "by a signal":
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, *batches)

        BiLevelStep.inner_and_outer = step
        settings = {} if how == "by a signal" else {"epochs": 2}
        try:
            run(tmp_path / "stopped", train_set, val_set, **settings)
        except TrainingInterrupted as stopped:
            return stopped.exit_code
        return None

    expected = 143 if how == "by a signal" else None
    assert launched(interrupted) == [expected, expected]

    def whole(folder):
        return launched(lambda index: result_of(run(folder, train_set, val_set)[0]))

    assert whole(tmp_path / "stopped") == whole(tmp_path / "undisturbed")


def test_another_number_of_processes_is_refused(train_set, val_set, tmp_path):
    launched(lambda index: run(tmp_path, train_set, val_set, epochs=2) and None)
    with pytest.raises(ValueError, match="argument processes 2, this one has 1"):
        run(tmp_path, train_set, val_set)


def test_a_batch_smaller_than_the_launch_is_left_out():
    processes = Processes("cpu")
    processes.count, processes.index = 3, 1
    batch = {"ecg": torch.arange(7), "patient_id": list("abcdefg"), "name": "mi"}
    share = processes.share(batch, 7)
    assert share["ecg"].tolist() == [2, 3]
    assert (share["patient_id"], share["name"]) == (["c", "d"], "mi")
    assert processes.share({"ecg": torch.arange(2)}, 2) is None


def test_one_process_shares_nothing():
    processes = Processes("cpu")
    batch = {"ecg": torch.arange(7)}
    assert processes.share(batch, 7)["ecg"] is batch["ecg"]
    assert processes.average(batch, 7)["ecg"] is batch["ecg"]
    assert (processes.from_main(3), processes.all(4)) == (3, [4])
