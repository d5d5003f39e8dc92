"""Builds the native engine. All else about the package is in pyproject.toml."""

import os
import platform
from concurrent.futures import ThreadPoolExecutor

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = "intlm/engine/native"
INCLUDED = (
    "preamble",
    "bytes",
    "avx512",
    "tiles",
    "noise",
    "matrix",
    "forward",
    "votes",
    "parallel",
    "whitening",
    "update",
    "sample",
    "population",
)
DEPENDS = ("native.h", *(f"{name}.inc" for name in INCLUDED))
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fwrapv", "-pthread", "-Wno-psabi"]
# Flags of its own for each file, chosen between at run time: one binary runs on any processor of its kind.
AVX512 = [
    *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni")),
    "-mbmi2",
    "-mprefer-vector-width=512",
]
FLAGS = {"avx2": ["-mavx2"], "avx512": AVX512, "amx": AVX512}


class BuildNative(build_ext):
    """Compiles each instruction set with its own flags."""

    def build_extension(self, extension):
        """Compile and link; a failure is reported and leaves the package without a native engine."""
        x86 = platform.machine().lower() in ("x86_64", "amd64")

        def compiled(source):
            name = source.rsplit("/", 1)[1].removesuffix(".cc")
            if name in FLAGS and not x86:
                return []
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                extra_postargs=COMMON + FLAGS.get(name, []),
                depends=extension.depends,
            )

        with ThreadPoolExecutor(os.cpu_count()) as several:
            objects = [file for files in several.map(compiled, extension.sources) for file in files]
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(extension.name), extra_postargs=["-pthread"], target_lang="c++"
        )


setup(
    ext_modules=[
        Extension(
            "intlm.engine._native",
            sources=[
                f"{FOLDER}/{name}.cc" for name in ("scalar", "avx2", "avx512", "amx", "peak", "dispatch")
            ],
            depends=[f"{FOLDER}/{name}" for name in DEPENDS],
            language="c++",
            optional=True,  # no compiler, no native engine: XLA serves instead, and the command says so
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
