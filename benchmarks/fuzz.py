"""Foreign files with one change each, read by every parser, and the outcomes counted.

    python benchmarks/fuzz.py --count=3000 --run=runs/demo/policy_rvq

Each kind of file is made small, damaged in one place at random (a byte or bit, bytes more or fewer, the rest cut off, a
forged count, another value in a JSON file, another feature in a record with right checksums), and read as the programs
read it. ``--run`` adds the JSON document of a run's checkpoint, whose digests are written again after the change.

refused   one line that names the file
equal     the same content: the change does not matter, or a cache was computed again
other     another good file, which no reader can tell from a damaged one, as of a JSON file without digests

Anything else (another exception, a wrong content, more than 20 s or 1 GB for a file) makes the exit status 1.
"""

import argparse
import json
import resource
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the makers of small files are

from mllm_act.checkpoints import checkpoint, digests
from mllm_act.errors import UserError, run
from mllm_act.files import user_path
from mllm_act.policy import Policy
from tests import fuzzing
from tests.data_pipelines import foreign as data
from tests.data_pipelines import foreign_imports as imports
from tests.weights import foreign as weights


def checkpoint_meta(run_folder: Path) -> fuzzing.Format:
    """The JSON document of a run's newest checkpoint, as of somebody who writes digests, too."""

    def make(folder: Path) -> Path:
        workdir, step = checkpoint.find(run_folder)
        shutil.copytree(workdir, folder, dirs_exist_ok=True)
        return folder / "checkpoints" / str(step) / digests.META

    def read(path: Path) -> str:
        step = path.parents[1]
        digests.write(step)
        policy = Policy.load(step.parents[1])
        return json.dumps(policy.meta, sort_keys=True)

    return fuzzing.Format("checkpoint meta", make, read, fuzzing.mutated_json, _equal_or_other)


def _equal_or_other(found: Any, expected: Any) -> str:
    return "equal" if found == expected else "other"


def row(name: str, counts: Counter[str]) -> str:
    """A row of the table."""
    columns = " | ".join(str(counts[end]) for end in ("refused", "equal", "other"))
    return f"| {name} | {columns} | {sum(wrong(counts).values())} |"


def wrong(counts: Counter[str]) -> dict[str, int]:
    """The outcomes that may not be."""
    return {end: count for end, count in counts.items() if end not in fuzzing.RIGHT}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=3000, help="files of all kinds together")
    parser.add_argument("--run", type=user_path, help="a folder with a checkpoint; it is copied")
    arguments = parser.parse_args()
    kinds = [*weights.FORMATS, *data.FORMATS, *imports.FORMATS]
    if arguments.run:
        kinds.append(checkpoint_meta(arguments.run))
    total = Counter[str]()
    print("| file | refused | equal | other | anything else |")
    print("|---|---|---|---|---|")
    for number, kind in enumerate(kinds):
        count = arguments.count * (number + 1) // len(kinds) - sum(total.values())
        with tempfile.TemporaryDirectory() as folder:
            counts = fuzzing.fuzz(kind, Path(folder).resolve(), count)
        total += counts
        print(row(kind.name, counts), flush=True)
    print(row(f"all {total.total()}", total))
    print(
        f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MB"
    )
    if bad := wrong(total):
        print("\n".join(f"{count} x {end}" for end, count in bad.items()))
        raise UserError(f"expected no other outcome, found {sum(bad.values())}; see above")


if __name__ == "__main__":
    run(main)
