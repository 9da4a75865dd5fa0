"""The build step that compiles kernels for CPUs; everything else is in pyproject.toml.

FHOPT_TARGETS has the names of targets (codegen/prebuilt.py), separated by spaces. The default is `here`, the target of
this machine, if it has a compiler and the dependencies are installed; otherwise kernels are compiled at first use. ""
builds none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
TARGETS = os.environ.get("FHOPT_TARGETS", "here").split()


class BuildKernels(Command):
    """Compile the libraries of TARGETS: into the wheel, or for an editable install next to their sources."""

    user_options = []  # noqa: RUF012 (setuptools)
    editable_mode = False

    def initialize_options(self) -> None:
        """Set no option."""
        self.build_lib = None

    def finalize_options(self) -> None:
        """Use the folder of the other files of the wheel."""
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        """Run the compiler. An error ends the build if targets were named."""
        root = ROOT if self.editable_mode else Path(self.build_lib).resolve()
        folder = root / "fhopt" / "codegen" / "prebuilt"
        if not TARGETS:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier build
            return
        # Kernels need torch's headers; pip hides installed packages from builds by PYTHONPATH, which -E ignores.
        command = [sys.executable, "-E", "-B", "-m", "fhopt.codegen.build_prebuilt", str(folder), *TARGETS]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            if "FHOPT_TARGETS" in os.environ:
                sys.exit(f"Kernels for {' '.join(TARGETS)} were not compiled: {reason}")
            print(f"Kernels are not prebuilt, but compiled at first use: {reason}", file=sys.stderr)

    def get_source_files(self) -> list[str]:
        """Return none: the sources are files of packages."""
        return []

    def get_outputs(self) -> list[str]:
        """Return none: what is compiled depends on the machine."""
        return []

    def get_output_mapping(self) -> dict[str, str]:
        """Return none: an editable install finds them next to the sources."""
        return {}


class BuildWithKernels(build):
    """The build, with kernels as its last step."""

    sub_commands = [*build.sub_commands, ("build_kernels", None)]  # noqa: RUF012 (setuptools)


class PlatformDistribution(Distribution):
    """A distribution with native code, though none of it is an extension module."""

    def has_ext_modules(self) -> bool:
        """Return whether there is native code."""
        return bool(TARGETS)


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and every Python, as kernels are called through ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of the file name."""
        tags = super().get_tag()
        return ("py3", "none", tags[2]) if TARGETS else tags


setup(
    distclass=PlatformDistribution,
    cmdclass={"build": BuildWithKernels, "build_kernels": BuildKernels, "bdist_wheel": PlatformWheel},
)
