"""The nursery of `up_small.py`: it has one small service."""

from __future__ import annotations

import sys

from falkirk.cli import nursery

if __name__ == "__main__":
    sys.exit(nursery.main({"registry": "runtime_service"}))
