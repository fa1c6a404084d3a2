"""Checks this machine, or the checkpoints of a run, and suggests fixes.

    python -m mllm_act.doctor
    python -m mllm_act.doctor runs/mine

The second compares every file of a run's checkpoints with its digest. Prints one line per check: ``ok``, ``note``
(optional, but worth knowing) or ``fail``. The exit status is 1 if any check fails. Checks that could crash the process
(such as a driver that aborts) run in a child process.
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mllm_act.errors import UserError, run
from mllm_act.files import user_path

LOCK = Path(__file__).parents[1] / "requirements" / "lock.txt"
DISK_GB = 5  # for the output of the demo and its compilation caches, with a margin
MEMORY_GB = 6  # for training beside two simulators and TensorFlow
CHILD_SECONDS = 120

JAX = """
import jax, jax.numpy as jnp, numpy as np
x = np.arange(256 * 256, dtype=np.float32).reshape(256, 256) / 65536
y = jax.jit(lambda x: x @ x)(x)
assert np.allclose(y, x @ x, rtol=0.02), 'a jitted matrix product is wrong'
d = jax.devices()
print(f'{jax.__version__}: {len(d)} x {d[0].device_kind}; a jitted matrix product is correct')
"""
TENSORFLOW = """
import tensorflow as tf, tensorflow_datasets as tfds
image = tf.io.encode_jpeg(tf.fill([200, 200, 3], tf.constant(128, tf.uint8)))
data = tf.data.Dataset.from_tensors(image).repeat(8).map(tf.io.decode_jpeg, tf.data.AUTOTUNE)
shapes = {tuple(x.shape) for x in data.as_numpy_iterator()}
assert shapes == {(200, 200, 3)}, f'decoded images have shapes {shapes}'
print(f'{tf.__version__}, tensorflow-datasets {tfds.__version__}: tf.data decodes images')
"""
RENDERING = """
import mujoco, os, time
model = mujoco.MjModel.from_xml_string(
    '<mujoco><worldbody><light pos="0 0 3"/><geom type="box" size=".2 .2 .2" rgba="1 0 0 1"/>'
    '<camera name="c" pos="0 -2 1" xyaxes="1 0 0 0 .5 1"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 200, 200)
renderer.update_scene(data, 'c')
renderer.render()
start = time.perf_counter()
frame = renderer.render()
elapsed = time.perf_counter() - start
assert frame.shape == (200, 200, 3) and frame.std() > 1, 'the rendered frame is empty'
backend = os.environ.get('MUJOCO_GL', 'default')
print(f'MuJoCo {mujoco.__version__} by {backend}: a 200x200 frame in {1e3 * elapsed:.1f} ms')
renderer.close()
"""
SIMULATOR = """
import importlib.metadata, metaworld
from metaworld.policies import ENV_POLICY_MAP
benchmark = metaworld.MT1('reach-v3', seed=0)
env = benchmark.train_classes['reach-v3']()
env.set_task(benchmark.train_tasks[0])
observation, _ = env.reset()
expert = ENV_POLICY_MAP['reach-v3']()
info = {'success': 0}
for _ in range(200):
    observation, _, _, _, info = env.step(expert.get_action(observation).clip(-1, 1))
    if info['success']: break
assert info['success'], 'the scripted expert of reach-v3 does not succeed'
print(f"metaworld {importlib.metadata.version('metaworld')}: the expert solves reach-v3")
"""
BABYAI = """
import importlib.metadata
from mllm_act import envs
env = envs.make('babyai')
env.reset('goto', 0, 0)
success = False
while not success:
    _, _, success = env.step(env.expert_action())
print(f"minigrid {importlib.metadata.version('minigrid')}: the bot solves goto")
"""
LANGUAGE_REARRANGEMENT = """
import os
from mllm_act import envs
from mllm_act.envs.language_rearrangement import official
env = envs.make('language_rearrangement_112')
env.reset('move-from-to', 0, 0)
success = False
while not success:
    observation, _, success = env.step(env.expert_action())
assert observation['images']['head'].std() > 10, 'the image is empty'
known = 'official episodes: none, LANGR_EPISODES is not set'
if os.environ.get(official.VARIABLE):
    known = f'{sum(len([official.episode(s, i) for i in range(100)]) for s in official.SPLITS)} official episodes'
print(f'the expert solves move-from-to; {known}')
"""
FETCH_PICK = """
import importlib.metadata
from mllm_act import envs
env = envs.make('fetch_pick')
env.reset('orange', 0, 0)
success = False
while not success:
    observation, _, success = env.step(env.expert_action())
assert observation['images']['head'].std() > 10, 'the image is empty'
print(f"gymnasium-robotics {importlib.metadata.version('gymnasium-robotics')}: the expert picks up the orange")
"""
CALVIN = """
import numpy as np
from mllm_act import envs
env = envs.make('calvin')
env.reset('any', 100_000, 0)
observation, _, _ = env.step(np.zeros(7, np.float32))
shapes = ', '.join(f'{image.shape[0]}x{image.shape[1]}' for image in observation['images'].values())
assert observation['images']['static'].std() > 10, 'the image is empty'
env.close()
print(f'the simulator takes a step and draws {shapes}')
"""
VIDEO = """
import sys, imageio.v2 as imageio, numpy as np
with imageio.get_writer(sys.argv[1], fps=10) as writer:
    for i in range(5): writer.append_data(np.full((64, 64, 3), 50 * i, np.uint8))
assert sum(1 for _ in imageio.get_reader(sys.argv[1])) == 5, 'a written video cannot be read back'
print('ffmpeg writes a video and reads it back')
"""

SETUP = "make setup"
EGL = "apt-get install libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri (or the driver's EGL library)"


class Finding(NamedTuple):
    """The result of one check: ``status`` is ok, note or fail; ``fix`` may be empty."""

    status: str
    text: str
    fix: str = ""


def child(
    code: str, fix: str, *arguments: str, environment: dict[str, str] | None = None
) -> Finding:
    """Runs the Python source of a check in its own process; the last line that it prints is the finding."""
    variables = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", **(environment or {})}
    try:
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=variables,
            capture_output=True,
            text=True,
            timeout=CHILD_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return Finding("fail", f"no answer within {CHILD_SECONDS} s", fix)
    if result.returncode == 0:
        return Finding("ok", result.stdout.strip().splitlines()[-1])
    if result.returncode < 0:
        return Finding("fail", f"the process was killed by signal {-result.returncode}", fix)
    # The line that names the error: stack frames come before it, messages of destructors may follow.
    output = result.stderr.strip().splitlines()
    errors = [
        line
        for line in output
        if "Error" in line and not line.startswith((" ", "Exception ignored"))
    ]
    return Finding("fail", (errors or output or ["the check failed without a message"])[0], fix)


def python() -> Finding:
    """Compares the version of Python with the oldest supported one."""
    text = f"{platform.python_version()} at {sys.executable}"
    return (
        Finding("ok", text)
        if sys.version_info >= (3, 11)
        else Finding("fail", f"{text}; expected 3.11 or newer", SETUP)
    )


def packages(lock: Path = LOCK) -> Finding:
    """Compares the installed packages with the lock file; a different version is only a note."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return Finding("fail", "the package `packaging` is missing", SETUP)
    if not lock.is_file():
        return Finding("note", f"no {lock}: not a checkout, so versions were not compared")
    lines = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    pins = [pin for pin in map(Requirement, lines) if pin.marker is None or pin.marker.evaluate()]
    missing, different = [], []
    for pin in pins:
        try:
            version = importlib.metadata.version(pin.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(pin.name)
            continue
        if not pin.specifier.contains(version, prereleases=True):
            pinned = str(pin.specifier).removeprefix("==")
            different.append(f"{pin.name} {version} (pinned {pinned})")
    if missing:
        text = f"{len(missing)} of {len(pins)} missing: {', '.join(missing[:6])}"
        return Finding("fail", text, SETUP)
    if different:
        text = f"{len(different)} of {len(pins)} differ from the lock: {', '.join(different[:6])}"
        return Finding("note", text, SETUP)
    return Finding("ok", f"all {len(pins)} as pinned in {lock.parent.name}/{lock.name}")


def jax() -> Finding:
    """Compiles and runs a matrix product."""
    return child(JAX, f"{SETUP}; JAX_PLATFORMS=cpu ignores an accelerator that does not work")


def tensorflow() -> Finding:
    """Decodes images with tf.data."""
    return child(TENSORFLOW, SETUP)


def rendering() -> Finding:
    """Renders a MuJoCo frame, on Linux without a display."""
    if sys.platform != "linux":
        return child(RENDERING, SETUP)
    return child(RENDERING, EGL, environment={"MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl")})


def simulator() -> Finding:
    """Solves a Meta-World task with its scripted expert."""
    return child(SIMULATOR, SETUP)


def babyai() -> Finding:
    """Solves a BabyAI mission with minigrid's bot."""
    return child(BABYAI, SETUP)


def language_rearrangement() -> Finding:
    """Solves an episode of Language Rearrangement, and reads the official ones if there are any."""
    return child(LANGUAGE_REARRANGEMENT, f"{SETUP}, or python -m data_pipelines.import_langr")


def fetch_pick() -> Finding:
    """Picks up an object with the Fetch robot."""
    return child(FETCH_PICK, SETUP)


def calvin() -> Finding:
    """Takes a step in CALVIN's simulator; without a checkout this is only a note."""
    if not os.environ.get("CALVIN_ENV"):
        text = "CALVIN_ENV is not set; only the environment calvin needs it"
        return Finding("note", text, "see docs/environments.md")
    return child(CALVIN, "make calvin")


def video() -> Finding:
    """Writes a video and reads it back."""
    with tempfile.TemporaryDirectory() as folder:
        return child(VIDEO, SETUP, f"{folder}/video.mp4")


def temporary() -> Finding:
    """Writes a temporary file."""
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(bytes(2**20))
            file.flush()
    except OSError as error:
        text = f"cannot write a temporary file: {error}"
        return Finding("fail", text, "set TMPDIR to a writable folder with free space")
    return Finding("ok", f"{tempfile.gettempdir()} is writable")


def disk() -> Finding:
    """Compares the free disk space with what the demo needs."""
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    text = f"{free:.0f} GB free at {Path.cwd()}"
    if free >= DISK_GB:
        return Finding("ok", text)
    return Finding("fail", f"{text}; expected {DISK_GB} GB", "free some disk space")


def memory() -> Finding:
    """Compares the memory with what the demo needs; too little is only a note."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    text = f"{size:.0f} GB, {cores} cores"
    if size >= MEMORY_GB:
        return Finding("ok", text)
    text = f"{text}; the demo was tested with {MEMORY_GB} GB or more"
    return Finding("note", text, "a smaller --config.data.batch_size")


def parity() -> Finding:
    """Looks for PyTorch, which only comparisons with reference implementations need."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        text = "no PyTorch; only comparisons with reference implementations need it"
        return Finding("note", text, "make parity")
    return Finding("ok", f"torch {version}: comparisons can run")


CHECKS: dict[str, Callable[[], Finding]] = {
    "python": python,
    "packages": packages,
    "jax": jax,
    "tensorflow": tensorflow,
    "rendering": rendering,
    "simulator": simulator,
    "babyai": babyai,
    "langr": language_rearrangement,
    "fetch_pick": fetch_pick,
    "calvin": calvin,
    "video": video,
    "temporary": temporary,
    "disk": disk,
    "memory": memory,
    "parity": parity,
}


def report(name: str, finding: Finding) -> None:
    """Prints the line of one check."""
    fix = f"; fix: {finding.fix}" if finding.fix else ""
    print(f"{finding.status:5} {name:11} {finding.text}{fix}", flush=True)


def check_folder(path: Path) -> None:
    """Verifies the checkpoints of a run.

    Raises:
      UserError: if a part is damaged, missing or another run's; fixes are printed above.
    """
    from mllm_act.checkpoints.check import check_run  # imports JAX, which may not work here

    rows = check_run(path)
    for status, name, text, fix in rows:
        report(name, Finding(status, text, fix))
    failed = sum(row.status == "fail" for row in rows)
    if failed:
        raise UserError(f"{path}: {failed} checks failed; fixes are suggested above")
    print(f"{path} is whole")


def main() -> None:
    """Runs the program."""
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m mllm_act.doctor", description=description)
    parser.add_argument("run", nargs="?", type=user_path, help="verify this run's checkpoints")
    path = parser.parse_args().run
    if path is not None:
        check_folder(path)
        return
    failed = []
    for name, check in CHECKS.items():
        finding = check()
        report(name, finding)
        if finding.status == "fail":
            failed.append(name)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(CHECKS)} checks failed ({', '.join(failed)}); fixes are suggested above"
        )
    print("Everything required works on this machine. Next: make demo")


if __name__ == "__main__":
    run(main)
