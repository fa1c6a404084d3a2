"""Run by test_train_ppo.py in a process with four devices: trains in the corridor with the weights split.

python -m tests.rl.on_four_devices WORKDIR UPDATES
"""

import sys
from pathlib import Path

import pytest

from mllm_act import train_ppo
from tests.rl import small

if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        small.register(patch)
        sizes = {"mesh__data": 1, "mesh__fsdp": 2, "mesh__tensor": 2}
        train_ppo.main(small.config(steps=int(sys.argv[2]), **sizes), Path(sys.argv[1]))
