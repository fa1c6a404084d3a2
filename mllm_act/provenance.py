"""What a checkpoint records about the code that made it: versions and the git commit."""

import json
import subprocess
from importlib import metadata
from pathlib import Path

LIBRARIES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "ml-collections",
    "numpy",
    "tokenizers",
)
ROOT = Path(__file__).parents[1]  # of the checkout; of site-packages where mllm_act is installed


def library_version(name: str) -> str | None:
    """Returns the installed version of a distribution, or None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Returns the commit of this checkout, or the one that pip installed from; None if neither is known.

    A repository that merely contains the virtual environment is not ours: only ``.git`` beside the package counts.
    """
    if (ROOT / ".git").exists():
        try:
            git = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
            done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False)
        except FileNotFoundError:  # no git on this machine
            return None
        return done.stdout.strip() or None
    try:
        source = metadata.distribution("mllm-act").read_text("direct_url.json")  # PEP 610
    except metadata.PackageNotFoundError:
        return None
    return json.loads(source or "{}").get("vcs_info", {}).get("commit_id")
