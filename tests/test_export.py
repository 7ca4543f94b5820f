"""The trained classifier and a learned augmentation as torch.export and ONNX graphs."""

import subprocess
import sys

import onnx
import onnxruntime
import pytest
import torch
from torch.export import Dim

from pyhealth.datasets import create_sample_dataset
from pyhealth.models.ecg_classifier import ECGClassifier
from pyhealth.models.learned_augmentation import LearnedAugmentation
from pyhealth.models.taskaug_policy import TaskAugPolicy
from pyhealth.models.taskaug_resnet import TaskAugResNet

#: Other numbers of records and samples than those that were exported with.
SHAPES = [(1, 12, 200), (5, 12, 200), (3, 12, 1000), (2, 12, 333)]
RECORDS, SAMPLES = Dim("records"), Dim("samples", min=33)
EQUAL = {"rtol": 1e-5, "atol": 1e-5}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def batch():
    x = torch.randn(16, 12, 200, generator=seeded(0))
    return {"ecg": x, "label": (torch.arange(16.0) % 2)[:, None]}


@pytest.fixture(scope="module")
def model(batch):
    """A trained model: neither weights nor running statistics are as they began."""
    samples = [
        {"patient_id": str(i), "ecg": batch["ecg"][i].tolist(), "label": i % 2}
        for i in range(2)
    ]
    dataset = create_sample_dataset(samples, {"ecg": "tensor"}, {"label": "binary"})
    torch.manual_seed(0)
    model = TaskAugResNet(dataset, base_width=4, sampling_rate=100)
    optimizer = torch.optim.Adam(model.backbone.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def program(model, batch):
    """The classifier as torch.export has it."""
    shapes = {"ecg": {0: RECORDS, 2: SAMPLES}}
    return torch.export.export(
        model.classifier(), (batch["ecg"],), dynamic_shapes=shapes
    )


@pytest.fixture(scope="module")
def onnx_file(model, batch, tmp_path_factory):
    """The classifier as an ONNX file."""
    path = tmp_path_factory.mktemp("onnx") / "classifier.onnx"
    torch.onnx.export(
        model.classifier(),
        (batch["ecg"],),
        path,
        dynamic_shapes={"ecg": {0: RECORDS, 2: SAMPLES}},
        input_names=["ecg"],
        output_names=["probability"],
        external_data=False,
        verbose=False,
    )
    return path


def test_the_classifier_gives_the_probabilities_of_the_model(model, batch):
    classifier = model.classifier()
    assert model.training and not classifier.training
    expected = model.eval()(**batch)["y_prob"]
    model.train()
    assert classifier(batch["ecg"]).equal(expected)
    assert expected.std() > 1e-3  # not all alike


def test_the_classifier_is_a_copy(model, batch):
    classifier = model.classifier()
    before = classifier(batch["ecg"])
    with torch.no_grad():
        model.backbone.head.bias += 1
    after = model.classifier()(batch["ecg"])
    with torch.no_grad():
        model.backbone.head.bias -= 1
    assert classifier(batch["ecg"]).equal(before)
    assert (after > before).all()


def test_several_classes_sum_to_one():
    backbone = torch.nn.Sequential(torch.nn.AdaptiveAvgPool1d(1), torch.nn.Flatten())
    x = torch.randn(5, 3, 40, generator=seeded(0))
    shares = ECGClassifier(backbone, "multiclass")(x)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(5))
    several = ECGClassifier(backbone, "multilabel")(x)
    torch.testing.assert_close(several, x.mean(dim=2).sigmoid())
    with pytest.raises(ValueError, match=r"kind must be one of .*'regression'"):
        ECGClassifier(backbone, "regression")


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_the_exported_classifier_is_the_eager_one(program, model, shape):
    x = torch.randn(shape, generator=seeded(1))
    expected = model.classifier()(x)
    torch.testing.assert_close(program.module()(x), expected, **EQUAL)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_the_onnx_classifier_is_the_eager_one(onnx_file, model, shape):
    onnx.checker.check_model(str(onnx_file), full_check=True)
    x = torch.randn(shape, generator=seeded(2))
    session = onnxruntime.InferenceSession(onnx_file)
    (found,) = session.run(["probability"], {"ecg": x.numpy()})
    expected = model.classifier()(x)
    torch.testing.assert_close(torch.from_numpy(found), expected, **EQUAL)


@pytest.mark.slow
def test_the_files_need_nothing_of_this_project(program, onnx_file, model, tmp_path):
    x = torch.randn(4, 12, 500, generator=seeded(3))
    torch.export.save(program, tmp_path / "classifier.pt2")
    torch.save((x, model.classifier()(x).detach()), tmp_path / "expected.pt")
    code = f"""
import sys, onnxruntime, torch
x, expected = torch.load("expected.pt")
exported = torch.export.load("classifier.pt2").module()(x)
session = onnxruntime.InferenceSession({str(onnx_file)!r})
(found,) = session.run(None, {{"ecg": x.numpy()}})
for result in (exported, torch.from_numpy(found)):
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
assert "pyhealth" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(params=["class", "shared", "electrode"])
def policy(request):
    """A policy of two stages whose operations are all likely."""
    return TaskAugPolicy(
        2,
        sampling_rate=100,
        shared_magnitudes=request.param == "shared",
        dropout_by="electrode" if request.param == "electrode" else "lead",
    ).randomize_(seeded(4))


def test_the_exportable_augmentation_does_what_the_policy_does(policy):
    x, labels = torch.randn(32, 12, 200, generator=seeded(5)), torch.arange(32) % 2
    augment = LearnedAugmentation(policy)
    module = augment.exportable()
    found = module(x, labels, module.sample(x.shape, seeded(6)))
    draw = policy.sample(x.shape, generator=seeded(6))
    torch.testing.assert_close(found, augment.apply(x, labels, draw), **EQUAL)
    assert not found.allclose(x)
    assert not list(module.parameters())


def test_half_a_label_is_the_mean_of_both_magnitudes():
    policy = TaskAugPolicy(1, sampling_rate=100).randomize_(seeded(7))
    x = torch.randn(16, 12, 200, generator=seeded(8))
    augment = LearnedAugmentation(policy, magnitudes="mean")
    module = augment.exportable()
    found = module(x, torch.full((16,), 0.5), module.sample(x.shape, seeded(9)))
    draw = policy.sample(x.shape, generator=seeded(9))
    torch.testing.assert_close(found, augment.apply(x, draw=draw), **EQUAL)


@pytest.mark.slow
def test_the_exported_augmentation_is_the_eager_one():
    policy = TaskAugPolicy(2, sampling_rate=100).randomize_(seeded(4))
    module = LearnedAugmentation(policy, sampling_rate=200).exportable()
    x, labels = torch.randn(6, 12, 400, generator=seeded(10)), torch.arange(6) % 2
    draw = module.sample(x.shape, seeded(11))
    noise = {
        name: {0: RECORDS, 2: SAMPLES} if "gaussian" in name else {0: RECORDS}
        for name in draw
    }
    program = torch.export.export(
        module,
        (x, labels, draw),
        dynamic_shapes=({0: RECORDS, 2: SAMPLES}, {0: RECORDS}, noise),
    ).module()
    assert program(x, labels, draw).equal(program(x, labels, draw))
    for shape in SHAPES:
        x, labels = torch.randn(shape, generator=seeded(12)), torch.ones(shape[0])
        draw = module.sample(x.shape, seeded(13))
        expected = module(x, labels.long(), draw)
        torch.testing.assert_close(program(x, labels.long(), draw), expected, **EQUAL)
