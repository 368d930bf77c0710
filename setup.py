"""Builds kloss. Everything static is in pyproject.toml; here is csrc/: C++ where torch and a compiler are, CUDA where nvcc is."""

import os
import shutil
from glob import glob

from setuptools import Extension, setup

VARIANTS = ("generic_f32", "avx2_f32", "avx512_f32", "avx512_bf16")
BODIES = [f"csrc/cpu/{body}_{variant}.cpp" for body in ("lora", "attention", "rows", "heads") for variant in VARIANTS]
OPS = ["ops", "attention_ops", "rows_ops", "heads_ops", "shared_ops"]
SOURCES = [*(f"csrc/{name}.cpp" for name in OPS), "csrc/cpu/adamw.cpp", "csrc/cpu/spans.cpp", *BODIES]
HEADERS = [path for pattern in ("*.h", "*/*.h", "*/*.inl") for path in glob(f"csrc/{pattern}")]
# Code for three chips, and PTX that later ones compile. Products and sums are not fused, so that a CPU has the same bits.
CHIPS = (("80", "sm_80"), ("90a", "sm_90a"), ("100", "[sm_100,compute_100]"))
CUDA = ["-O3", "-std=c++17", "-fmad=false", *(f"-gencode=arch=compute_{chip},code={code}" for chip, code in CHIPS)]
LIBRARY = ["-shared", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=2"]

try:
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension
except ImportError:  # an isolated build: no C++, so that torch is not fetched a second time
    extension = {}
else:

    class Build(BuildExtension):
        def build_extension(self, ext):
            if ext.name != "kloss._cuda":
                return super().build_extension(ext)
            target = self.get_ext_fullpath(ext.name)
            self.mkpath(target.rpartition("/")[0])
            self.spawn([nvcc, *CUDA, *LIBRARY, *sorted(glob("csrc/cuda/*.cu")), "-o", target])

    # Against torch's stable ABI as of 2.11, the oldest that kloss runs with: what is built with a later torch loads there.
    # A square root is an instruction only where it need not set errno, nor keep the order of traps.
    flags = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    strip = [] if "-fsanitize" in os.environ.get("CXXFLAGS", "") else ["-s"]  # a tenth of the size; a sanitizer names functions
    arguments = {"extra_compile_args": {"cxx": flags}, "extra_link_args": strip, "py_limited_api": True}
    modules = [CppExtension("kloss._C", SOURCES, depends=HEADERS, **arguments)]
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{CUDA_HOME}/bin")
    if nvcc:  # its sources are not named here: torch would ask for the CUDA that it was built with
        modules.append(Extension("kloss._cuda", [], py_limited_api=True))
    for module in modules:
        module.optional = True  # without a compiler kloss runs in plain torch
    extension = {
        "ext_modules": modules,
        "cmdclass": {"build_ext": Build.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},  # one wheel for this Python and all later ones
    }

setup(**extension)
