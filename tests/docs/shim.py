"""The command `adflows` of shell blocks: with the tests' shorter settings, without Prefect."""

from __future__ import annotations

import os
import sys

from flows.cli.app import main
from tests.docs.runner import shortened

if __name__ == "__main__":
    os.environ["ADFLOWS_LOCAL"] = "1"
    sys.argv = ["adflows", *shortened(sys.argv[1:])]
    main()
