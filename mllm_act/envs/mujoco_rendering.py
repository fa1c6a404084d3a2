"""Headless rendering of MuJoCo states, fast enough on a CPU.

There is one OpenGL context per process and one set of uploaded meshes per model name, shared by all live simulators of
that name: a new task costs 0.07 s and 70 MB, against 0.3 s and 130 MB with a ``mujoco.Renderer`` for each. The same
calls as there (``mjv_updateScene``, ``mjr_render``) give the same image. Shadows, reflections and multi-sampling are
off: in software (llvmpipe) they take nine tenths of the time (10 frames/s with them, over 100 without).
"""

import atexit
import functools
import os
import sys
import weakref
from typing import Any

import numpy as np

from mllm_act.errors import UserError

# Both are read when OpenGL starts. One thread per process: worker processes use the cores better than threads (two
# processes with one thread each render twice as many frames as one; two threads in one process do not).
os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("LP_NUM_THREADS", "1")

NO_EGL = (
    "cannot render without a screen (no working EGL: {}); "
    "run `apt-get install libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri`, then `make doctor`"
)
MAX_GEOMS = 1000


def import_mujoco() -> Any:
    """Returns the ``mujoco`` module.

    Raises:
      UserError: it is not installed, or it finds no EGL library (which it looks for when it is imported).
    """
    try:
        import mujoco
    except (AttributeError, ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError):
            raise UserError(f"{error}; run `make setup`") from error
        raise UserError(NO_EGL.format(error)) from error
    return mujoco


def _refuse_tensorflow() -> None:
    """Raises UserError if TensorFlow is imported.

    With TensorFlow in the process, Mesa's software renderer crashes with a segmentation fault as soon as it compiles a
    shader (both bring their own LLVM). JAX and PyTorch do no harm.
    """
    if "tensorflow" in sys.modules:
        raise UserError(
            "cannot render in a process that has imported TensorFlow (it would crash); "
            "render in worker processes: mllm_act.envs.workers.EnvPool"
        )


@functools.cache
def _gl_context() -> Any:
    """Starts OpenGL, once per process."""
    mujoco = import_mujoco()
    mujoco.GLContext._context = None  # otherwise its destructor fails if its constructor does
    try:
        context = mujoco.GLContext(1, 1)  # EGL ignores the size
        context.make_current()
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        raise UserError(NO_EGL.format(str(error).partition(".")[0])) from None
    atexit.register(context.free)  # before the modules that it needs are unloaded
    return context


class Renderer:
    """Renders states of all models with one name (equal except for positions) at ``size`` x ``size`` pixels."""

    def __init__(self, model: Any, size: int) -> None:
        """Uploads the model's meshes and textures, and sets its render quality (multi-sampling, buffer size)."""
        _refuse_tensorflow()
        self._gl = _gl_context()
        self._mujoco = mujoco = import_mujoco()
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50)
        self._scene = mujoco.MjvScene(model, MAX_GEOMS)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._options = mujoco.MjvOption()
        self._rectangle = mujoco.MjrRect(0, 0, size, size)
        self._size = size
        # The context must be freed while OpenGL still runs, also when the interpreter exits.
        self._finalizer = weakref.finalize(self, _free, self._gl, self._context)

    def render(self, model: Any, data: Any, camera: str) -> np.ndarray:
        """Returns the image of the state ``data``, uint8[size, size, 3], top row first, oriented as the camera is
        mounted.
        """
        _refuse_tensorflow()
        mujoco = self._mujoco
        view = mujoco.MjvCamera()
        view.type = mujoco.mjtCamera.mjCAMERA_FIXED
        view.fixedcamid = model.camera(camera).id
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(model, data, self._options, None, view, everything, self._scene)
        self._gl.make_current()
        # At every call: another renderer in this process may have bound its own frame buffer.
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        mujoco.mjr_render(self._rectangle, self._scene, self._context)
        pixels = np.empty((self._size, self._size, 3), np.uint8)
        mujoco.mjr_readPixels(pixels, None, self._rectangle, self._context)
        return pixels[::-1]  # OpenGL starts at the bottom row


def _free(gl: Any, context: Any) -> None:
    gl.make_current()
    context.free()


_renderers: weakref.WeakValueDictionary[tuple[str, int], Renderer] = weakref.WeakValueDictionary()


def shared_renderer(name: str, model: Any, size: int) -> Renderer:
    """Returns the process's renderer for models of this name; it is freed with the last reference to it."""
    renderer = _renderers.get((name, size))
    if renderer is None:
        renderer = _renderers[name, size] = Renderer(model, size)
    return renderer
