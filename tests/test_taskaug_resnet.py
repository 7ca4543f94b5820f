"""TaskAugResNet inside PyHealth: samples, loaders, and its own ``Trainer``."""

import copy

import pytest
import torch
from pyhealth.trainer import Trainer
from torch import nn

from pyhealth.datasets import create_sample_dataset, get_dataloader
from pyhealth.models.taskaug_resnet import TaskAugPolicy, TaskAugResNet

LEADS, LENGTH, RATE = 3, 64, 100


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make_dataset(leads=LEADS, length=LENGTH, label="binary", inputs=("ecg",), count=8):
    signals = torch.randn(count, leads, length, generator=seeded(0))
    signals[1::2, 0] += 2  # class 1 can be told
    samples = [
        {
            "patient_id": f"p{i}",
            **{key: signals[i].tolist() for key in inputs},
            "label": i % 3 if label == "multiclass" else i % 2,
        }
        for i in range(count)
    ]
    schema = {key: "tensor" for key in inputs}
    return create_sample_dataset(samples, schema, {"label": label})


@pytest.fixture(scope="module")
def dataset():
    return make_dataset()


@pytest.fixture(scope="module")
def batch(dataset):
    return next(iter(get_dataloader(dataset, batch_size=6, shuffle=False)))


def make_model(dataset, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = {"sampling_rate": RATE, "base_width": 2, "kernel_size": 3} | settings
        return TaskAugResNet(dataset, **({"num_leads": LEADS} | settings))


def always_noisy(model):
    """Make the policy add strong noise to every record."""
    with torch.no_grad():
        model.policy.logits.fill_(-1e4)
        model.policy.logits[:, 0] = 1e4
        model.policy.mag_neg.fill_(5.0)
        model.policy.mag_pos.fill_(5.0)
    return model


def bytes_of(parameters):
    return {name: p.detach().clone() for name, p in parameters.items()}


def unchanged(before, parameters):
    return {name: torch.equal(before[name], p) for name, p in parameters.items()}


def fit(model, dataset, epochs=2, **settings):
    trainer = Trainer(model, metrics=["roc_auc"], device="cpu", enable_logging=False)
    loader = get_dataloader(dataset, batch_size=4, shuffle=True)
    trainer.train(loader, loader, epochs=epochs, monitor="roc_auc", **settings)
    return trainer


class TestOutput:
    @pytest.mark.parametrize("training", [True, False])
    def test_with_a_label(self, dataset, batch, training):
        model = make_model(dataset).train(training)
        output = model(**batch)
        assert set(output) == {"logit", "y_prob", "loss", "y_true"}
        for key in ("logit", "y_prob", "y_true"):
            assert output[key].shape == (6, 1)
            assert output[key].dtype == torch.float32
        assert output["loss"].shape == ()
        assert torch.equal(output["y_true"], batch["label"])
        assert torch.equal(output["y_prob"], output["logit"].sigmoid())
        torch.testing.assert_close(
            output["loss"],
            nn.functional.binary_cross_entropy_with_logits(
                output["logit"], batch["label"]
            ),
        )

    @pytest.mark.parametrize("training", [True, False])
    def test_without_a_label(self, dataset, batch, training):
        model = make_model(dataset).train(training)
        output = model(ecg=batch["ecg"])
        assert set(output) == {"logit", "y_prob"}
        assert output["logit"].shape == (6, 1)

    @pytest.mark.parametrize("leads", [1, 8, 12])
    @pytest.mark.parametrize("length", [1, 37, 500])
    def test_any_leads_and_length(self, dataset, leads, length):
        model = make_model(dataset, num_leads=leads)
        x = torch.randn(4, leads, length, generator=seeded(1))
        label = torch.tensor([[0.0], [1.0], [0.0], [1.0]])
        for training in (True, False):
            output = model.train(training)(ecg=x, label=label)
            assert output["logit"].shape == (4, 1)
            assert output["logit"].isfinite().all()

    def test_keys_are_those_of_the_dataset(self):
        data = make_dataset(inputs=("trace",))
        model = make_model(data)
        batch = next(iter(get_dataloader(data, batch_size=4, shuffle=False)))
        assert model(**batch)["logit"].shape == (4, 1)

    def test_mode(self, dataset):
        assert make_model(dataset).mode == "binary"


class TestWhatIsAugmented:
    def test_training_with_labels(self, dataset, batch):
        model = always_noisy(make_model(dataset))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            output = model(**batch)
            torch.manual_seed(1)
            with torch.no_grad():
                augmented = model.policy(batch["ecg"], batch["label"])
        assert not torch.allclose(augmented, batch["ecg"], atol=0.1)
        assert torch.equal(output["logit"], model.backbone(augmented))

    @pytest.mark.parametrize(
        "training, labelled", [(False, True), (False, False), (True, False)]
    )
    def test_evaluation_and_unlabelled_batches_are_not(
        self, dataset, batch, training, labelled
    ):
        model = always_noisy(make_model(dataset)).train(training)
        entries = dict(batch) if labelled else {"ecg": batch["ecg"]}
        rng = torch.get_rng_state()
        logit = model(**entries)["logit"]
        assert torch.equal(logit, model.backbone(batch["ecg"]))
        assert torch.equal(torch.get_rng_state(), rng)

    def test_a_trainer_can_take_over(self, dataset, batch):
        model = always_noisy(make_model(dataset))
        model.augment = False
        logit = model(**batch)["logit"]
        assert torch.equal(logit, model.backbone(batch["ecg"]))

    def test_no_stages(self, dataset, batch):
        model = make_model(dataset, policy_stages=0)
        assert model.policy.num_stages == 0
        logit = model(**batch)["logit"]
        assert torch.equal(logit, model.backbone(batch["ecg"]))


class TestWhoTrainsThePolicy:
    """PyHealth's Trainer puts every named parameter into one optimiser."""

    @pytest.mark.parametrize("weight_decay", [0.0, 0.5])
    @pytest.mark.parametrize("stages", [0, 2])
    def test_not_the_plain_trainer(self, dataset, stages, weight_decay):
        model = make_model(dataset, policy_stages=stages)
        policy = bytes_of(model.policy_parameters())
        backbone = bytes_of(model.backbone_parameters())
        trainer = fit(
            model,
            dataset,
            weight_decay=weight_decay,
            max_grad_norm=1.0,
            load_best_model_at_last=False,
        )
        assert all(unchanged(policy, model.policy_parameters()).values())
        assert all(p.grad is None for p in model.policy_parameters().values())
        assert not any(unchanged(backbone, model.backbone_parameters()).values())
        scores = trainer.evaluate(get_dataloader(dataset, batch_size=4))
        assert 0 <= scores["roc_auc"] <= 1

    def test_the_plain_trainer_where_it_is_asked_for(self, dataset):
        model = make_model(dataset, train_policy_jointly=True)
        policy = bytes_of(model.policy_parameters())
        fit(model, dataset, load_best_model_at_last=False)
        assert not any(unchanged(policy, model.policy_parameters()).values())

    def test_jointly_trains_magnitudes_and_logits_on_the_training_loss(
        self, dataset, batch
    ):
        model = make_model(dataset, train_policy_jointly=True)
        model(**batch)["loss"].backward()
        assert all(p.grad.abs().sum() > 0 for p in model.policy_parameters().values())

    def test_plain_training_learns(self):
        data = make_dataset(count=16)
        model = make_model(data, base_width=4)
        trainer = fit(model, data, epochs=8, optimizer_params={"lr": 0.01})
        scores = trainer.evaluate(get_dataloader(data, batch_size=16))
        assert scores["roc_auc"] > 0.9


class TestParameters:
    @pytest.mark.parametrize("shared", [False, True])
    def test_policy_and_backbone_make_up_the_model(self, dataset, shared):
        model = make_model(dataset, shared_magnitudes=shared)
        policy, backbone = model.policy_parameters(), model.backbone_parameters()
        named = dict(model.named_parameters())
        assert policy.keys().isdisjoint(backbone)
        assert policy.keys() | backbone.keys() | {"_dummy_param"} == named.keys()
        assert all(named[n] is p for n, p in {**policy, **backbone}.items())
        magnitudes = ["mag_neg"] if shared else ["mag_neg", "mag_pos"]
        assert list(policy) == [f"policy.{n}" for n in ("logits", *magnitudes)]

    def test_the_authors_backbone(self, dataset):
        model = make_model(
            dataset, num_leads=12, base_width=32, kernel_size=15, stem_pool=False
        )
        count = sum(p.numel() for p in model.backbone_parameters().values())
        assert 4.6e6 < count < 4.65e6
        kernels = {m.kernel_size for m in model.modules() if isinstance(m, nn.Conv1d)}
        assert kernels == {(15,), (1,)}  # 1: the shortcuts' projections
        assert not any(isinstance(m, nn.MaxPool2d) for m in model.modules())

    def test_it_is_a_resnet_18(self, dataset):
        model = make_model(dataset, stem_kernel_size=15)
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv1d)]
        assert convolutions[0].kernel_size == (15,)
        layers = [m for m in convolutions if m.kernel_size != (1,)]
        assert len(layers) + 1 == 18  # and the linear head
        assert sum(isinstance(m, nn.MaxPool2d) for m in model.modules()) == 1
        assert all(m.bias is None for m in convolutions)

    def test_length_falls_by_32_from_stem_to_head(self, dataset):
        model = make_model(dataset)
        x = torch.zeros(2, LEADS, 1, 320)
        hidden = model.backbone.blocks(model.backbone.stem(x))
        assert hidden.shape == (2, 16, 1, 10)

    def test_policy_settings_are_passed_on(self, dataset):
        model = make_model(dataset, policy_stages=3, temperature=0.5, selection="batch")
        assert isinstance(model.policy, TaskAugPolicy)
        assert model.policy.num_stages == 3
        assert model.policy.temperature == 0.5
        assert model.policy.selection == "batch"
        assert model.policy.sampling_rate == RATE
        assert not model.policy.shared_magnitudes
        assert make_model(dataset, shared_magnitudes=True).policy.shared_magnitudes

    def test_sampling_rate_comes_from_the_processor(self, dataset, monkeypatch):
        processor = dataset.input_processors["ecg"]
        monkeypatch.setattr(processor, "sampling_rate", 250, raising=False)
        assert make_model(dataset, sampling_rate=None).policy.sampling_rate == 250
        assert make_model(dataset, sampling_rate=500).policy.sampling_rate == 500

    def test_state_is_loaded_into_another_model(self, dataset, batch):
        model = make_model(dataset)
        model.policy.randomize_(seeded(1))
        model(**batch)  # moves the running statistics
        twin = make_model(dataset)
        twin.load_state_dict(copy.deepcopy(model.state_dict()))
        logits = [m.eval()(**batch)["logit"] for m in (model, twin)]
        assert torch.equal(*logits)
        assert twin.policy.to_frame().equals(model.policy.to_frame())

    def test_weights_can_be_initialised_by_apply(self, dataset):
        seen = []
        make_model(dataset).apply(seen.append)
        assert any(isinstance(module, nn.Conv1d) for module in seen)


class TestErrors:
    @pytest.mark.parametrize(
        "settings, words",
        [
            ({"kernel_size": 4}, "odd length, got 4"),
            ({"kernel_size": -3}, "odd length, got -3"),
            ({"stem_kernel_size": 8}, "odd length, got 8"),
            ({"policy_stages": -1}, "num_stages must be 0 or more"),
            ({"selection": "all"}, "'sample' or 'batch'"),
        ],
        ids=str,
    )
    def test_arguments(self, dataset, settings, words):
        with pytest.raises(ValueError, match=words):
            make_model(dataset, **settings)

    def test_no_sampling_rate(self, dataset):
        words = (
            r"TensorProcessor of input 'ecg' states no sampling rate.*sampling_rate="
        )
        with pytest.raises(ValueError, match=words):
            make_model(dataset, sampling_rate=None)

    def test_two_inputs(self):
        words = r"one input and one label, got inputs \['ecg', 'other'\]"
        with pytest.raises(ValueError, match=words):
            make_model(make_dataset(inputs=("ecg", "other")))

    @pytest.mark.parametrize("label", ["multiclass", "regression"])
    def test_labels_that_are_not_two_classes(self, label):
        """Class 2 gets neg + 2 (pos - neg): outside the interval, even negative."""
        with pytest.raises(ValueError, match="shared_magnitudes=True"):
            make_model(make_dataset(label=label))
