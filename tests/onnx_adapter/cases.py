"""ONNX's node cases: load them, run them on nbgrad, say of each why it did not pass."""

import functools
import inspect
import warnings
from typing import NamedTuple

import numpy as np

import nbgrad as nb

from . import OPERATORS, Unsupported

RTOL, ATOL = 1e-5, 1e-6
SEED = 0                      # the cases' makers draw from NumPy's global generator
DTYPES = {"float": "float32", "double": "float64", "int32": "int32", "int64": "int64",
          "bool": "bool", "int8": "int8", "int16": "int16", "uint8": "uint8", "uint16": "uint16",
          "uint32": "uint32", "uint64": "uint64"}
MAIN = ("float32", "float64", "int32", "int64", "bool")


class Case(NamedTuple):
    """One model with inputs and outputs. ``dtypes`` are those of inputs, outputs and casts, by
    ONNX's names where nbgrad has none."""

    name: str
    operators: tuple[str, ...]
    dtypes: tuple[str, ...]
    graph: object
    data: object

    @property
    def expanded(self):
        """Whether the graph is an operator's definition by simpler ones."""
        return "_expanded" in self.name


class Outcome(NamedTuple):
    """Why a case did not pass: "operator", "dtype", "lacks" or "differs", and what; () if it
    passed."""

    kind: str = ""
    what: str = ""


@functools.cache
def load():
    """All cases, by name, in the loader's order."""
    from onnx.backend.test.loader import load_model_tests

    state = np.random.get_state()         # noqa: NPY002 (the one that ONNX draws from)
    np.random.seed(SEED)                  # noqa: NPY002
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        cases = load_model_tests(kind="node")
    np.random.set_state(state)            # noqa: NPY002
    found = {}
    for case in cases:
        name, graph = case.name.removeprefix("test_"), case.model.graph
        operators = tuple(sorted({node.op_type for node in graph.node}))
        found[name] = Case(name, operators, _dtypes(graph), graph, case.data_sets)
    return found


def _dtypes(graph):
    from onnx import TensorProto

    def name(number):
        word = TensorProto.DataType.Name(number).lower()
        return DTYPES.get(word, word)
    found = set()
    for value in (*graph.input, *graph.output):
        kind = value.type.WhichOneof("value")
        found.add(name(value.type.tensor_type.elem_type) if kind == "tensor_type"
                  else kind.removesuffix("_type"))
    for node in graph.node:
        found |= {name(a.i) for a in node.attribute if a.name in ("to", "dtype") and a.i}
    return tuple(sorted(found))


# ------------------------------------------------------------------------------------------ running

def _attributes(node):
    from onnx import AttributeProto, helper, numpy_helper

    found = {}
    for a in node.attribute:
        value = helper.get_attribute_value(a)
        if a.type == AttributeProto.TENSOR:
            value = numpy_helper.to_array(value)
        elif isinstance(value, bytes):
            value = value.decode()
        elif a.name in ("to", "dtype"):
            value = helper.tensor_dtype_to_np_dtype(value)
        found[a.name] = value
    return found


@functools.cache
def _counts(operator):
    """Whether it asks how many outputs are wanted."""
    return inspect.isfunction(operator) and "outputs" in inspect.signature(operator).parameters


def run(graph, inputs):
    """The graph's outputs: nodes one after the other, which is an order that ONNX asks for."""
    values = {"": None, **inputs}
    for node in graph.node:
        operator, settings = OPERATORS[node.op_type], _attributes(node)
        if _counts(operator):
            settings["outputs"] = len(node.output)
        y = operator(*[values[name] for name in node.input], **settings)
        values.update(zip(node.output, y if isinstance(y, (tuple, list)) else (y,)))
    return [values[out.name] for out in graph.output]


def outcome(case):
    """What came of a case."""
    absent = [name for name in case.operators if name not in OPERATORS]
    if absent:
        return Outcome("operator", absent[0])
    other = [name for name in case.dtypes if name not in DTYPES.values()]
    if other:
        return Outcome("dtype", other[0])
    try:
        for inputs, wanted in case.data:
            _compare(case, inputs, wanted)
    except Unsupported as lack:
        return Outcome("lacks", str(lack))
    except AssertionError as error:
        return Outcome("differs", " ".join(str(error).split()))
    except Exception as error:
        return Outcome("differs", f"{type(error).__name__}: {error}")
    return Outcome()


def _compare(case, inputs, wanted):
    names = [value.name for value in case.graph.input]
    before = [_array(x) for x in inputs]
    given = [nb.tensor(x) for x in before]
    with np.errstate(all="ignore"):
        found = run(case.graph, dict(zip(names, given)))
    for x, kept in zip(given, before):
        np.testing.assert_array_equal(x.data, kept, "an input was modified")
    for y, want in zip(found, map(_array, wanted)):
        assert y.dtype == want.dtype, f"dtype {y.dtype}, not {want.dtype}"
        assert y.shape == want.shape, f"shape {y.shape}, not {want.shape}"
        np.testing.assert_allclose(y.data, want, RTOL, ATOL)


def _array(x):
    """Casts' vectors are messages."""
    from onnx import TensorProto, numpy_helper

    return numpy_helper.to_array(x) if isinstance(x, TensorProto) else np.asarray(x)


@functools.cache
def outcomes(kernels="cpu"):
    """What came of each case, by name, with the "cpu" or the "reference" kernels."""
    with nb.backend.use(kernels):
        return {name: outcome(case) for name, case in load().items()}
