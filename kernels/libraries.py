"""How a function's machine code is made: once, in the kernel that everything is compiled into.

Numba optimises each function that it compiles and makes machine code of it, with entries for
Python, for C and for callers that did not inline it; and all that again in each of its callers,
level by level. Functions that only kernels call need none of it: they are kept as they were
lowered, and a kernel keeps of them what it did not inline.
"""

from contextlib import contextmanager

import numba
from llvmlite import binding
from numba import _dynfunc
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

__all__ = ["DeviceCompiler", "KernelCompiler", "ParallelCompiler"]


class _Compiler(Compiler):
    """Makes the library before the function is lowered, as the pass that lowers it would."""

    def __init__(self, typingctx, targetctx, library, args, return_type, flags, locals):
        if library is None:
            library = targetctx.codegen().create_library("nbgrad")
            library.enable_object_caching()
            self.adapt(library)
        super().__init__(typingctx, targetctx, library, args, return_type, flags, locals)


def _entry(library, fndesc, env):
    """What stands for the machine code of a function that has none."""
    return _dynfunc.make_function(fndesc.lookup_module(), fndesc.qualname, "", 0, env, (library,))


class DeviceCompiler(_Compiler):
    """Of functions that are compiled into others: neither passes nor machine code."""

    def __init__(self, *args):
        super().__init__(*args)
        self.state.targetctx.get_executable = _entry       # a context for this function alone

    @staticmethod
    def adapt(library):
        def finalize():
            library._finalize_dynamic_globals()
            library._verify_declare_only_symbols()
            library._finalized = True
        library._optimize_final_module = lambda: None
        library._finalize_final_module = finalize


class KernelCompiler(_Compiler):
    """Of functions that Python calls: what was linked in goes once it is inlined."""

    @staticmethod
    def adapt(library):
        optimize = library._optimize_final_module

        def optimize_alone():
            for function in library._final_module.functions:
                shared = function.linkage == binding.Linkage.linkonce_odr
                if shared and not function.is_declaration and not function.name.startswith("NRT_"):
                    # LLVM may now change how it is called, and the JIT's linker would take it for
                    # the function of that name that another kernel shares
                    function.name += ".own"
                    function.linkage = binding.Linkage.internal
            optimize()
        library._optimize_final_module = optimize_alone


class _Library(JITCodeLibrary):
    """Code that becomes machine code when someone asks where a function of it lies.

    Numba optimises and assembles each function with all that it calls, again in its caller, and
    three times more around the body of a prange. Only the outermost is ever run."""

    _made = False

    def finalize(self):
        self._raise_if_finalized()
        for library in dict.fromkeys(self._linking_libraries):
            self._reload_init.update(library._reload_init)
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._finalized = True

    def get_pointer_to_function(self, name):
        self._ensure_finalized()
        if not self._made:
            if self.name.startswith("__numba_parfor") or not self._defines(name):
                return 0
            self._made = True
            self._optimize_final_module()
            self._final_module.verify()
            self._finalize_final_module()
        return super().get_pointer_to_function(name)

    def _defines(self, name):
        return any(f.name == name and not f.is_declaration for f in self._final_module.functions)


@contextmanager
def _replaced(owner, **values):
    """Attributes of an object for a while; what its class says shows again after that."""
    vars(owner).update(values)
    try:
        yield
    finally:
        for name in values:
            delattr(owner, name)


class ParallelCompiler(Compiler):
    """Of kernels with a prange: such libraries, also for what is compiled on the way."""

    def compile_extra(self, func):
        codegen = self.state.targetctx.codegen()
        if "_library_class" in vars(codegen):         # a kernel that another one compiles
            return super().compile_extra(func)
        find, put = codegen._engine.get_global_value_address, codegen.set_env

        def set_env(name, env):
            if find(name):                # no machine code, no environment
                put(name, env)

        with _replaced(codegen, _library_class=_Library, set_env=set_env):
            return super().compile_extra(func)


if numba.version_info[:2] != (0, 68):          # whose inside this knows; others compile as they do
    DeviceCompiler = KernelCompiler = ParallelCompiler = Compiler
