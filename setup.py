"""Builds lka_kernels/_C.abi3.so: one library for every torch >= 2.11 and CPython >= 3.10.

Environment:
    LKA_NO_EXTENSION=1     install pure Python; everything runs through torch.
    CUDA_HOME, FORCE_CUDA  where nvcc is; FORCE_CUDA=1 fails if there is none, FORCE_CUDA=0 builds
                           for the CPU only.
    TORCH_CUDA_ARCH_LIST   defaults to the visible GPUs' architectures, or 8.0 and 9.0a.
    LKA_SANITIZE=1         AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import os
import platform
import shutil
import warnings
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# The stable ABI of torch 2.11: the library imports no symbol that a later torch may change.
TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x020b000000000000"


def cuda_home() -> str | None:
    """The CUDA toolkit to build with, or None for a CPU-only library."""
    wanted = os.environ.get("FORCE_CUDA")
    if wanted == "0":
        return None
    nvcc = shutil.which("nvcc")
    candidates = [
        os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"),
        "/usr/local/cuda",
        nvcc and Path(nvcc).resolve().parents[1],
    ]
    for candidate in candidates:
        # nvcc alone may be a link or a wrapper: the toolkit is where its libraries are.
        if candidate and (Path(candidate) / "bin" / "nvcc").exists() and cudart(candidate):
            return str(candidate)
    if wanted == "1":
        raise SystemExit("FORCE_CUDA=1, but no CUDA toolkit with nvcc was found: set CUDA_HOME")
    return None


def cudart(home) -> str | None:
    """The folder of the static CUDA runtime under ``home``, or None."""
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (Path(home) / folder / "libcudart_static.a").exists():
            return str(Path(home) / folder)
    return None


def default_architectures() -> str:
    """The visible GPUs' architectures, or those of the machines this library is measured on."""
    import torch

    if torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        suffix = {(9, 0): "a"}
        return ";".join(f"{a}.{b}{suffix.get((a, b), '')}" for a, b in sorted(found))
    return "8.0;9.0a"


def extension():
    """The extension module and the command that builds it."""
    from torch.utils import cpp_extension

    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp"))
    headers = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh")]
    depends = ["setup.py", *sorted(str(p.relative_to(ROOT)) for p in headers)]
    # -g0: CPython's own flags ask for debugging information, which would be most of the library.
    cxx = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wno-psabi", TARGET_VERSION]
    link = []
    if os.environ.get("LKA_SANITIZE") == "1":
        flags = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g", "-O1"]
        cxx += flags
        link += flags
    arguments = {"cxx": cxx}
    include, library_dirs, libraries = [], [], []
    home = cuda_home()
    if home is not None:
        cpp_extension.CUDA_HOME = home
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_architectures())
        sources += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cu"))
        cxx += ["-DLKA_WITH_CUDA"]
        arguments["nvcc"] = ["-O3", "-std=c++17", "-DUSE_CUDA", "-DLKA_WITH_CUDA", TARGET_VERSION]
        # torch's build switches these conversions off; the kernels widen and narrow with them.
        arguments["nvcc"] += [
            "-U__CUDA_NO_HALF_CONVERSIONS__",
            "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
        ]
        include = [f"{home}/include"]
        library_dirs = [cudart(home)]
        # Static, so that the library also loads where no CUDA runtime is installed.
        libraries = ["cudart_static", "rt", "dl", "pthread"]
    module = cpp_extension.CppExtension(
        "lka_kernels._C",
        sources,
        depends=depends,
        include_dirs=[*include],
        library_dirs=library_dirs,
        libraries=libraries,
        extra_compile_args=arguments,
        extra_link_args=link,
        py_limited_api=True,
    )
    return module, cpp_extension.BuildExtension


def extension_arguments() -> dict:
    """Arguments of ``setup`` for the compiled library; none where it is not wanted."""
    if os.environ.get("LKA_NO_EXTENSION") == "1":
        warnings.warn("LKA_NO_EXTENSION=1: installing without compiled kernels", stacklevel=2)
        return {}
    if platform.system() != "Linux":
        warnings.warn("compiled kernels are built on Linux only", stacklevel=2)
        return {}
    module, build = extension()
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(packages=find_packages(include=["lka_kernels", "lka_kernels.*"]), **extension_arguments())
