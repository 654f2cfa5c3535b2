"""What goes into the package beside its Python: the operators for onnxruntime, where they can be compiled."""

import importlib.util
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = "slmops_kernels.so"  # beside the package, as the server looks for it


class Kernels(BuildHookInterface):
    """Makes the wheel one of this platform, or leaves it as it is and says why."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002  # hatchling's signature
        """Before the files are collected."""
        spec = importlib.util.spec_from_file_location("kernels_build", Path(self.root, "kernels/build.py"))
        assert spec
        assert spec.loader
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        self._folder = tempfile.TemporaryDirectory()
        library = Path(self._folder.name, LIBRARY)
        try:
            script.build(library)
        except script.Failed as why:
            self.app.display_warning(f"the package is without {LIBRARY}, with which it is faster: {why}")
            return
        self.app.display_info(f"the package has {LIBRARY}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_')}"
        for files in ("force_include", "force_include_editable"):
            build_data[files][str(library)] = LIBRARY

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        """After the wheel is written."""
        self._folder.cleanup()
