"""What stands in for a GPU: twins give what torch gives, and the checker reports every mistake."""

import ctypes

import on_cpu
import pytest
import torch

pytestmark = pytest.mark.skipif(on_cpu.compiler() is None, reason="no C++ compiler")

SAID = {
    "sound": "",
    "global_load_below": "global load out of range",
    "global_load_above": "global load out of range",
    "global_load_unaligned": "global load of 4 bytes that is not aligned",
    "global_store_above": "global store out of range",
    "global_store_to_input": "global store to input",
    "global_load_unwritten": "global load of output that was never written",
    "shared_load_above": "shared load out of range",
    "shared_store_below": "shared store out of range",
    "shared_load_unaligned": "shared load of 4 bytes that is not aligned",
    "shared_load_unwritten": "shared load of memory never written",
    "no_barrier": "wrote, without a barrier",
    "no_barrier_before_reuse": "over what another thread reads, without a barrier",
    "barrier_of_a_warp": "",
    "barrier_of_another_warp": "wrote, without a barrier",
    "barrier_of_a_warp_before_reuse": "over what another thread reads, without a barrier",
    "two_writers": "over what another thread wrote, without a barrier",
    "copy_not_waited_for": "a copy that was not waited for",
    "copy_waited_for_too_little": "a copy that was not waited for",
    "copy_of_another_thread": "wrote, without a barrier",
    "copy_out_of_range": "global load out of range",
    "copy_of_a_part": "",
    "copy_of_a_part_beyond_the_end": "global load out of range",
    "copy_of_nothing_out_of_range": "",
    "copy_beyond_shared": "asynchronous copy out of range",
    "copy_unaligned": "from an address that is not aligned",
    "barrier_of_half_the_block": "a barrier that not all threads reach: 32 of 64",
    "barrier_of_some_lanes": "a barrier that not all threads reach: 32 of 64",
    "shuffle_of_some_lanes": "a warp instruction (shuffle) that not all lanes reach",
    "different_instructions": "lanes of a warp in different instructions",
    "matrices_unwritten": "shared load of memory never written",
}


@pytest.fixture(scope="module")
def library():
    return on_cpu.library("broken_kernels.cpp")


@pytest.mark.parametrize("kernel", SAID)
def test_checker(library, kernel):
    library.run_kernel.restype = ctypes.c_char_p
    said = library.run_kernel(kernel.encode()).decode()
    if SAID[kernel]:
        assert SAID[kernel] in said
    else:
        assert said == ""


def test_every_kernel_is_tested(library):
    names = (ctypes.c_char_p * 100)()
    count = library.kernel_names(names)
    assert {name.decode() for name in names[:count]} == SAID.keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_product(library, dtype):
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    expected = d.double() + a.double() @ b.double()
    library.multiply.restype = ctypes.c_char_p
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, b, d)]
    assert library.multiply(int(dtype == torch.bfloat16), *pointers) == b""
    torch.testing.assert_close(d.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_that_of_torch(library, dtype):
    values = torch.randn(100_000) * torch.logspace(-12, 6, 100_000)
    # Every number of 16 bits, and the middles between neighbours.
    all_bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    finite = all_bits[all_bits.isfinite()].sort().values
    values = torch.cat([values, all_bits, (finite[1:] + finite[:-1]) / 2, torch.tensor([1e30])])
    bits, back = torch.empty(len(values), dtype=dtype), torch.empty(len(values))
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (values, bits, back)]
    count = ctypes.c_int64(len(values))
    library.round_trip(int(dtype == torch.bfloat16), count, *pointers)
    expected = values.to(dtype)
    torch.testing.assert_close(bits, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, expected.float(), rtol=0, atol=0, equal_nan=True)
