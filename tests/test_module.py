"""Module: registration, traversal, state, modes, hooks, text."""

import copy

import numpy as np
import pytest

import nbgrad
from nbgrad import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 3)
        self.again = self.fc
        self.scale = nn.Parameter(np.full(3, 2.0, np.float32))
        self.register_buffer("count", nbgrad.tensor([5]))
        self.register_buffer("scratch", nbgrad.tensor([7.0]), persistent=False)
        self.register_parameter("nothing", None)

    def forward(self, x):
        return self.fc(x) * self.scale


def names(pairs):
    return [name for name, _ in pairs]


def test_assignment_registers_parameters_and_modules_once():
    block = Block()
    assert names(block.named_parameters()) == ["scale", "fc.weight", "fc.bias"]
    every = names(block.named_parameters(remove_duplicate=False))
    assert every == ["scale", "fc.weight", "fc.bias", "again.weight", "again.bias"]
    assert names(block.named_buffers()) == ["count", "scratch"]
    assert names(block.named_modules()) == ["", "fc"]
    assert names(block.named_children()) == ["fc"]
    assert len(list(block.parameters())) == 3
    assert len(list(block.parameters(recurse=False))) == 1


def test_state_dict_has_shared_names_and_no_transient_buffer():
    block = Block()
    state = block.state_dict()
    assert list(state) == ["scale", "count", "fc.weight", "fc.bias", "again.weight", "again.bias"]
    assert not state["scale"].requires_grad
    assert np.shares_memory(state["scale"].data, block.scale.data)
    assert block.state_dict(keep_vars=True)["scale"] is block.scale
    assert next(iter(block.state_dict(prefix="m."))) == "m.scale"


def test_reassigned_name_changes_its_kind():
    block = Block()
    block.scale = None
    assert names(block.named_parameters()) == ["fc.weight", "fc.bias"]
    block.scale = nn.ReLU()
    assert names(block.named_children()) == ["fc", "scale"]
    del block.scale
    assert names(block.named_children()) == ["fc"]
    assert not hasattr(block, "scale")


@pytest.mark.parametrize(("name", "value", "message"), [
    ("scale", np.ones(3), r"cannot assign 'ndarray' as parameter 'scale' \(nn.Parameter or None"),
    ("fc", 3, r"cannot assign 'int' as module 'fc' \(nn.Module or None"),
    ("count", [1], r"cannot assign 'list' as buffer 'count' \(Tensor or None"),
    ("scratch", [1], r"cannot assign 'list' as buffer 'scratch' \(Tensor or None"),
])
def test_assigning_another_type_to_a_registered_name_raises(name, value, message):
    block = Block()
    before = getattr(block, name)
    with pytest.raises(TypeError, match=message):
        setattr(block, name, value)
    assert getattr(block, name) is before


def test_bad_registrations_raise():
    class Early(nn.Module):
        def __init__(self):
            self.fc = nn.Linear(1, 1)

    with pytest.raises(AttributeError, match="cannot assign module before Module"):
        Early()
    block = Block()
    with pytest.raises(KeyError, match="module name can"):
        block.add_module("a.b", nn.ReLU())
    with pytest.raises(KeyError, match="buffer name can"):
        block.register_buffer("", None)
    with pytest.raises(KeyError, match="attribute 'forward' already exists"):
        block.register_parameter("forward", None)
    with pytest.raises(TypeError, match="parameter name should be a string"):
        block.register_parameter(3, None)
    with pytest.raises(TypeError, match="cannot assign 'Tensor' object to parameter 'p'"):
        block.register_parameter("p", nbgrad.tensor([1.0]))
    with pytest.raises(TypeError, match="floating point"):
        nn.Parameter(np.arange(3))


def test_get_submodule_and_parameter_by_dotted_name():
    model = nn.Sequential(Block())
    assert model.get_submodule("0.fc") is model[0].fc
    assert model.get_submodule("") is model
    assert model.get_parameter("0.fc.weight") is model[0].fc.weight
    with pytest.raises(AttributeError, match=r"Block has no attribute `conv`"):
        model.get_submodule("0.conv")
    with pytest.raises(AttributeError, match=r"`scale` is not an nn\.Module"):
        model.get_submodule("0.scale")
    with pytest.raises(AttributeError, match=r"`fc` is not an nn\.Parameter of Block"):
        model.get_parameter("0.fc")


def test_get_buffer_by_dotted_name():
    model = nn.Sequential(nn.BatchNorm1d(2))
    assert model.get_buffer("0.running_mean") is model[0].running_mean
    with pytest.raises(AttributeError, match=r"`weight` is not a buffer of BatchNorm1d"):
        model.get_buffer("0.weight")


def test_load_state_dict_copies_values_and_casts_dtypes():
    block = Block()
    fc, weight = block.fc, np.arange(6.0).reshape(3, 2)
    result = block.load_state_dict({
        "scale": np.ones(3), "count": np.int32([9]), "fc.weight": nbgrad.tensor(weight),
        "fc.bias": np.zeros(3), "again.weight": weight, "again.bias": np.zeros(3)})
    assert repr(result) == "<All keys matched successfully>"
    assert fc is block.fc
    assert fc.weight.dtype == np.float32
    np.testing.assert_array_equal(fc.weight.data, weight)
    assert block.count.tolist() == [9]
    weight[:] = -1
    assert fc.weight.data.max() == 5


def test_load_state_dict_lists_every_problem_and_changes_nothing():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {k: v.data.copy() for k, v in model.state_dict().items()}
    bad = {"0.weight": np.zeros((3, 2)), "0.bias": np.zeros(4), "1.bias": "text",
           "extra": np.zeros(1)}
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(bad)
    assert str(error.value).startswith(
        "Error(s) in loading state_dict for Sequential:\n"
        '\tMissing key(s) in state_dict: "1.weight". \n'
        '\tUnexpected key(s) in state_dict: "extra". \n'
        "\tsize mismatch for 0.bias: copying a param with shape (4,) from checkpoint, the shape in "
        "current model is (3,).\n"
        '\tWhile copying the parameter named "1.bias", expected a Tensor or an array')
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(bad, strict=False)
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(value.data, before[key])
    with pytest.raises(TypeError, match="dict-like"):
        model.load_state_dict([1])
    with pytest.raises(RuntimeError, match="dtype"):
        nn.Linear(1, 1, bias=False).load_state_dict({"weight": np.array([["a"]])})
    model[0].weight.data.flags.writeable = False
    with pytest.raises(RuntimeError, match=r'memory of "0\.weight" in the model is read-only'):
        model.load_state_dict({k: v + 1 for k, v in before.items()})
    np.testing.assert_array_equal(model[1].weight.data, before["1.weight"])


def test_load_state_dict_not_strict_reports_keys():
    layer = nn.Linear(2, 1)
    missing, unexpected = layer.load_state_dict({"bias": np.ones(1), "x": np.ones(1)}, strict=False)
    assert (missing, unexpected) == (["weight"], ["x"])
    assert layer.bias.tolist() == [1.0]


def test_loading_bumps_versions_so_that_a_stale_backward_raises():
    layer = nn.Linear(2, 1)
    x = nbgrad.tensor([[1.0, 2.0]], requires_grad=True)
    y = layer(x).sum()
    layer.load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_deepcopy_is_independent_and_keeps_sharing():
    block = Block()
    twin = copy.deepcopy(block)
    assert twin.fc is twin.again
    assert isinstance(twin.scale, nn.Parameter)
    assert twin.scale.requires_grad
    twin.scale.data[:] = 0
    assert block.scale.tolist() == [2.0, 2.0, 2.0]
    assert list(twin.state_dict()) == list(block.state_dict())


def test_conversion_moves_floats_gradients_and_keeps_identity():
    block = Block()
    scale = block.scale
    block(nbgrad.ones(4, 2)).sum().backward()
    assert block.double() is block
    assert block.scale is scale
    assert scale.dtype == scale.grad.dtype == block.scratch.dtype == np.float64
    assert block.count.dtype == np.int64
    assert block.float().fc.weight.dtype == np.float32
    assert block.to("cpu").to(nbgrad.float64).scale.dtype == np.float64
    with pytest.raises(TypeError, match="only accepts floating point"):
        block.to(np.int64)
    assert block.cpu() is block.to(device="cpu") is block
    assert block.to("cpu", nbgrad.float32).scale.dtype == np.float32
    assert block.to(dtype="float64").scale.dtype == np.float64
    for settings in ({"device": "cuda"}, {"device": "cuda:0", "dtype": np.float32}):
        with pytest.raises(RuntimeError, match=r"device 'cuda(:0)?' (needs|is not there)"):
            block.to(**settings)
    with pytest.raises(RuntimeError, match=r"device 'cuda(:0)?' (needs|is not there)"):
        block.to("cuda")
    assert block.scale.dtype == np.float64


def test_modes_freezing_and_zero_grad_reach_everything():
    model = nn.Sequential(Block(), nn.Dropout())
    model.eval()
    assert not any(m.training for m in model.modules())
    model.train()
    assert all(m.training for m in model.modules())
    with pytest.raises(ValueError, match="training mode is expected to be boolean"):
        model.train(1)
    model(nbgrad.ones(1, 2)).sum().backward()
    model.zero_grad(set_to_none=False)
    assert model[0].scale.grad.tolist() == [0.0] * 3
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert not any(p.requires_grad for p in model.requires_grad_(False).parameters())


def test_apply_visits_children_first():
    seen = []
    model = nn.Sequential(nn.Sequential(nn.ReLU()), nn.Tanh())
    assert model.apply(lambda m: seen.append(type(m).__name__)) is model
    assert seen == ["ReLU", "Sequential", "Tanh", "Sequential"]


def test_forward_hooks_see_and_replace_values():
    layer, log = nn.Identity(), []
    first = layer.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    layer.register_forward_pre_hook(lambda m, args: log.append("prepended"), prepend=True)
    second = layer.register_forward_hook(lambda m, args, y: log.append(args[0].item()) or y + 1)
    assert layer(nbgrad.tensor(3.0)).item() == 7.0
    assert log == ["prepended", 6.0]
    first.remove()
    first.remove()
    with second:
        assert layer(nbgrad.tensor(3.0)).item() == 4.0
    assert layer(nbgrad.tensor(3.0)).item() == 3.0


def test_hooks_with_kwargs():
    class Add(nn.Module):
        def forward(self, x, *, by=0):
            return x + by

    layer = Add()
    layer.register_forward_pre_hook(lambda m, args, kw: (args, {"by": kw["by"] + 1}),
                                    with_kwargs=True)
    layer.register_forward_hook(lambda m, args, kw, y: y * kw["by"], with_kwargs=True)
    assert layer(nbgrad.tensor(1.0), by=2).item() == (1 + 3) * 3
    layer.register_forward_pre_hook(lambda m, args, kw: 3, with_kwargs=True)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        layer(nbgrad.tensor(1.0), by=2)
    with pytest.raises(TypeError, match="expected a function"):
        layer.register_forward_hook(3)


def test_without_hooks_the_fast_path_is_back():
    layer = nn.ReLU()
    handle = layer.register_forward_hook(lambda m, args, y: None)
    assert layer._hooks
    handle.remove()
    assert layer._hooks is None


def test_full_backward_hook_sees_this_module_alone():
    layer, seen = nn.Linear(1, 1, bias=False), []
    layer.weight.data[:] = 3.0
    handle = layer.register_full_backward_hook(
        lambda m, dx, dy: seen.append((dx[0] and dx[0].item(), dy[0].item())))
    x = nbgrad.tensor([[2.0]], requires_grad=True)
    for _ in range(2):
        y = layer(x) + 10 * x                    # the residual part is not the layer's gradient
        (y * 5).sum().backward()
    assert seen == [(15.0, 5.0)] * 2
    assert x.grad.item() == 2 * 65.0
    layer(nbgrad.tensor([[2.0]])).sum().backward()          # without a differentiable input
    assert seen[2:] == [(None, 1.0)]
    handle.remove()
    layer.register_full_backward_hook(lambda m, dx, dy: (dx[0] * 0,))
    x.grad = None
    layer(x).sum().backward()
    assert x.grad.item() == 0.0
