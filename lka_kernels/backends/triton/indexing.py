"""What the depthwise kernels share: programs, positions and borders."""

import triton
import triton.language as tl


@triton.jit
def program_index(WIDE: tl.constexpr):
    """The program's number, in int64 if what it is multiplied to does not fit int32."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    return pid


@triton.jit
def inside(i, size):
    """0 <= i < size in one comparison: what is negative is large without a sign."""
    return i.to(tl.uint32) < tl.cast(size, tl.uint32)


@triton.jit
def first_row_of_block(block, DY, ROWS: tl.constexpr):
    """The first output row of a block of ROWS rows that lie DY apart.

    Rows that lie DY apart share the input rows that their taps meet.
    """
    return block // DY * (ROWS * DY) + block % DY
