"""Every kernel as machine code without a GPU, and what the assembler says of it."""

import re
import struct
from collections import Counter
from importlib import import_module
from typing import NamedTuple

from .launch import assemble

__all__ = ["MODULES", "Report", "capabilities", "every_kernel", "instructions", "report", "reports"]

# each has ``every()``
MODULES = ("elementwise", "reduce", "moments", "passes", "rows", "layer_norm", "group_norm",
           "ghosts", "single", "single_backward", "softmax", "loss", "matmul", "epilogue",
           "windows", "pool", "optim", "random")


# the low 12 bits of an instruction of 16 bytes, since compute capability 7.0
OPERATIONS = {0x223: "FFMA", 0x23c: "HMMA", 0x83b: "LDSM", 0x984: "LDS", 0xfae: "LDGSTS"}


class Report(NamedTuple):
    """What a kernel takes of a multiprocessor, and how it reaches memory."""

    name: str
    cc: tuple[int, int]
    threads: int             # of a block
    registers: int
    spilled: int             # bytes of registers written to memory
    local: int               # bytes of stack of a thread
    shared: int              # bytes
    wide_loads: int          # of 128 bits, to registers or past them to shared memory
    loads: int
    wide_stores: int
    stores: int
    size: int                # bytes of machine code


def every_kernel():
    """All kernels of all modules."""
    for name in MODULES:
        yield from import_module(f".{name}", __package__).every()


def capabilities():
    """Turing, Ampere, Hopper and the newest that the toolkit knows."""
    from numba.cuda.cudadrv import nvrtc

    return [(7, 5), (8, 0), (9, 0), max(nvrtc.get_supported_ccs())]


def _number(pattern, text):
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def _accesses(ptx):
    """Loads of 128 bits and of any size, and stores likewise, among PTX's instructions; copies to
    shared memory (cp.async) load."""
    wide = r"\.global(?:\.\w+)*\.(?:v4\.[fbu]32|v2\.[fbu]64)"
    copies = re.findall(r"\bcp\.async\.c[ag]\.\S+ \[[^]]+\], \[[^]]+\], (\d+)", ptx)
    return (len(re.findall(r"\bld" + wide, ptx)) + copies.count("16"),
            ptx.count("ld.global") + len(copies),
            len(re.findall(r"\bst" + wide, ptx)), ptx.count("st.global"))


def report(kernel, cc):
    """Compile and assemble a kernel for a compute capability. Raises what the tools raise."""
    return _report(kernel, cc, kernel.ptx(cc))


def reports(kernel, ccs):
    """The same for each of some compute capabilities, in a fraction of the time."""
    ccs = [cc for cc in ccs if cc >= kernel.least]
    for cc, ptx in zip(ccs, kernel.ptx_of_each(ccs) if ccs else ()):
        yield _report(kernel, cc, ptx)


def _report(kernel, cc, ptx):
    code, log = assemble(ptx, cc)
    return Report(kernel.name, cc, kernel.threads,
                  _number(r"Used (\d+) registers", log), _number(r"(\d+) bytes spill stores", log),
                  _number(r"(\d+) bytes stack frame", log),
                  sum(map(int, re.findall(r"\.shared \.align \d+ \.b8 \w+\[(\d+)\]", ptx)))
                  + kernel.shared, *_accesses(ptx), len(code))


def instructions(kernel, cc):
    """How often the machine code has each of OPERATIONS: products, and loads of shared memory,
    by fragments (LDSM) or not, and into it past the registers (LDGSTS)."""
    code, _ = kernel.assemble(cc)
    table, = struct.unpack_from("<Q", code, 0x28)
    size, count, names = struct.unpack_from("<HHH", code, 0x3a)
    sections = [struct.unpack_from("<I4xQQQQ", code, table + i * size) for i in range(count)]
    found = Counter()
    for name, _, _, begin, length in sections:
        if code.startswith(b".text.", sections[names][3] + name):
            words = code[begin:begin + length:16], code[begin + 1:begin + length:16]
            found.update(a | (b & 15) << 8 for a, b in zip(*words))
    return {name: found[n] for n, name in OPERATIONS.items()}
