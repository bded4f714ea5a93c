"""GELU and squared ReLU against torch's own, and their gradients against finite differences."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from snakegpt import activations
from snakegpt.activations import gelu, squared_relu


def torch_gelu(x):
    return F.gelu(x, approximate="tanh")


@pytest.mark.parametrize("function", [gelu, squared_relu])
def test_gradients_are_those_of_finite_differences(function):
    x = torch.linspace(-6.05, 6.0, 97, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, x)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_gelu_is_torchs_however_it_is_cut(dtype, close, monkeypatch):
    monkeypatch.setattr(activations, "IN_CACHE", 1000)
    x = (4 * torch.randn(7, 431)).to(dtype).t()  # neither in one piece nor in whole ones
    found = []
    for function in (gelu, torch_gelu):
        mine = x.clone().requires_grad_()
        y = function(mine)
        found.append((y, *torch.autograd.grad(y, mine, torch.ones_like(y))))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=close, atol=close)


def test_gelu_of_large_numbers_is_finite_both_ways():
    x = torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4], requires_grad=True)
    gelu(x).sum().backward()
    assert gelu(x).tolist() == [0, 0, 0, 50, 1e4]
    assert x.grad.tolist() == [0, 0, 0.5, 1, 1]


def test_what_needs_no_gradient_gets_none():
    x = torch.randn(100)
    assert gelu(x).grad_fn is None
    torch.testing.assert_close(gelu(x), torch_gelu(x))


def test_a_compiler_sees_an_operation_of_torchs():
    compiled = torch.compile(gelu, backend="eager", fullgraph=True)
    x = torch.randn(100)
    torch.testing.assert_close(compiled(x), torch_gelu(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("given", "count"),
    [({}, "4000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_spin_for_a_short_while_unless_told_otherwise(given, count):
    rest = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import os, snakegpt; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**rest, **given},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == count
