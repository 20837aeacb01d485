"""Builds hybridk2._native by driving CMake; everything else stands in pyproject.toml."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt and puts the module where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        # cmake and ninja come from the build requirements; their scripts need not be on PATH when
        # pip runs without isolation from a virtual environment that is not activated.
        import cmake
        import ninja
        import pybind11

        # In the source tree, not in build_temp, which pip makes anew: rebuilding is incremental.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        tools = os.pathsep.join((cmake.CMAKE_BIN_DIR, ninja.BIN_DIR))
        environment = {**os.environ, "PATH": os.pathsep.join((tools, os.environ.get("PATH", "")))}
        # A build folder remembers the tools it was configured with, which under build isolation
        # lie in a temporary environment: configure afresh; objects that are up to date are kept.
        configure = [
            *("cmake", "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DPYBIND11_FINDPYTHON=ON",
        ]
        subprocess.run(configure, check=True, env=environment)
        subprocess.run(["cmake", "--build", str(build)], check=True, env=environment)
        self._install(build, Path(self.get_ext_fullpath(ext.name)))

    @staticmethod
    def _install(build: Path, target: Path) -> None:
        """Replace the module in one step: a process that has it loaded keeps the old file."""
        (module,) = build.glob("_native.*.so")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".native-") as folder:
            shutil.copy2(module, folder)
            os.replace(Path(folder) / module.name, target)


setup(ext_modules=[Extension("hybridk2._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
