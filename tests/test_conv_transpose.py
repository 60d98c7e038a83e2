"""Transposed convolution by definition and as conv2d's adjoint; the sizes that a layer can give."""

import re

import numpy as np
import pytest

import nbgrad
from nbgrad import nn

rng = np.random.default_rng(0)


def normal(*shape):
    return nbgrad.tensor(rng.standard_normal(shape))


def scattered(x, w, s, d):
    """y[n, o, p·s + i·d, q·s + j·d] += x[n, c, p, q] w[c, o, i, j], without padding."""
    (N, C, H, W), (_, O, I, J) = x.shape, w.shape
    y = np.zeros((N, O, (H - 1) * s + d * (I - 1) + 1, (W - 1) * s + d * (J - 1) + 1))
    for n, c, p, q, o, i, j in np.ndindex(N, C, H, W, O, I, J):
        y[n, o, p * s + i * d, q * s + j * d] += x[n, c, p, q] * w[c, o, i, j]
    return y


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (3, 2), (1, 3)])
def test_is_its_definition(stride, dilation):
    x, w, b = normal(2, 3, 3, 2), normal(3, 2, 2, 3), normal(2)
    want = scattered(x.data, w.data, stride, dilation) + b.data.reshape(-1, 1, 1)
    y = nbgrad.conv_transpose2d(x, w, b, stride, dilation=dilation)
    np.testing.assert_allclose(y.data, want, rtol=1e-12, atol=1e-13)
    cut = nbgrad.conv_transpose2d(x, w, b, stride, 1, dilation=dilation)
    np.testing.assert_allclose(cut.data, want[:, :, 1:-1, 1:-1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("stride", "padding", "dilation", "more"), [
    (1, 0, 1, 0), (2, 1, 1, 1), (3, 1, 2, 2), (1, 2, 3, 2)])
def test_is_the_adjoint_of_convolution(groups, stride, padding, dilation, more):
    """⟨conv(u), x⟩ = ⟨u, conv_transpose(x)⟩ for u of y's size; rows of a convolution beyond x's
    end, which an output_padding from stride on brings, do not count."""
    x, w = normal(2, 4, 5, 4), normal(4, 8 // groups, 3, 2)
    y = nbgrad.conv_transpose2d(x, w, None, stride, padding, more, groups, dilation)
    u = normal(*y.shape)
    v = nbgrad.conv2d(u, w, None, stride, padding, dilation, groups)[:, :, :5, :4]
    assert (v * x).sum().item() == pytest.approx((u * y).sum().item(), rel=1e-10)


def test_one_dimension_is_two_of_which_one_is_1():
    x, w, b = normal(2, 4, 6), normal(4, 3, 3), normal(6)
    y = nbgrad.conv_transpose1d(x, w, b, 2, 1, 1, 2)
    plane = nbgrad.conv_transpose2d(x.unsqueeze(2), w.unsqueeze(2), b, (1, 2), (0, 1), (0, 1), 2)
    np.testing.assert_array_equal(y.data, plane.data[:, :, 0])
    assert y.shape == (2, 6, 12)
    v, c = normal(6, 2, 3), normal(6)
    for padding in (1, "same", "valid"):
        two = padding if isinstance(padding, str) else (0, padding)
        y = nbgrad.conv1d(x, v, c, 1, padding, 2, 2)
        plane = nbgrad.conv2d(x.unsqueeze(2), v.unsqueeze(2), c, 1, two, (1, 2), 2)
        np.testing.assert_array_equal(y.data, plane.data[:, :, 0])


def test_memory_is_channels_last_and_an_empty_batch_stays_one():
    y = nbgrad.conv_transpose2d(nbgrad.randn(2, 3, 4, 4), nbgrad.randn(3, 5, 2, 2))
    assert y.data.transpose(0, 2, 3, 1).flags.c_contiguous
    empty = nbgrad.conv_transpose2d(nbgrad.zeros(0, 3, 4, 4), nbgrad.randn(3, 5, 2, 2), stride=2)
    assert empty.shape == (0, 5, 8, 8)


@pytest.mark.parametrize(("layer", "shape", "sizes"), [
    (lambda lib: lib.ConvTranspose2d(4, 6, 3, 2), (2, 4, 5, 6), [
        (11, 13), (12, 14), [11, 14], (2, 6, 12, 13)]),
    (lambda lib: lib.ConvTranspose2d(4, 6, 3, 2), (4, 5, 6), [(12, 14), (6, 12, 13)]),
    (lambda lib: lib.ConvTranspose1d(4, 6, 3, 3, 1), (2, 4, 5), [(13,), (15,), (2, 6, 14)])])
def test_output_size_chooses_the_output_padding(layer, shape, sizes):
    torch = pytest.importorskip("torch")
    ours, theirs = layer(nn), layer(torch.nn)
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    x = rng.standard_normal(shape).astype(np.float32)
    for size in sizes:
        y, want = ours(nbgrad.tensor(x), size), theirs(torch.tensor(x), size)
        assert y.shape[-len(size):] == tuple(size)
        np.testing.assert_allclose(y.detach().numpy(), want.detach().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "said"), [
    ((3,), "for 4D input, output_size must have 2 or 4 elements (got 1)"),
    ((10, 13), "of (10, 13), but valid sizes range from (11, 13) to (12, 14) (for an input of (5,"),
    ((12, 15), "requested an output size of (12, 15)")])
def test_sizes_that_no_output_padding_gives(size, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        nn.ConvTranspose2d(4, 6, 3, 2)(nbgrad.zeros(2, 4, 5, 6), size)


@pytest.mark.parametrize(("build", "said"), [
    (lambda: nn.ConvTranspose2d(4, 6, 3, padding="same"),
     "ConvTranspose2d: padding must be an int or two ints, at least 0, got 'same'"),
    (lambda: nn.ConvTranspose2d(4, 6, 3, output_padding=-1), "output_padding must be an int or"),
    (lambda: nn.ConvTranspose2d(4, 6, 3, groups=3), "in_channels must be divisible by groups"),
    (lambda: nn.ConvTranspose2d(4, 6, 3, padding_mode="reflect"), "padding_mode must be 'zeros'"),
    (lambda: nn.Conv1d(4, 6, (3, 3)), "kernel_size must be an int or one, at least 1, got (3, 3)"),
    (lambda: nn.Conv1d(4, 6, 3, 2, "same"), "Conv1d: padding='same' is not supported")])
def test_bad_settings_raise(build, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        build()


def test_initial_weights_have_pytorchs_fan_in():
    """out_channels / groups · 9 = 108: uniform in ±1/√108, bias too."""
    nbgrad.manual_seed(0)
    layer = nn.ConvTranspose2d(40, 24, 3, groups=2)
    assert layer.weight.shape == (40, 12, 3, 3)
    for p in (layer.weight, layer.bias):
        top = np.abs(p.data).max()
        assert 0.8 / 108 ** 0.5 < top <= 1 / 108 ** 0.5     # the largest of 24 is below with 0.5 %


def test_spectral_norm_takes_the_outputs_axis():
    torch = pytest.importorskip("torch")
    ours = nn.utils.parametrizations.spectral_norm(nn.ConvTranspose2d(4, 6, 3))
    theirs = torch.nn.utils.parametrizations.spectral_norm(torch.nn.ConvTranspose2d(4, 6, 3))
    assert ({k: v.shape for k, v in ours.state_dict().items()}
            == {k: tuple(v.shape) for k, v in theirs.state_dict().items()})


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("layer", "norm", "shape"), [
    ("ConvTranspose2d", nn.BatchNorm2d, (3, 4, 3, 3)), ("Conv1d", nn.BatchNorm1d, (3, 4, 5)),
    ("ConvTranspose1d", nn.BatchNorm1d, (3, 4, 5))])
def test_batch_norm_folds_into_it(layer, norm, shape, groups):
    model = nn.Sequential(getattr(nn, layer)(4, 6, 3, 2, groups=groups), norm(6)).double()
    x = normal(*shape)
    model(x)
    model.eval()
    model[1].weight.data[...] = rng.standard_normal(6)
    model[1].bias.data[...] = rng.standard_normal(6)
    for folded in (nn.fold(model, x), nn.fold(model, x)._replace(model=nn.fuse(model))):
        assert (folded.layers, folded.left) == (("1",), ())
        assert folded.deviation < 1e-12
        np.testing.assert_allclose(folded.model(x).data, model(x).data, rtol=1e-10, atol=1e-12)
        assert type(folded.model[1]) is nn.Identity


def test_a_norm_that_takes_positions_for_channels_is_not_folded():
    """A single (C, L) is a batch of C for batch norm."""
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3)).eval()
    assert nn.fold(model, nbgrad.randn(2, 3)).left == ("1",)
