"""Builds kloss. Everything static is in pyproject.toml; here is csrc/, built where torch and a C++ compiler are at hand."""

from setuptools import setup

SOURCES = ["csrc/ops.cpp", *(f"csrc/cpu/lora_{name}.cpp" for name in ("generic_f32", "avx2_f32", "avx512_f32", "avx512_bf16"))]

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:  # an isolated build: no C++, so that torch is not fetched a second time
    extension = {}
else:
    # Against torch's stable ABI as of 2.11, the oldest that kloss runs with: what is built with a later torch loads there.
    flags = ["-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    module = CppExtension("kloss._C", SOURCES, extra_compile_args={"cxx": flags}, py_limited_api=True)
    module.optional = True  # without a compiler kloss runs in plain torch
    extension = {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)}}

setup(**extension)
