"""Containers, what modules print, and summary."""

import numpy as np
import pytest

import nbgrad
from nbgrad import nn


def names(pairs):
    return [name for name, _ in pairs]


def test_repr_nests():
    model = nn.Sequential(nn.Linear(2, 3), nn.ModuleList([nn.ReLU(), nn.ReLU(), nn.Tanh()]))
    assert repr(model) == """Sequential(
  (0): Linear(in_features=2, out_features=3, bias=True)
  (1): ModuleList(
    (0-1): 2 x ReLU()
    (2): Tanh()
  )
)"""
    assert repr(nn.ParameterList([np.zeros((2, 3))])) == (
        "ParameterList((0): Parameter containing: [float64 of size 2x3])")


def test_containers_index_slice_and_edit():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    assert model[-1] is model[2]
    assert names(model[1:].named_children()) == ["1", "2"]
    with pytest.raises(IndexError, match="index 3 is out of range for Sequential of length 3"):
        model[3]
    model[1] = nn.Tanh()
    assert isinstance(model[1], nn.Tanh)
    del model[0]
    assert names(model.named_children()) == ["0", "1"]
    with pytest.raises(IndexError, match="index -3 is out of range for Sequential of length 2"):
        del model[-3]
    model.append(nn.ReLU()).extend([nn.SiLU()])
    model.insert(0, nn.Identity())
    assert [type(m).__name__ for m in model] == ["Identity", "Tanh", "Linear", "ReLU", "SiLU"]
    assert len(nn.ModuleList(model)[1:3]) == 2
    with pytest.raises(TypeError, match="cannot assign 'int' object to module '5'"):
        model.append(3)


def test_module_dict_and_parameter_list():
    d = nn.ModuleDict({"a": nn.ReLU()})
    d["b"] = nn.Linear(1, 2)
    assert list(d.state_dict()) == ["b.weight", "b.bias"]
    assert "a" in d
    assert list(d) == list(d.keys()) == ["a", "b"]
    assert d.pop("a") is not None
    with pytest.raises(KeyError):
        d["a"]
    with pytest.raises(KeyError, match="attribute 'keys' already exists"):
        d["keys"] = nn.ReLU()
    d.clear()
    assert len(d) == 0
    p = nn.ParameterList([np.zeros(2), nbgrad.ones(3)])
    p.append(np.ones(1))
    p[0] = np.full(2, 4.0)
    assert [q.shape for q in p.parameters()] == [(2,), (3,), (1,)]
    assert p[0].tolist() == [4.0, 4.0]


def test_summary_counts_and_restores_modes():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout())
    model[2].eval()
    table = nn.summary(model, (2, 4))
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert [row.output_shape for row in table.rows] == [(2, 3)] * 4
    assert [row.parameters for row in table.rows] == [0, 15, 6, 0]
    assert table.parameters == table.trainable == 21
    assert table.nbytes == 21 * 4 + 2 * 3 * 4 + 8
    assert model[1].num_batches_tracked.item() == 0
    assert all(len(line) == len(str(table).split("\n")[0]) for line in str(table).split("\n")[:-1])
    assert nn.summary(model, np.zeros((5, 4), np.float32)).rows[0].output_shape == (5, 3)
    with pytest.raises(TypeError, match="summary: expected a Tensor"):
        nn.summary(model, "x")
    with pytest.raises(Exception, match="linear"):
        nn.summary(model, (2, 5))
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert model._hooks is None


def test_deleting_keeps_given_names_and_renumbers_the_others():
    named = nn.Sequential({"a": nn.ReLU(), "b": nn.Tanh(), "c": nn.SiLU()})
    del named[0]
    assert names(named.named_children()) == ["b", "c"]
    numbered = nn.ModuleList([nn.ReLU(), nn.Tanh(), nn.SiLU(), nn.ELU()])
    del numbered[1:3]
    assert [(n, type(m).__name__) for n, m in numbered.named_children()] == [("0", "ReLU"),
                                                                            ("1", "ELU")]
