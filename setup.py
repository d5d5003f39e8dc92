"""Builds the native engine. All else about the package is in pyproject.toml."""

import platform

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = "intlm/engine/native"
DEPENDS = (
    "native.h",
    *(
        f"{n}.inc"
        for n in ("preamble", "bytes", "noise", "matrix", "forward", "votes", "sample", "population")
    ),
)
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fwrapv", "-pthread", "-Wno-psabi"]
# A flag of its own for each file, chosen between at run time: one binary runs on any processor of its kind.
FLAGS = {
    "avx2": ["-mavx2"],
    "avx512": [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni")]
    + ["-mbmi2", "-mprefer-vector-width=512"],
}


class BuildNative(build_ext):
    """Compiles each instruction set with its own flags."""

    def build_extension(self, extension):
        """Compile and link; a failure is reported and leaves the package without a native engine."""
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        objects = []
        for source in extension.sources:
            name = source.rsplit("/", 1)[1].removesuffix(".cc")
            if name in FLAGS and not x86:
                continue
            objects += self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                extra_postargs=COMMON + FLAGS.get(name, []),
                depends=extension.depends,
            )
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(extension.name), extra_postargs=["-pthread"], target_lang="c++"
        )


setup(
    ext_modules=[
        Extension(
            "intlm.engine._native",
            sources=[f"{FOLDER}/{name}.cc" for name in ("dispatch", "scalar", "avx2", "avx512")],
            depends=[f"{FOLDER}/{name}" for name in DEPENDS],
            language="c++",
            optional=True,  # no compiler, no native engine: XLA serves instead, and the command says so
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
