"""The gradient checker: what it passes, what it refuses, and why."""

import numpy as np
import pytest

import nbgrad
from nbgrad import nn
from nbgrad.autograd import OPS, op
from nbgrad.testing import GradcheckError, gradcheck, gradgradcheck


def real(*shape):
    return nbgrad.randn(*shape, dtype=np.float64, requires_grad=True, generator=nbgrad.Generator(5))


@pytest.fixture
def wrong():
    """x² whose second derivative is wrong; its first is right."""
    @op(name="wrong_square", method=False)
    def square(x, /):
        two_x = nbgrad.as_tensor(2 * x.data)           # a constant where x should be
        return x.data ** 2, (lambda dy: dy * two_x,)
    yield square
    del OPS["wrong_square"]


@pytest.mark.parametrize("mode", ["full", "fast"])
def test_right_gradients_pass_at_every_order(mode):
    assert gradcheck(lambda x, y: (x * y).exp() / (x * x + 1), (real(3), real(3)), order=3,
                     mode=mode)


def test_a_wrong_second_derivative_fails_at_order_two_only(wrong):
    assert gradcheck(wrong, real(3))
    with pytest.raises(GradcheckError, match="order 2: gradient of input 0"):
        gradgradcheck(wrong, real(3))
    assert gradcheck(wrong, real(3), order=2, raise_exception=False) is False


def test_a_tiny_wrong_gradient_fails():
    """Values of 1e-5 are below any absolute tolerance; the tolerance here is relative to the
    gradient."""
    @op(name="tiny", method=False)
    def tiny(x, /):
        return x.data * 1e-5, (lambda dy: dy * 1.1e-5,)
    try:
        with pytest.raises(GradcheckError, match="differs from finite differences"):
            gradcheck(tiny, real(3))
    finally:
        del OPS["tiny"]


def test_the_sum_of_a_normalised_tensor_is_refused_with_the_reason():
    def f(x):
        return nbgrad.batch_norm(x, None, None, None, None, True).sum()
    with pytest.raises(GradcheckError, match=r"vacuous.*sums a normalised tensor"):
        gradcheck(f, real(5, 3))
    assert gradcheck(lambda x: nbgrad.batch_norm(x, None, None, None, None, True), real(5, 3))
    assert gradcheck(f, real(5, 3), allow_zero=True)


def test_a_bias_before_batch_norm_is_reported_as_zero():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    with pytest.raises(GradcheckError, match=r"zero everywhere"):
        gradcheck(model, real(6, 3))


def test_a_function_that_is_not_deterministic_is_refused():
    generator = nbgrad.Generator(0)
    with pytest.raises(GradcheckError, match="not deterministic"):
        gradcheck(lambda x: nbgrad.dropout(x, 0.5, generator=generator), real(20))


def test_a_module_is_checked_with_its_parameters_and_keeps_its_buffers():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh()).double()
    before = {k: v.numpy().copy() for k, v in model.named_buffers()}
    assert gradcheck(model, real(6, 3), order=2)
    for k, v in model.named_buffers():
        np.testing.assert_array_equal(v.numpy(), before[k])
    model[1].weight.register_hook(lambda dy: dy * 1.5)
    with pytest.raises(GradcheckError, match=r"parameter 1\.weight"):
        gradcheck(model, real(6, 3))


def test_inputs_come_back_unchanged():
    x = real(4)
    before = x.detach().numpy().copy()
    gradcheck(lambda x: x.exp(), x)
    gradcheck(lambda x: x.exp(), x, mode="fast")
    np.testing.assert_array_equal(x.detach().numpy(), before)


def test_wrong_calls_raise():
    with pytest.raises(TypeError, match="expected float64, got float32"):
        gradcheck(lambda x: x * 2, nbgrad.randn(3, requires_grad=True))
    with pytest.raises(ValueError, match="none of the inputs requires grad"):
        gradcheck(lambda x: x * 2, real(3).detach())
    with pytest.raises(ValueError, match="mode 'full' or 'fast'"):
        gradcheck(lambda x: x * 2, real(3), mode="quick")
    with pytest.raises(GradcheckError, match="graph is cut"):
        gradcheck(lambda x: x.detach() * 2, real(3))


def test_inputs_come_back_unchanged_when_the_function_raises():
    x = real(4)
    before = x.detach().numpy().copy()

    def f(x):
        if not np.array_equal(x.data, before):
            raise KeyError("moved")
        return x.exp()
    for mode in ("full", "fast"):
        with pytest.raises(KeyError):
            gradcheck(f, x, mode=mode)
        np.testing.assert_array_equal(x.detach().numpy(), before)


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_the_verdict_does_not_depend_on_the_scale(scale):
    @op(name="scaled", method=False)
    def scaled(x, /):
        return x.data * scale, (lambda dy: dy * (-3 * scale),)
    try:
        with pytest.raises(GradcheckError, match="differs from finite differences"):
            gradcheck(scaled, real(3))
        assert gradcheck(lambda x: x * scale, real(3))
    finally:
        del OPS["scaled"]


def test_an_unused_input_is_named():
    with pytest.raises(GradcheckError, match=r"input 1 of shape \(2,\) has no gradient"):
        gradcheck(lambda x, y: x * 2, (real(3), real(2)))


def test_a_vjp_of_the_wrong_shape_is_named():
    @op(name="crooked", method=False)
    def crooked(x, /):
        return x.data * 2, (lambda dy: nbgrad.ones(7, dtype=np.float64),)
    try:
        with pytest.raises(RuntimeError, match=r"crooked: its vjp returned .* of shape \(7,\)"):
            gradcheck(crooked, real(5, 3))
    finally:
        del OPS["crooked"]
