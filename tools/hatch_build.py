"""Makes the gRPC stubs from protos/ before a wheel or an editable install is built.

The generator itself is tools/gen-protos, so that a developer and a build run the same code. A source tree without
protos/ (an unpacked wheel) has its stubs already and nothing is made.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class StubsHook(BuildHookInterface[Any]):
    """Runs before every wheel and editable build."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate the stubs; `version` is "standard" or "editable". Raises SystemExit with protoc's code where a proto doesn't compile."""
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        generator = runpy.run_path(str(root / "tools" / "gen-protos"), run_name="gen_protos")
        generator["generate"](root)
