"""A 1-D ResNet-18 for ECGs with a learnable augmentation policy in front."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from ..datasets.sample_dataset import SampleDataset
from .base_model import BaseModel
from .ecg_classifier import ECGClassifier
from .resnet_1d import _ResNet1D
from .taskaug_policy import TaskAugPolicy

__all__ = ["TaskAugPolicy", "TaskAugResNet"]


class TaskAugResNet(BaseModel):
    """ECG classifier: TaskAug policy, then a 1-D ResNet-18.

    In training mode and with a label, a batch is augmented by the policy and then
    classified; otherwise the raw signals are classified.

    The forward pass hands the policy over without a graph, so no optimiser of the
    training loss, PyHealth's ``Trainer`` included, can move it: with class-specific
    magnitudes the training loss would teach it to write the label into the signal.
    :class:`~pyhealth.bilevel.BiLevelTrainer` learns it from clean validation data.

    Args:
        dataset: samples with one signal input (leads, length) and one label.
        num_leads: number of leads.
        policy_stages: number of stages K of the policy; 0 for no augmentation.
        temperature: of the policy's relaxed choice.
        shared_magnitudes: one magnitude for both classes.
        base_width: channels of the first stage; later ones have 2, 4, 8 times as many.
        kernel_size: odd length of the convolutions, samples.
        train_policy_jointly: let the training loss's gradient reach the policy, for
            comparison only.
        stem_kernel_size: odd length of the first convolution; default ``kernel_size``.
        stem_pool: whether the stem ends in a max-pool of stride 2.
        selection: "sample" or "batch", see :class:`TaskAugPolicy`.
        sampling_rate: of the signals, hertz; default that of the dataset's
            :class:`~pyhealth.processors.ecg_processor.ECGProcessor`.

    Raises:
        ValueError: if the dataset does not have one input and one label, the sampling
            rate is neither given nor known, or an argument is outside its range.

    Source:
        Raghu et al., Data Augmentation for Electrocardiograms, CHIL 2022. Their
        backbone is ``base_width=32, kernel_size=15, stem_pool=False``.

    Examples:
        >>> from pyhealth.datasets import create_sample_dataset
        >>> samples = [
        ...     {"patient_id": str(i), "ecg": torch.randn(12, 200).tolist(), "label": i}
        ...     for i in range(2)
        ... ]
        >>> dataset = create_sample_dataset(
        ...     samples, {"ecg": "tensor"}, {"label": "binary"}
        ... )
        >>> model = TaskAugResNet(dataset, base_width=4, sampling_rate=100)
        >>> ecg, label = torch.randn(2, 12, 200), torch.tensor([[0.0], [1.0]])
        >>> sorted(model(ecg=ecg, label=label))
        ['logit', 'loss', 'y_prob', 'y_true']
        >>> model.classifier()(ecg).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        dataset: SampleDataset,
        num_leads: int = 12,
        policy_stages: int = 2,
        temperature: float = 1.0,
        shared_magnitudes: bool = False,
        base_width: int = 64,
        kernel_size: int = 7,
        train_policy_jointly: bool = False,
        stem_kernel_size: int | None = None,
        stem_pool: bool = True,
        selection: Literal["sample", "batch"] = "sample",
        sampling_rate: float | None = None,
    ) -> None:
        super().__init__(dataset)
        if len(self.feature_keys) != 1 or len(self.label_keys) != 1:
            raise ValueError(
                "TaskAugResNet takes one input and one label, got inputs "
                f"{self.feature_keys} and labels {self.label_keys}."
            )
        if self.mode != "binary" and policy_stages and not shared_magnitudes:
            raise ValueError(
                f"The label {self.label_keys[0]!r} is {self.mode}, but class-specific "
                "magnitudes are for a binary one; pass shared_magnitudes=True."
            )
        self.feature_key = self.feature_keys[0]
        self.label_key = self.label_keys[0]
        self.train_policy_jointly = train_policy_jointly
        #: Whether ``forward`` augments in training mode; a trainer that augments the
        #: batches itself turns this off meanwhile.
        self.augment = True
        self.policy = TaskAugPolicy(
            num_stages=policy_stages,
            temperature=temperature,
            shared_magnitudes=shared_magnitudes,
            selection=selection,
            sampling_rate=sampling_rate or self._dataset_rate(),
        )
        self.backbone = _ResNet1D(
            num_leads,
            self.get_output_size(),
            base_width=base_width,
            kernel_size=kernel_size,
            stem_kernel_size=stem_kernel_size,
            stem_pool=stem_pool,
        )

    def policy_parameters(self) -> dict[str, nn.Parameter]:
        """Return the policy's parameters by their full names."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name.startswith("policy.")
        }

    def backbone_parameters(self) -> dict[str, nn.Parameter]:
        """Return the classifier's parameters by their full names."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name.startswith("backbone.")
        }

    def classifier(self) -> ECGClassifier:
        """Return a copy of the classifier alone: signals in, probabilities out.

        Returns:
            A module in eval mode on the model's device, without dataset and policy,
            which ``torch.export`` and ONNX take.

        Raises:
            ValueError: if the label is neither binary nor of several classes or labels.
        """
        return ECGClassifier(copy.deepcopy(self.backbone), self.mode).eval()

    def forward(self, **kwargs: Tensor) -> dict[str, Tensor]:
        """Classify a batch, augmented if training with labels.

        Args:
            **kwargs: the batch; its input (B, leads, length) and, optionally, its label
                (B, 1) are looked up by the dataset's keys, other entries are ignored.

        Returns:
            "logit" (B, outputs) and "y_prob" (B, outputs); with a label also "loss"
            (scalar) and "y_true" (B, outputs).
        """
        x = kwargs[self.feature_key].to(self.device)
        label = kwargs.get(self.label_key)
        if label is not None:
            label = label.to(self.device)
            if self.training and self.augment:
                x = self._augmented(x, label)
        # Not in half precision, in which a probability near 1 has no neighbours.
        logit = self.backbone(x).to(torch.promote_types(x.dtype, torch.float32))
        result = {"logit": logit, "y_prob": self.prepare_y_prob(logit)}
        if label is not None:
            result["loss"] = self.get_loss_function()(logit, label)
            result["y_true"] = label
        return result

    def _augmented(self, x: Tensor, label: Tensor) -> Tensor:
        if self.train_policy_jointly:
            return self.policy(x, label)
        with torch.no_grad():
            return self.policy(x, label)

    def _dataset_rate(self) -> float:
        processor = self.dataset.input_processors[self.feature_key]
        rate = getattr(processor, "sampling_rate", None)
        if rate is None:
            raise ValueError(
                f"{type(processor).__name__} of input {self.feature_key!r} states no "
                "sampling rate; pass sampling_rate=... (hertz) to TaskAugResNet."
            )
        return rate
