"""Reading a recorded graph."""

import io

import numpy as np

import nbgrad
from nbgrad import graph, nn


def build():
    x = nbgrad.as_tensor(np.ones((4, 3), np.float32))
    w, b = (nbgrad.ones(*s, requires_grad=True) for s in ((2, 3), (2,)))
    g, beta = nbgrad.ones(2, requires_grad=True), nbgrad.zeros(2, requires_grad=True)
    h = nbgrad.batch_norm(nbgrad.linear(x, w, b), None, None, g, beta, True, eps=1e-3)
    return nbgrad.relu(h).sum(), {"w": w, "b": b, "gamma": g, "beta": beta}


def test_the_graph_as_a_program():
    loss, names = build()
    assert graph.text(loss, names).splitlines() == [
        "_: an input that needs no gradient",
        "w: float32[2, 3]",
        "b: float32[2]",
        "gamma: float32[2]",
        "beta: float32[2]",
        "%1: float32[4, 2] = linear(_, w, b)    keeps weight 24 B, x 48 B",
        ("%2: float32[4, 2] = batch_norm(%1, gamma, beta, _, eps=0.001)    keeps "
         "gamma 8 B, invstd 16 B, mean 16 B, x 32 B"),
        "%3: float32[4, 2] = relu(%2)    keeps y 32 B",
        "%4: float32[] = sum(%3)",
        "keeps 176 B alive in 4 nodes",
    ]


def test_show_prints():
    loss, names = build()
    out = io.StringIO()
    graph.show(loss, names, file=out)
    assert out.getvalue() == graph.text(loss, names) + "\n"


def test_a_buffer_kept_twice_counts_once():
    x = nbgrad.ones(10, requires_grad=True)
    y = x * x
    assert graph.saved_bytes(y) == 40
    assert graph.saved_bytes(y * y) == 80


def test_after_backward_nothing_is_kept():
    loss, _ = build()
    loss.backward()
    assert graph.saved_bytes(loss) == 0
    assert "freed" in graph.text(loss)


def test_several_outputs_are_named_as_parts():
    x = nbgrad.randn(4, 3, requires_grad=True)
    g = nbgrad.ones(3, requires_grad=True)
    y = nbgrad.batch_norm(x, None, None, g, None, True)
    dx, dg = nbgrad.grad((y * y * y).sum(), (x, g), create_graph=True)
    program = graph.text((dx * dx).sum() + dg.sum(), {"x": x, "gamma": g})
    assert "= batch_norm_backward(" in program
    assert ".0" in program
    assert "float32[4, 3], float32[3], float32[3] = batch_norm_backward" in program


def test_inputs_come_before_what_uses_them():
    loss, _ = build()
    order = graph.nodes(loss)
    for i, node in enumerate(order):
        assert all(e not in order[i:] for e in node.edges if e in order)
    assert [n.name for n in order] == ["linear", "batch_norm", "relu", "sum"]


def test_dot_has_every_node_and_edge():
    loss, names = build()
    source = graph.dot(loss, names)
    assert source.startswith("digraph {")
    assert source.count("->") == 2 + 3 + 1 + 1
    assert '"gamma" -> "%2"' in source


def test_names_of_a_models_parameters():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    loss = model(nbgrad.randn(4, 3)).sum()
    assert "linear(_, 0.weight, 0.bias)" in graph.text(loss, dict(model.named_parameters()))
