"""fp32 numbers as integers that compare as they do, when their bits are read as unsigned ones."""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered(x):
    """The integer of a number; 0 is that of no number but one NaN."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    return bits ^ ((bits >> 31) | -2147483648)


@triton.jit
def unordered(rank):
    """The number again."""
    bits = rank ^ ((~rank >> 31) | -2147483648)
    return bits.to(tl.float32, bitcast=True)
