"""`python -m falkirk.linux.lower REQUEST`: the request is a `LowerRequest` as JSON; the CLI writes it."""

from __future__ import annotations

import sys

from falkirk.linux.lower.request import REQUEST
from falkirk.linux.lower.run import run

sys.exit(run(REQUEST.decode(sys.argv[1])))
