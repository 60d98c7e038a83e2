"""House rules: who may import whom, what may not be in the package, what pyproject must list."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "nbgrad").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
# from the ground up: a module may import from its own floor's folder and from floors below
FLOORS = ["kernels", "backend", "autograd", "graph", "testing", "ops", "nn", "optim", "models",
          "data", "train", "lab", "viz", "cli"]


def imports(path):
    """Modules that a file imports, with names: `from nbgrad import nn` is nbgrad.nn."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names} | {node.module}
    return found


def floor(module):
    """Which floor nbgrad.x.y is on; None for the package itself and for names that it shows."""
    part = module.split(".")[1] if module.startswith("nbgrad.") else None
    return FLOORS.index(part) if part in FLOORS else None


def relative(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_imports_go_down(path):
    own = floor("nbgrad." + path.relative_to(ROOT / "nbgrad").with_suffix("").parts[0])
    if own is None:           # __init__ and __main__ show everything
        return
    above = {m for m in imports(path) if (f := floor(m)) is not None and f > own}
    assert above == set()


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_only_the_backend_knows_the_kernels_and_nobody_numba(path):
    found = imports(path)
    assert not any(m.split(".")[0] in ("numba", "llvmlite", "kernels", "torch", "pickle")
                   for m in found)
    if path.name != "backend.py":
        assert not any(m.startswith("nbgrad.kernels") for m in found)


@pytest.mark.parametrize("path", KERNELS, ids=relative)
def test_kernels_know_nothing_of_nbgrad(path):
    assert not any(m.split(".")[0] == "nbgrad" for m in imports(path))


@pytest.mark.parametrize("path", PACKAGE + KERNELS, ids=relative)
def test_nothing_dangerous_in_the_package(path):
    source = path.read_text()
    assert "fastmath=True" not in source
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            assert name not in ("exec", "pickle"), f"line {node.lineno}"
            assert not (isinstance(node.func, ast.Name) and name == "eval"), f"line {node.lineno}"
            assert not any(k.arg == "allow_pickle" and getattr(k.value, "value", 1)
                           for k in node.keywords)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            allowed = relative(path) in ("nbgrad/cli.py", "kernels/cpu/jit.py")
            assert allowed, f"print at line {node.lineno}"


@pytest.mark.parametrize("path", PACKAGE + KERNELS, ids=relative)
def test_extras_are_imported_where_they_are_used(path):
    tree = ast.parse(path.read_text())
    top = {a.name.split(".")[0] for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    top |= {n.module.split(".")[0] for n in tree.body
            if isinstance(n, ast.ImportFrom) and n.module and not n.level}
    assert not top & {"matplotlib", "rich", "tensorboardX"}


def test_packages_listed_are_the_folders_there_are():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    there = {".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE if p.name == "__init__.py"}
    there |= {"nbgrad." + ".".join(p.parent.relative_to(ROOT).parts)
              for p in KERNELS if p.name == "__init__.py"}
    assert listed == there
    assert not (ROOT / "nbgrad" / "kernels").exists()
    assert not (ROOT / "nbgrad" / "kernels.py").exists()


def test_both_kernel_sets_have_the_same_functions_with_the_same_signatures():
    sets = [importlib.import_module(f"nbgrad.kernels.{name}") for name in ("reference", "cpu")]
    for module in ("conv", "elementwise", "group_norm", "loss", "matmul", "norm", "optim", "pool",
                   "reduce", "samples"):
        reference, cpu = (importlib.import_module(f"{s.__name__}.{module}") for s in sets)
        assert sorted(reference.__all__) == sorted(cpu.__all__)
        for name in reference.__all__:
            a, b = getattr(reference, name), getattr(cpu, name)
            assert getattr(sets[0], name) is a
            assert getattr(sets[1], name) is b
            if inspect.isfunction(a) and inspect.isfunction(b) and module != "elementwise":
                assert inspect.signature(a) == inspect.signature(b), f"{module}.{name}"


def test_an_edit_of_any_kernel_source_changes_the_cache_folder(tmp_path, monkeypatch):
    from nbgrad.kernels.cpu import jit

    root = tmp_path / "kernels" / "cpu"
    root.mkdir(parents=True)
    (root / "jit.py").write_text("a = 1")
    monkeypatch.setattr(jit, "__file__", str(root / "jit.py"))
    before = jit._source_key()
    (tmp_path / "kernels" / "formulas.py").write_text("b = 2")
    assert jit._source_key() != before


def test_what_processes_compile_at_the_same_time_stays_apart(tmp_path, monkeypatch):
    """Kernels of one loop differ in the functions that it calls: each has files of its own, and no
    list of them that another process could overwrite."""
    from nbgrad.kernels.cpu import jit

    monkeypatch.setattr(jit, "cache_dir", lambda: tmp_path)

    def loop(x):
        return x
    caches = [jit._Cache(loop, name)._cache_file for name in ("relu", "sigmoid")]
    keys = [(sig, ("cpu", "features"), name) for sig in ("(float32,)", "(float64,)")
            for name in ("relu False", "sigmoid False")]
    for i, key in enumerate(keys):
        assert caches[1 - i % 2].load(key) is None
        caches[i % 2].save(key, f"code of {key}")
    for key in keys:
        for cache in caches:
            assert cache.load(key) == f"code of {key}"
    assert len(list(tmp_path.rglob("*.nbc"))) == len(keys)
    assert not list(tmp_path.rglob("*.nbi"))


COMPILED = """
import numpy as np
from numba.core import event
from nbgrad.kernels.cpu import jit, loss
found = []
class Listener(event.Listener):
    def on_start(self, event):
        found.append(event.data["dispatcher"].py_func.__qualname__)
    def on_end(self, event): pass
event.register("numba:compile", Listener())
loss.cross_entropy(np.ones((4, 3), np.float32), np.zeros(4, np.int64), None, ignore_index=-100,
                   label_smoothing=0.0)
print(sum(name in jit._names for name in found))
"""


def test_what_a_process_compiles_the_others_wait_for_and_load(tmp_path):
    """Of three that start together, one compiles the kernel."""
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    started = [subprocess.Popen([sys.executable, "-c", COMPILED], env=env, stdout=subprocess.PIPE,
                                text=True) for _ in range(3)]
    counts = sorted(int(process.communicate(timeout=120)[0]) for process in started)
    assert len(list(tmp_path.rglob("*.nbc"))) == 1
    assert counts[:2] == [0, 0] < counts[1:]


def test_a_kernel_that_does_not_compile_keeps_nobody_waiting(tmp_path, monkeypatch):
    from nbgrad.kernels.cpu import jit

    monkeypatch.setattr(jit, "cache_dir", lambda: tmp_path)
    for wait in ("first", "second"):
        with pytest.raises(RuntimeError, match=wait), jit._turn(tmp_path / "a.lock"):
            raise RuntimeError(wait)
    with jit._turn(tmp_path / "nowhere" / "a.lock"):         # no such folder: without turns
        pass


def run(code, **options):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          **options)


def test_importing_nbgrad_imports_nothing_heavy():
    out = run("import sys, nbgrad\n"
              "print(sorted({'numpy', 'numba', 'matplotlib', 'rich'} & set(sys.modules)))")
    assert out.stdout.strip() == "[]"


def test_the_whole_framework_needs_no_extra():
    out = run("import sys, nbgrad\n"
              "nbgrad.nn, nbgrad.optim, nbgrad.data, nbgrad.train, nbgrad.models, nbgrad.viz\n"
              "print(sorted({'torch', 'matplotlib', 'rich', 'tensorboardX'} & set(sys.modules)))")
    assert out.stdout.strip() == "[]", out.stderr


def test_a_checkout_that_is_not_installed_says_what_to_do(tmp_path):
    (tmp_path / "nbgrad").symlink_to(ROOT / "nbgrad")
    block = ("import sys\n"
             "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in repr(f)]\n"
             f"sys.path[:] = [{str(tmp_path)!r}] + [p for p in sys.path if 'nbgrad' not in p]\n"
             "sys.path_hooks[:] = [h for h in sys.path_hooks if '__editable__' not in repr(h)]\n"
             "import importlib.abc\n"
             "class NoKernels(importlib.abc.MetaPathFinder):\n"
             "    def find_spec(self, name, path, target=None):\n"
             "        if name.startswith('nbgrad.kernels'):\n"
             "            raise ModuleNotFoundError(name, name=name)\n"
             "sys.meta_path.insert(0, NoKernels())\n"
             "import nbgrad; nbgrad.Tensor")
    out = run(block, cwd=tmp_path)
    assert "run `pip install -e .` in the checkout" in out.stderr


def test_compiling_is_said_once_and_later_processes_load_from_the_cache(tmp_path):
    code = ("import nbgrad; nbgrad.backend.notify(); x = nbgrad.randn(3)\n"
            "nbgrad.sigmoid(x); nbgrad.silu(x)")
    environment = {"NUMBA_CACHE_DIR": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    first, second = run(code, env=environment), run(code, env=environment)
    assert first.returncode == second.returncode == 0, first.stderr
    assert first.stderr.count("nbgrad: compiling kernels") == 1
    assert str(tmp_path) in first.stderr
    assert second.stderr == ""


def test_without_a_writable_cache_kernels_still_run(tmp_path):
    (tmp_path / "file").write_text("")
    code = "import nbgrad; print(nbgrad.sigmoid(nbgrad.zeros(3)).tolist())"
    out = run(code, env={"NUMBA_CACHE_DIR": str(tmp_path / "file"), "PATH": ""})
    assert out.stdout.strip() == "[0.5, 0.5, 0.5]", out.stderr


def test_readme_numbers_come_from_scripts():
    """A table of measurements stands between markers that the script which wrote it looks for."""
    readme = (ROOT / "README.md").read_text()
    for name in re.findall(r"<!-- table: (\w+) -->", readme):
        assert f"<!-- end: {name} -->" in readme
