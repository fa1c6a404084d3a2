"""Runs one benchmark: ``python -m mllm_act.bench NAME [flags]``."""

import importlib
import sys

from mllm_act.errors import UserError, nearest, run

# name -> module with a main(argv)
BENCHES = {name: f"mllm_act.bench.{name}" for name in ("data", "resume", "train", "act")}


def main() -> None:
    names = ", ".join(BENCHES)
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(f"usage: python -m mllm_act.bench NAME [--help]\nbenchmarks: {names}")
        return
    name = sys.argv[1]
    if name not in BENCHES:
        raise UserError(f"no benchmark {name!r}; {nearest(name, BENCHES)}; choose one of: {names}")
    importlib.import_module(BENCHES[name]).main(sys.argv[2:])


if __name__ == "__main__":
    run(main)
