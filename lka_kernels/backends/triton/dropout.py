"""The dropout stream of ``lka_kernels.philox``, for use inside kernels."""

import triton
import triton.language as tl


@triton.jit
def _words(seed, group):
    # Triton's generator is the same Philox 4×32-10, with counters of four 32-bit words.
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, zero, zero, n_rounds=10)


@triton.jit
def dropout_factors(
    seed_pointer,
    token,
    threshold,
    keep_factor,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Factors [BLOCK_R, tokens] (0 or ``keep_factor``) of channels 0 … R - 1 of each token.

    Element ``token · R + channel`` of the mask is word ``element % 4`` of counter ``element // 4``.
    ``token`` is int64; ``threshold`` is ``philox.drop_threshold``.
    """
    seed = tl.load(seed_pointer)
    if R % 4 == 0:
        # Four neighbouring channels share a counter: compute it once.
        groups = tl.arange(0, BLOCK_R // 4)
        w0, w1, w2, w3 = _words(seed, (token * (R // 4))[None, :] + groups[:, None])
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [groups, tokens, 2, 2]
        words = words.permute(0, 2, 3, 1).reshape(BLOCK_R, token.shape[0])
    else:
        element = (token * R)[None, :] + tl.arange(0, BLOCK_R)[:, None]
        w0, w1, w2, w3 = _words(seed, element >> 2)
        lane = element & 3
        words = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return tl.where(words.to(tl.int64) >= threshold, keep_factor, 0.0)
