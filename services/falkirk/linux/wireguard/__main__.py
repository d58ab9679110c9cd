"""`python -m falkirk.linux.wireguard FILE`: the file is an `InterfaceRequest` as JSON; it holds a key, so it is root's own."""

from __future__ import annotations

import sys

from falkirk.linux.wireguard.loop import main

sys.exit(main(sys.argv[1]))
