"""The (1, k) convolution against torch's Conv1d: values, derivatives, state, memory."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from pyhealth.models.resnet_1d import _BasicBlock, _ResNet1D
from pyhealth.models.temporal_convolution import TemporalConv, signal_layout


@pytest.fixture(params=["AVX2", "AVX512"])
def capability(request, monkeypatch):
    """Either processor, since each has a memory layout of its own."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return request.param


def conv1d_of(module):
    """The same network of torch's own one-dimensional layers, built from scratch."""

    class Block(nn.Module):
        def __init__(self, block):
            super().__init__()
            for name, child in block.named_children():
                setattr(self, name, conv1d_of(child))

        def forward(self, x):
            hidden = self.relu(self.norm1(self.conv1(x)))
            return self.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))

    if isinstance(module, TemporalConv):
        sizes = module.in_channels, module.out_channels, module.kernel_size[0]
        return nn.Conv1d(
            *sizes, stride=module.stride[0], padding=sizes[2] // 2, bias=False
        )
    if isinstance(module, nn.BatchNorm2d):
        return nn.BatchNorm1d(module.num_features)
    if isinstance(module, nn.MaxPool2d):
        return nn.MaxPool1d(3, stride=2, padding=1)
    if isinstance(module, _BasicBlock):
        return Block(module)
    if isinstance(module, nn.Sequential):
        return nn.Sequential(*(conv1d_of(child) for child in module))
    return deepcopy(module)


class Plain(nn.Module):
    def __init__(self, network):
        super().__init__()
        for name in ("stem", "blocks", "head"):
            setattr(self, name, conv1d_of(getattr(network, name)))

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean(dim=-1))


def test_network_equals_one_of_conv1d_and_loads_both_ways(capability):
    torch.manual_seed(0)
    network = _ResNet1D(12, 2, base_width=8, blocks=(1, 1))
    plain = Plain(network)
    plain.load_state_dict(network.state_dict())
    other = _ResNet1D(12, 2, base_width=8, blocks=(1, 1))
    other.load_state_dict(plain.state_dict())
    x = torch.randn(4, 12, 301)

    for training in (True, False):  # the first also moves the running statistics
        results = [model.train(training)(x) for model in (network, plain, other)]
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(results[2], results[1], rtol=1e-5, atol=1e-5)
        for model, result in zip((network, plain), results, strict=False):
            model.zero_grad()
            result.square().sum().backward()
    for (name, mine), theirs in zip(
        network.named_parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


class Kernels(TorchDispatchMode):
    """Collects the kernels that run, and the precisions of their first arguments."""

    def __init__(self):
        super().__init__()
        self.precisions = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        dtype = getattr(args[0], "dtype", None) if args else None
        self.precisions.setdefault(function.__name__, set()).add(dtype)
        return function(*args, **kwargs or {})


def forward_mode(network, x, tangents):
    params = dict(network.named_parameters())
    with torch.no_grad(), forward_ad.dual_level():
        moving = {
            name: forward_ad.make_dual(params[name], tangent)
            for name, tangent in tangents.items()
        }
        y, tangent = forward_ad.unpack_dual(functional_call(network, moving, (x,)))
        return y.clone(), tangent.clone()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("moved", ["", "conv", "norm", "weight", "bias"])
def test_forward_mode_is_that_of_torchs_own_layers(capability, moved, training):
    torch.manual_seed(0)
    network = _ResNet1D(5, 2, base_width=3, blocks=(1, 1)).double().train(training)
    for name, p in network.named_parameters():
        if "norm" in name:
            nn.init.normal_(p)  # no weight of 1, no bias of 0
    plain = Plain(network).double().train(training)
    plain.load_state_dict(network.state_dict())
    tangents = {
        name: torch.randn_like(p)
        for name, p in network.named_parameters()
        if moved in name
    }
    x = torch.randn(4, 5, 41, dtype=torch.float64)
    with Kernels() as seen:
        mine = forward_mode(network, x, tangents)
    assert ("native_batch_norm_backward.default" in seen.precisions) == training
    theirs = forward_mode(plain, x, tangents)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    assert mine[1].abs().min() > 1e-3
    for (name, own), other in zip(
        network.named_buffers(), plain.buffers(), strict=True
    ):
        torch.testing.assert_close(own, other, msg=name)


def test_memory_layout_outlives_copying_loading_and_optimising(capability):
    convolution = TemporalConv(6, 4, 3)

    def in_layout(weight):
        return weight.unsqueeze(2).is_contiguous(memory_format=signal_layout())

    assert in_layout(convolution.weight)
    copy = deepcopy(convolution)
    copy.load_state_dict(nn.Conv1d(6, 4, 3, bias=False).state_dict())
    optimizer = torch.optim.Adam(copy.parameters())
    copy(torch.randn(2, 6, 1, 9)).sum().backward()
    optimizer.step()

    assert in_layout(copy.weight)
    assert in_layout(optimizer.state[copy.weight]["exp_avg"])
    assert in_layout(copy.double().weight)


@pytest.mark.parametrize("stride, kernel, length", [(1, 3, 6), (2, 3, 7), (2, 1, 6)])
def test_derivatives_of_first_and_second_order(capability, stride, kernel, length):
    convolution = TemporalConv(2, 3, kernel, stride=stride).double()
    x = torch.randn(2, 2, 1, length, dtype=torch.float64, requires_grad=True)
    weight = convolution.weight.detach().clone().requires_grad_()

    def convolve(x, weight):
        return functional_call(convolution, {"weight": weight}, (x,))

    assert gradcheck(convolve, (x, weight), check_forward_ad=True)
    assert gradgradcheck(convolve, (x, weight), check_fwd_over_rev=True)


def test_derivative_in_the_signal_forms_no_gradient_of_the_weights(capability):
    """Three convolutions: the weights are given, so nobody needs their gradient."""
    convolution = TemporalConv(2, 3, 3)
    x = torch.randn(2, 2, 1, 8, requires_grad=True)
    loss = convolution(x).square().sum()
    (gradient,) = torch.autograd.grad(loss, convolution.weight, create_graph=True)

    with torch.profiler.profile() as profile:
        torch.autograd.grad(gradient, x, torch.ones_like(gradient))

    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::convolution"] == 1  # of the signal with the direction
    assert counts["aten::convolution_backward"] == 2  # to the signal, from each side


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
@pytest.mark.parametrize("supported", [False, True], ids=["avx2", "avx512_bf16"])
def test_without_a_16_bit_convolution_it_is_that_of_32_bit_rounded(
    supported, autocast, monkeypatch
):
    monkeypatch.setattr(
        torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported
    )
    torch.manual_seed(0)
    convolution = TemporalConv(4, 8, 3)
    given = convolution.weight.detach().bfloat16(), torch.randn(3, 4, 1, 50).bfloat16()

    def results(dtype, autocast):
        weight, x = (tensor.to(dtype).requires_grad_() for tensor in given)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = functional_call(convolution, {"weight": weight}, (x,))
        return y, *torch.autograd.grad(y, (x, weight), torch.ones_like(y))

    with Kernels() as seen:
        mine = results(torch.float32 if autocast else torch.bfloat16, autocast)
    precision = {torch.bfloat16 if supported else torch.float32}
    for function in ("convolution", "convolution_backward"):
        assert seen.precisions[f"{function}.default"] == precision
    assert mine[0].dtype is torch.bfloat16
    if not supported:
        for own, expected in zip(mine, results(torch.float32, False), strict=True):
            assert own.bfloat16().equal(expected.bfloat16())


ODD_BATCH = """\
import torch
from pyhealth.models.resnet_1d import _ResNet1D
torch.set_num_threads(2)
net = _ResNet1D(12, 1, base_width=8, kernel_size=7)
for _ in range(40):
    for records in (3, 31):
        net(torch.randn(records, 12, 1000)).sum().backward()
"""


@pytest.mark.slow
def test_an_odd_batch_on_two_threads_writes_nowhere_else():
    """In a process of its own: with AVX-512 the shortcuts' gradient crashed it."""
    command = [sys.executable, "-c", ODD_BATCH]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
