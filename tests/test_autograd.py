"""The engine: recording, backward, grad, hooks, versions, memory."""

import gc
import threading
import weakref

import numpy as np
import pytest

import nbgrad
from nbgrad import Tensor, as_tensor, enable_grad, grad, no_grad, set_grad_enabled, tensor
from nbgrad.autograd import OPS, Op, op


def leaf(values, dtype=np.float64):
    return tensor(np.asarray(values, dtype), requires_grad=True)


def values(t):
    return t.detach().numpy()


# ----------------------------------------------------------------------------------------- backward

def test_gradient_of_a_polynomial():
    x = leaf([1.0, -2.0, 3.0])
    (x * x * x - 2 * x).sum().backward()
    np.testing.assert_array_equal(values(x.grad), 3 * values(x) ** 2 - 2)


def test_a_value_used_twice_gets_both_gradients():
    x = leaf(3.0)
    y = x * 2
    (y * y + y).backward()
    assert x.grad.item() == 2 * (2 * 6.0 + 1)


def test_backward_accumulates_into_leaves():
    x = leaf([1.0, 2.0])
    for _ in range(3):
        (x * x).sum().backward()
    np.testing.assert_array_equal(values(x.grad), 3 * 2 * values(x))


def test_gradients_of_two_leaves_of_a_sum_share_no_memory():
    a, b = leaf([1.0, 2.0]), leaf([3.0, 4.0])
    (a + b).backward(tensor([1.0, 1.0]))
    a.grad.mul_(10)
    np.testing.assert_array_equal(values(b.grad), [1, 1])


def test_gradient_of_a_sum_can_be_scaled_in_place():
    x = leaf([1.0, 2.0])
    x.sum().backward()
    x.grad.mul_(2)
    np.testing.assert_array_equal(values(x.grad), [2, 2])


def test_the_gradient_that_a_user_passes_is_not_kept():
    x, dy = leaf([1.0, 2.0]), tensor(np.array([3.0, 4.0]))
    x.backward(dy)
    x.grad.zero_()
    np.testing.assert_array_equal(dy.numpy(), [3, 4])


def test_broadcast_inputs_get_gradients_of_their_own_shape():
    a, b, c = leaf(np.ones((2, 3))), leaf(np.ones(3)), leaf(np.ones((2, 1)))
    (a * b + c).sum().backward()
    assert a.grad.shape == (2, 3)
    np.testing.assert_array_equal(values(b.grad), [2, 2, 2])
    np.testing.assert_array_equal(values(c.grad), [[3], [3]])


def test_backward_of_a_non_scalar_needs_a_gradient():
    with pytest.raises(RuntimeError, match="only for scalar outputs, got shape"):
        (leaf([1.0, 2.0]) * 2).backward()
    with pytest.raises(RuntimeError, match="mismatch in shape"):
        (leaf([1.0, 2.0]) * 2).backward(tensor([1.0]))


def test_backward_of_what_needs_no_gradient_raises():
    with pytest.raises(RuntimeError, match="does not require grad"):
        tensor(1.0).backward()


def test_second_backward_raises_and_retain_graph_allows_it():
    x = leaf(2.0)
    y = x * x
    y.backward(retain_graph=True)
    y.backward()
    assert x.grad.item() == 8
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()
    assert x.grad.item() == 8


@pytest.mark.parametrize("n", [10_000, 200_000])
def test_a_long_chain_neither_recurses_backward_nor_when_freed(n):
    x = leaf([1.0])
    y = x
    for _ in range(n):
        y = y + 1
    y.backward(tensor(np.ones(1)))
    assert x.grad.item() == 1
    del y
    gc.collect()


def test_a_diamond_of_depth_60_is_visited_once_per_node():
    x = leaf(1.0)
    y = x
    for _ in range(60):        # 2^60 paths
        y = y + y
    y.backward()
    assert x.grad.item() == 2.0 ** 60


# --------------------------------------------------------------------------------------------- grad

def test_grad_returns_and_leaves_no_trace():
    x, w = leaf([1.0, 2.0]), leaf([3.0, 4.0])
    dx, = grad((x * w).sum(), x)
    np.testing.assert_array_equal(values(dx), values(w))
    assert x.grad is None
    assert w.grad is None


def test_grad_takes_an_array_for_one_output():
    x = nbgrad.tensor([1.0, 2.0], requires_grad=True)
    (dx,) = nbgrad.grad(x * x, x, np.float32([3.0, 5.0]))
    assert dx.tolist() == [6.0, 20.0]


def test_grad_of_an_interior_tensor():
    x = leaf(3.0)
    y = x * x
    dy, dx = grad(y * y, (y, x))
    assert (dy.item(), dx.item()) == (2 * 9.0, 4 * 27.0)


def test_grad_with_several_outputs_and_cotangents():
    x = leaf([1.0, 2.0])
    dx, = grad([x * 2, x * x], x, [tensor([1.0, 1.0]), tensor([10.0, 100.0])])
    np.testing.assert_array_equal(values(dx), [2 + 20, 2 + 400])


def test_grad_of_an_unused_input():
    x, z = leaf(1.0), leaf(1.0)
    with pytest.raises(RuntimeError, match="allow_unused"):
        grad(x * 2, (x, z))
    assert grad(x * 2, (x, z), allow_unused=True)[1] is None
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad(x * 2, tensor(1.0))


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_derivatives_of_every_order(order):
    x = leaf(0.7)
    y = nbgrad.sin(x) * nbgrad.exp(2 * x)
    for _ in range(order):
        y, = grad(y, x, create_graph=True)
    expected = ((2 + 1j) ** order * np.exp((2 + 1j) * 0.7)).imag
    assert y.item() == pytest.approx(expected, rel=1e-12)


def test_hessian_vector_product_through_batch_norm_matches_finite_differences():
    rng = np.random.default_rng(0)
    x, w = as_tensor(rng.standard_normal((5, 4))), leaf(rng.standard_normal((3, 4)))
    v = rng.standard_normal((3, 4))

    def slope(at):
        at = leaf(at)
        y = nbgrad.batch_norm(x @ at.T, None, None, None, None, True)
        return grad((y ** 3).sum(), at)[0].numpy()

    y = nbgrad.batch_norm(x @ w.T, None, None, None, None, True)
    dw, = grad((y ** 3).sum(), w, create_graph=True)
    hv, = grad((dw * as_tensor(v)).sum(), w)
    h = 1e-6
    expected = (slope(values(w) + h * v) - slope(values(w) - h * v)) / (2 * h)
    np.testing.assert_allclose(hv.numpy(), expected, rtol=1e-6, atol=1e-6)


def test_backward_with_create_graph_gives_differentiable_grads():
    x = leaf([2.0, 3.0])
    (x ** 3).sum().backward(create_graph=True)
    (x.grad ** 2).sum().backward()
    # x.grad is now 3x² + d/dx (3x²)² = 3x² + 36x³
    np.testing.assert_allclose(values(x.grad), 3 * np.array([4, 9]) + 36 * np.array([8, 27]))


def test_a_fused_gradient_does_not_enter_the_history_of_its_inputs_twice():
    """dy of the second norm depends on x too: only the partial derivative may be taken there."""
    rng = np.random.default_rng(1)
    x = leaf(rng.standard_normal((4, 3)))

    def f(x):
        y = nbgrad.batch_norm(x, None, None, None, None, True)
        return nbgrad.batch_norm(y * x, None, None, None, None, True).tanh()
    assert nbgrad.testing.gradcheck(f, x, order=2)


# ---------------------------------------------------------------------------------------- recording

def test_no_grad_records_nothing_and_nests():
    x = leaf(1.0)
    with no_grad():
        assert not (x * 2).requires_grad
        with enable_grad():
            assert (x * 2).requires_grad
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad


def test_no_grad_as_a_decorator_and_after_an_exception():
    @no_grad()
    def f(x):
        if x is None:
            raise KeyError
        return x * 2
    assert not f(leaf(1.0)).requires_grad
    with pytest.raises(KeyError):
        f(None)
    assert nbgrad.is_grad_enabled()


def test_set_grad_enabled_is_a_function_and_a_context_manager():
    x = leaf(1.0)
    with set_grad_enabled(False):
        assert not (x * 2).requires_grad
    set_grad_enabled(False)
    try:
        assert not (x * 2).requires_grad
    finally:
        set_grad_enabled(True)
    assert (x * 2).requires_grad


def test_recording_is_a_setting_of_the_thread():
    seen = []
    with no_grad():
        t = threading.Thread(target=lambda: seen.append(nbgrad.is_grad_enabled()))
        t.start()
        t.join()
    assert seen == [True]


def test_detach_shares_memory_and_cuts_the_graph():
    x = leaf([1.0, 2.0])
    y = (x * 2).detach()
    assert not y.requires_grad
    assert np.shares_memory(x.detach().data, x.data)
    z = (x * y).sum()
    z.backward()
    np.testing.assert_array_equal(values(x.grad), y.numpy())


def test_integers_and_comparisons_are_not_recorded():
    x = leaf([1.0, -2.0])
    assert not (x > 0).requires_grad
    assert not x.argmax().requires_grad
    assert not x.long().requires_grad
    with pytest.raises(RuntimeError, match="floating point"):
        tensor([1]).requires_grad_()


# ------------------------------------------------------------------------------- hooks, retain_grad

def test_hooks_see_and_replace_gradients():
    x = leaf([1.0, 2.0])
    seen = []
    handle = x.register_hook(lambda dy: seen.append(dy.tolist()))
    y = x * 3
    y.register_hook(lambda dy: dy * 10)
    y.sum().backward()
    assert seen == [[30.0, 30.0]]
    handle.remove()
    (x * 1).sum().backward()
    assert len(seen) == 1
    np.testing.assert_array_equal(values(x.grad), [31, 31])


def test_retain_grad_keeps_an_interior_gradient():
    x = leaf(2.0)
    y = x * x
    y.retain_grad()
    y.retain_grad()
    (y * 3).backward()
    assert y.grad.item() == 3
    assert x.grad.item() == 12


def test_interior_tensors_get_no_grad_unless_asked():
    x = leaf(2.0)
    y = x * x
    y.backward()
    assert y.grad is None


# ------------------------------------------------------------------------------- in-place, versions

def test_a_saved_tensor_modified_in_place_raises_at_backward():
    x = leaf([1.0, 2.0])
    w = tensor(np.array([3.0, 4.0]))
    y = (x * w).sum()
    w.add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*saved by mul"):
        y.backward()


def test_a_saved_output_modified_in_place_raises_at_backward():
    x = leaf([1.0, 2.0])
    y = nbgrad.exp(x)
    y.add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*saved by exp"):
        y.sum().backward()


def test_a_view_of_a_saved_tensor_modified_in_place_raises():
    x = leaf([1.0, 2.0])
    w = tensor(np.array([3.0, 4.0]))
    view = w[1:]
    y = (x * w).sum()
    view.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_modifying_what_no_gradient_needs_is_fine():
    x, w = leaf([1.0, 2.0]), tensor(np.array([3.0, 4.0]))
    y = (x + w).sum()
    w.zero_()
    y.backward()
    np.testing.assert_array_equal(values(x.grad), [1, 1])


def test_in_place_on_a_leaf_raises_and_under_no_grad_works():
    x = leaf([1.0, 2.0])
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        x.add_(1)
    with no_grad():
        x.add_(1)
    np.testing.assert_array_equal(values(x), [2, 3])


def test_in_place_on_an_interior_tensor_is_recorded():
    x = leaf([1.0, 2.0])
    y = x * 2
    y.add_(x)
    y.mul_(3)
    y[0] = x[1] * 5
    y.sum().backward()
    np.testing.assert_array_equal(values(x.grad), [0, 9 + 5])


def test_in_place_on_a_view_that_needs_grad_raises():
    y = leaf([1.0, 2.0]) * 2
    with pytest.raises(RuntimeError, match="shares memory with a view"):
        y[:1].add_(1)
    with pytest.raises(RuntimeError, match="read-only"):
        tensor([1.0]).expand(3).add_(1)


def test_optimizer_step_between_forward_and_backward_raises():
    w, x = leaf([[1.0]]), tensor([[2.0]], dtype=np.float64, requires_grad=True)
    loss = nbgrad.linear(x, w).sum()
    with no_grad():
        w.sub_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ------------------------------------------------------------------------------------------- memory

def test_the_graph_keeps_only_what_its_vjps_mention():
    x = leaf(np.ones(1000))
    big = x * 1
    alive = weakref.ref(big)
    y = (big + 1).sum()          # neither + nor sum needs its input
    del big
    assert alive() is None
    y.backward()
    np.testing.assert_array_equal(values(x.grad), np.ones(1000))


def test_a_factor_that_needs_no_gradient_keeps_nothing_of_the_other():
    x, c = leaf([1.0, 2.0]), tensor(np.array([3.0, 4.0]))
    y = x * c
    names = {name for name, _ in nbgrad.graph.saved(y.grad_fn)}
    assert names == {"b"}


def test_backward_frees_what_was_saved():
    x = leaf([1.0, 2.0])
    factor = x * 2
    alive = weakref.ref(factor)
    y = (factor * factor).sum()
    del factor
    assert alive() is not None
    y.backward()
    assert alive() is None


def test_a_training_loop_leaves_nothing_behind():
    x = leaf(np.ones((4, 4)))
    gc.collect()
    gc.disable()                  # reference counts alone must do: no cycles in graphs
    try:
        before = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
        for _ in range(20):
            y = nbgrad.softmax(nbgrad.batch_norm(x @ x, None, None, None, None, True).exp(), 1)
            grad(y.sum(), x)
        del y
        after = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
    finally:
        gc.enable()
    assert after == before


# ---------------------------------------------------------------------------------------------- ops

def test_a_custom_op_is_recorded_registered_and_differentiable_twice():
    @op(method=False)
    def cube(x, /):
        """y = x³.   ∂x = 3 ∂y x²."""
        return x.data ** 3, (lambda dy: dy * (x * x * 3),)
    try:
        assert OPS["cube"] is cube
        assert nbgrad.testing.gradcheck(cube, leaf([1.0, -2.0]), order=3)
        with pytest.raises(ValueError, match="already an op called 'cube'"):
            Op(cube.fn)
    finally:
        del OPS["cube"]


def test_ops_bind_optional_tensors_and_settings_like_functions():
    x, w, b = leaf(np.ones((1, 2, 3, 3))), leaf(np.ones((4, 2, 1, 1))), leaf(np.arange(4.0))
    a = nbgrad.conv2d(x, w, b, 2)
    np.testing.assert_array_equal(values(a), values(nbgrad.conv2d(x, weight=w, bias=b, stride=2)))
    assert a.shape == (1, 4, 2, 2)
    np.testing.assert_array_equal(values(a)[0, :, 0, 0], 2 + np.arange(4.0))
    with pytest.raises(TypeError, match=r"missing .*'weight'"):
        nbgrad.conv2d(x)
    with pytest.raises(TypeError, match=r"conv2d\(\) takes"):
        nbgrad.conv2d(x, w, b, 1, 1, 1, 1, 1)


def test_what_is_no_tensor_is_refused_by_name():
    with pytest.raises(TypeError, match="add: expected a Tensor, an array or a number, got str"):
        nbgrad.add(tensor(1.0), "1")
    with pytest.raises(TypeError):
        tensor(1.0) + "1"
    with pytest.raises(TypeError):
        tensor(1.0) + object()


def test_errors_in_a_forward_leave_the_mode_alone():
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        leaf(np.ones((2, 3))) @ leaf(np.ones((2, 3)))
    assert nbgrad.is_grad_enabled()


def test_errors_in_a_hook_restore_the_mode_and_leave_grads_unset():
    x = leaf(1.0)
    y = x * 2

    def hook(dy):
        raise KeyError("stop")
    y.register_hook(hook)
    with pytest.raises(KeyError):
        (y * 2).backward()
    assert nbgrad.is_grad_enabled()
    assert x.grad is None


def test_an_error_in_the_hook_of_a_leaf_leaves_every_grad_as_it_was():
    x, w = leaf(1.0), leaf(2.0)

    def hook(dy):
        raise KeyError("stop")
    handle = w.register_hook(hook)
    with pytest.raises(KeyError):
        (x * w).backward()
    assert nbgrad.is_grad_enabled()
    assert x.grad is w.grad is None
    handle.remove()
    (x * w).backward()
    assert (x.grad.item(), w.grad.item()) == (2, 1)


def test_an_unneeded_branch_whose_graph_is_gone_does_not_matter():
    """grad goes only where an input can be reached; the other branch has been used up before."""
    x, w = leaf(3.0), leaf(2.0)
    gone = w * w
    gone.backward()
    y = x * x
    assert [d.item() for d in grad(y * gone, (x, y))] == [2 * 3 * 4, 4]
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        (x * gone).backward()


def test_an_error_deep_in_the_graph_leaves_every_grad_as_it_was():
    x, w, late = leaf([1.0, 2.0]), tensor(np.array([3.0, 4.0])), leaf([5.0, 6.0])
    y = (x * w + late).sum()
    w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    assert x.grad is None
    assert late.grad is None


# ----------------------------------------------------------------------------- found by users' eyes

@pytest.mark.parametrize(("answer", "said"), [
    (lambda dy: nbgrad.ones(5, dtype=np.float64), r"float64 of shape \(5,\)"),
    (lambda dy: dy.float(), "float32"), (lambda dy: "no", "str"),
    (lambda dy: dy.sum(), r"float64 of shape \(\)")])
@pytest.mark.parametrize("interior", [False, True])
def test_a_hook_that_returns_something_else_raises(answer, said, interior):
    x = leaf([1.0, 2.0])
    y = x * x
    (y if interior else x).register_hook(answer)
    with pytest.raises(RuntimeError, match=f"a hook on .* returned {said}"):
        y.sum().backward()
    assert x.grad is None


def test_grad_of_an_interior_tensor_leaves_its_own_history_alone():
    x = leaf([1.0, 2.0])
    h = x.exp()
    dh, = grad((h * h).sum(), h)
    np.testing.assert_array_equal(values(dh), 2 * values(h))
    h.sum().backward()
    np.testing.assert_allclose(values(x.grad), np.exp([1.0, 2.0]))


def test_retain_grad_follows_an_in_place_write():
    x = leaf([1.0, 2.0])
    y = x * 2
    y.retain_grad()
    y.mul_(3)
    y.sum().backward()
    np.testing.assert_array_equal(values(y.grad), [1, 1])
    np.testing.assert_array_equal(values(x.grad), [6, 6])


def test_set_grad_enabled_decorates():
    @set_grad_enabled(False)
    def f(x):
        return x * 2
    assert nbgrad.is_grad_enabled()
    assert not f(leaf(1.0)).requires_grad
    assert not f(leaf(1.0)).requires_grad
    assert nbgrad.is_grad_enabled()


def test_no_grad_on_a_generator_function_holds_within_its_steps_only():
    @no_grad()
    def steps(x):
        for _ in range(2):
            yield x * 2
    for y in steps(leaf(1.0)):
        assert not y.requires_grad
        assert nbgrad.is_grad_enabled()


def test_backward_to_chosen_inputs():
    x, w = leaf([1.0, 2.0]), leaf([3.0, 4.0])
    (x * w).sum().backward(inputs=[x])
    np.testing.assert_array_equal(values(x.grad), values(w))
    assert w.grad is None


def test_a_view_that_is_gone_does_not_hinder_in_place_writes():
    b = nbgrad.zeros(2, 3, dtype=np.float64)
    b.detach()
    x = leaf([1.0, 2.0, 3.0])
    b.add_(x)
    y = (x * 1).reshape(1, 3)
    y.add_(1)
    (b.sum() + y.sum()).backward()
    np.testing.assert_array_equal(values(x.grad), [3, 3, 3])
    view = b[0]
    with pytest.raises(RuntimeError, match="shares memory with a view"):
        b.add_(x)
    assert view.shape == (3,)


def test_pytorchs_names_of_tensor_arguments():
    x = leaf([[1.0, 2.0]])
    np.testing.assert_array_equal(values(nbgrad.add(input=x, other=x)), [[2, 4]])
    np.testing.assert_array_equal(values(nbgrad.sum(input=x)), 3)
    np.testing.assert_array_equal(values(nbgrad.linear(input=x, weight=x)), [[5]])


def test_devices_and_dtypes_of_to():
    x = leaf([1.0])
    assert x.to("cpu") is x.to(device="cpu") is x.cpu() is x
    assert x.to("cpu", np.float32).dtype == x.to("float32").dtype == np.float32
    with pytest.raises(RuntimeError, match=r"device 'cuda' (needs cupy|is not there)"):
        x.to("cuda")
    with pytest.raises(RuntimeError, match=r"device 'cuda' (needs cupy|is not there)"):
        tensor([1.0], device="cuda")


def test_data_that_is_a_tensor_is_refused_where_it_is_used():
    w = leaf([1.0])
    w.data = tensor([2.0])
    with pytest.raises(TypeError, match=r"Tensor\.data must be a NumPy array, got Tensor"):
        w * 2
    p = leaf([1.0, 2.0])
    p.data -= 0.5 * tensor(np.array([1.0, 1.0]))
    np.testing.assert_array_equal(values(p), [0.5, 1.5])
    assert f"{tensor(1.5):.2f}" == "1.50"


def test_dead_views_are_forgotten():
    x = nbgrad.zeros(10)
    for i in range(10_000):
        x[i % 10]
    assert len(x._version) < 50


def test_a_copied_constant_cuts_the_history():
    a = leaf([1.0, 2.0])
    x = a * 2
    x.copy_(tensor(np.array([5.0, 6.0])))
    assert not x.requires_grad
    y = (x * a).sum()
    y.backward()
    np.testing.assert_array_equal(values(a.grad), [5, 6])


def test_clamp_in_place_is_recorded():
    a = leaf([1.0, 5.0])
    x = a * 2
    x.clamp_(0, 4)
    x.sum().backward()
    np.testing.assert_array_equal(values(x), [2, 4])
    np.testing.assert_array_equal(values(a.grad), [2, 0])


def test_none_is_no_tensor():
    for name in ("exp", "sum", "relu", "matmul"):
        with pytest.raises(TypeError, match="None"):
            getattr(nbgrad, name)(None, *[leaf([1.0])] * (name == "matmul"))
