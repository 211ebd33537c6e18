"""Uses an installed lka_kernels: try_install.py ENVIRONMENT compiled|pure."""

import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

environment, kind = Path(sys.argv[1]).resolve(), sys.argv[2]
compiled = kind == "compiled"

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import lka_kernels


def require(condition: bool, what: str) -> None:
    """Stop with ``what`` unless ``condition``; unlike assert, also under -O."""
    if not condition:
        sys.exit(f"try_install: {what}")


package = Path(lka_kernels.__file__).resolve().parent
require(package.is_relative_to(environment), f"imported {package}, not of {environment}")
libraries = list(package.glob("*.so"))
require(len(libraries) == (1 if compiled else 0), f"compiled libraries: {libraries}")
ours = [w for w in caught if "lka_kernels" in str(w.message)]
require(len(ours) == (0 if compiled else 1), f"warnings: {[str(w.message) for w in ours]}")
status = lka_kernels.available_backends()["cpu"]
require((status == "ready") == compiled, f"cpu backend: {status}")

torch.manual_seed(0)
x = torch.randn(2, 6, 13, 11, requires_grad=True)
weight = torch.randn(6, 1, 7, 7, requires_grad=True)
probe = torch.randn(2, 6, 13, 11)
results = []
for convolve in (
    lambda: lka_kernels.depthwise_conv2d(x, weight, padding=3),
    lambda: F.conv2d(x, weight, padding=3, groups=6),
):
    y = convolve()
    results.append((y, *torch.autograd.grad((y * probe).sum(), (x, weight))))
for ours, expected in zip(*results, strict=True):
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)

adapter = lka_kernels.FusedLKA(16, init="paper")
tokens = torch.randn(2, 49, 16)
fused = adapter(tokens)
with lka_kernels.use_backend("torch"):
    torch.testing.assert_close(fused, adapter(tokens), rtol=1e-4, atol=1e-5)
print(f"{kind} install works: {lka_kernels.explain(x, weight, padding=3).splitlines()[0]}")
