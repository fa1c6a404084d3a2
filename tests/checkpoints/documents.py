"""Changes the JSON document of a checkpoint as if it had been written so, digests included."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mllm_act.checkpoints import checkpoint, digests


def edit(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Calls ``change`` with the document of a run's newest step and stores what it makes of it."""
    workdir, step = checkpoint.find(run)
    folder = workdir / "checkpoints" / str(step)
    path = folder / digests.META
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))
    digests.write(folder)
