"""The command line: ``python -m laplace_llm.benchmark {speed,calibration} [options]``."""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = ("speed", "calibration")


def main(arguments: list[str]) -> None:
    """Run one of the benchmarks with the options that follow its name."""
    if not arguments or arguments[0] not in COMMANDS:
        raise SystemExit(f"usage: python -m laplace_llm.benchmark {{{','.join(COMMANDS)}}} [-h]")
    module = import_module(f"laplace_llm.benchmark.{arguments[0]}.command")
    module.main(arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
