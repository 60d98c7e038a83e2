"""How a function's machine code is made: once, in the kernel that everything is compiled into.

Numba optimises each function that it compiles and makes machine code of it, with entries for
Python, for C and for callers that did not inline it; and all that again in each of its callers,
level by level. Functions that only kernels call need none of it: they are kept as they were
lowered, and a kernel keeps of them what it did not inline.
"""

from llvmlite import binding
from numba import _dynfunc
from numba.core.compiler import Compiler

__all__ = ["DeviceCompiler", "KernelCompiler"]


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
