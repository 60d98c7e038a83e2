"""All PTX that there is, a function of an LLVM builder for each instruction: what another compiler
would want in another form. intrinsics.py and halves.py, which alone use it, say what they mean.
"""

from llvmlite import ir

__all__ = ["acquired", "bf16", "bf16_pair", "commit_group", "copied", "matrices", "multiplied",
           "tf32", "wait_group"]

_HALF, _WORD, _SINGLE = ir.IntType(16), ir.IntType(32), ir.FloatType()
_SUMS = ir.LiteralStructType([_SINGLE] * 4)


def _said(builder, result, args, text, constraints, free=False):
    """The value of an instruction; ``free``: it may be moved, merged and left out."""
    kind = ir.FunctionType(result, [x.type for x in args])
    return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=not free), args)


def bf16(builder, x):
    """The bits of a float32 rounded to bfloat16. Needs compute capability 8.0, as all below."""
    return _said(builder, _HALF, [x], "cvt.rn.bf16.f32 $0, $1;", "=h,f", free=True)


def bf16_pair(builder, high, low):
    """Of two in a word."""
    return _said(builder, _WORD, [high, low], "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", free=True)


def tf32(builder, x):
    """The bits of a float32 rounded to TF32."""
    return _said(builder, _WORD, [x], "cvt.rna.tf32.f32 $0, $1;", "=r,f", free=True)


def copied(builder, size, to, source, given):
    """``size`` bytes on their way to shared memory: ``given`` of them, then zeros."""
    how = "cg.shared.global.L2::128B" if size == 16 else "ca.shared.global"
    _said(builder, ir.VoidType(), [to, source, given], f"cp.async.{how} [$0], [$1], {size}, $2;",
          "r,l,r,~{memory}")


def commit_group(builder):
    """What has been copied since the last time is a group."""
    _said(builder, ir.VoidType(), [], "cp.async.commit_group;", "~{memory}")


def wait_group(builder, n):
    """Until all but n groups are there."""
    _said(builder, ir.VoidType(), [], f"cp.async.wait_group {n};", "~{memory}")


def matrices(builder, how, at):
    """Four words of four matrices of 8 × 8 halves in shared memory; how: "" or ".trans"."""
    return _said(builder, ir.LiteralStructType([_WORD] * 4), [at],
                 f"ldmatrix.sync.aligned.m8n8.x4{how}.shared.b16 {{$0, $1, $2, $3}}, [$4];",
                 "=r,=r,=r,=r,r,~{memory}")


def multiplied(builder, shape, kind, values):
    """Four sums after a product of fragments: ``values`` are a's four words, b's two, the sums."""
    return _said(builder, _SUMS, values,
                 f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {{$0, $1, $2, $3}}, "
                 "{$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
                 "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f")


def acquired(builder, at):
    """A word of memory as all blocks see it."""
    return _said(builder, _WORD, [at], "ld.acquire.gpu.u32 $0, [$1];", "=r,l,~{memory}")
