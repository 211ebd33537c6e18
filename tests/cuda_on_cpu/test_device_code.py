"""Which kernels a device can run: a pure function of its version and that of the compiled code."""

import on_cpu
import pytest

pytestmark = pytest.mark.skipif(on_cpu.compiler() is None, reason="no C++ compiler")


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_machine_code_and_newer_ptx_serve(capability):
    for compiled in (80, capability):
        for tensor_cores in (False, True):
            assert on_cpu.why_device_cannot(capability, compiled, tensor_cores) == ""


def test_an_older_device_has_no_tensor_core_kernels():
    said = on_cpu.why_device_cannot(75, 75, True)
    assert said == "it needs compute capability 8.0 or newer; the device has 7.5"
    assert on_cpu.why_device_cannot(75, 75, False) == ""


def test_ptx_for_less_stays_that_on_a_newer_device():
    """What is compiled below 8.0 has no tensor-core instructions, wherever it is translated."""
    said = on_cpu.why_device_cannot(90, 75, True)
    assert "compiled for compute capability 8.0 or newer" in said
    assert "of 9.0, the library holds PTX of 7.5" in said
    assert "TORCH_CUDA_ARCH_LIST=9.0" in said
    assert on_cpu.why_device_cannot(90, 75, False) == ""


@pytest.mark.parametrize("tensor_cores", [False, True])
def test_no_code_at_all(tensor_cores):
    said = on_cpu.why_device_cannot(120, 0, tensor_cores)
    assert said.startswith("the library holds no kernels for compute capability 12.0")


def test_the_device_is_named_before_the_code():
    assert "needs compute capability 8.0" in on_cpu.why_device_cannot(70, 0, True)
