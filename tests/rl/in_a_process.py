"""Run by test_train_ppo.py in a process of its own, to be killed or with four devices: trains in the corridor.

python -m tests.rl.in_a_process WORKDIR '{"steps": 10}'
"""

import json
import sys
from pathlib import Path

import pytest

from mllm_act import train_ppo
from tests.rl import small

if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        small.register(patch)
        train_ppo.main(small.config(**json.loads(sys.argv[2])), Path(sys.argv[1]))
