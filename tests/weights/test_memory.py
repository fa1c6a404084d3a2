"""Peak host memory of importing and loading, each measured in its own process.

On the CPU the loaded arrays are in host memory too, so their size is subtracted. Pages of mapped files count while they
are mapped.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from mllm_act.models.mllm import MLLMConfig
from mllm_act.models.presets import PRESETS
from mllm_act.weights import names, safetensors
from mllm_act.weights.shapes import pretrained_shapes
from mllm_act.weights.tensors import Tensor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

MEGABYTE = 1 << 20
LARGEST = 64 * MEGABYTE  # the embedding
# Everything but tensors: compiled programs, the allocator's buffers, Python objects. Measured: 5 to 15 MB.
SLACK = 24 * MEGABYTE

CHILD = """
import json, sys
from pathlib import Path

import jax
from transformers import AutoConfig

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

from mllm_act.models.mllm import MLLMConfig
from mllm_act.weights import huggingface
from mllm_act.weights.convert import convert
from mllm_act.weights.folder import load_pretrained
from mllm_act.weights.shapes import pretrained_shapes

what, dtype, config, source, out = sys.argv[1:]
config = MLLMConfig.from_dict(json.loads(config))
like = {
    path: jax.ShapeDtypeStruct(shape, "float32")
    for path, shape in pretrained_shapes(config, projector=False).items()
}
jax.jit(lambda x: x + 1)(0.0)  # starts the backend
AutoConfig.for_model("llava")  # imports PyTorch too, where it is installed
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
before = memory("VmRSS")
arrays = 0
if what == "import":
    convert(config, [huggingface.read(Path(source), source)], Path(out), dtype or None)
else:
    loaded = load_pretrained(Path(out), like)
    arrays = sum(array.nbytes for array in loaded.values())
print(json.dumps({"peak": memory("VmHWM") - before, "arrays": arrays}))
"""


def big() -> MLLMConfig:
    """A Llama whose tensors are large beside everything else, with a small CLIP."""
    tiny = PRESETS["tiny"].model
    language = dataclasses.replace(
        tiny.language, vocabulary=16384, width=1024, mlp_width=4096, layers=3, heads=8, tied=False
    )
    return dataclasses.replace(tiny, language=language)


def write_source(config: MLLMConfig, path: Path) -> None:
    """A LLaVA of random numbers in two shards, written tensor by tensor."""
    shapes = pretrained_shapes(config, projector=False)
    header: dict[str, Tensor] = {}
    for name, target in names.targets(config, projector=False).items():
        shape = shapes[target.path] if target.layer is None else shapes[target.path][1:]
        theirs = names.their_shape(target.path, shape, config.vision.family)
        header[name] = Tensor(theirs, np.dtype(np.float32), lambda s=theirs: np.ones(s, np.float32))
    assert max(tensor.bytes for tensor in header.values()) == LARGEST
    path.mkdir()
    index = {}
    for shard in range(2):
        part = dict(list(header.items())[shard::2])

        def values(part: dict[str, Tensor] = part) -> Iterator[tuple[str, np.ndarray]]:
            for name, tensor in part.items():
                yield name, tensor.read()

        safetensors.write(path / f"{shard}.safetensors", part, values())
        index |= dict.fromkeys(part, f"{shard}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    Tokenizer(models.BPE()).save(str(path / "tokenizer.json"))
    language, vision = config.language, config.vision
    (path / "config.json").write_text(json.dumps({
        "model_type": "llava",
        "text_config": {
            "vocab_size": language.vocabulary, "hidden_size": language.width, "num_hidden_layers": language.layers,
            "intermediate_size": language.mlp_width, "num_attention_heads": language.heads,
            "num_key_value_heads": language.kv_heads, "rms_norm_eps": language.epsilon,
        },
        "vision_config": {
            "hidden_size": vision.width, "num_hidden_layers": vision.layers + 1, "patch_size": vision.patch_size,
            "intermediate_size": vision.mlp_width, "num_attention_heads": vision.heads, "image_size": vision.image_size,
        },
    }))  # fmt: skip


def test_import_and_loading_take_at_most_two_of_the_largest_tensors(tmp_path: Path) -> None:
    config = big()
    write_source(config, tmp_path / "source")
    description = json.dumps(dataclasses.asdict(config))
    figures = {}
    for what in ("import", "load"):
        arguments = [what, "bfloat16", description, str(tmp_path / "source"), str(tmp_path / "out")]
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        figures[what] = json.loads(done.stdout)
    print({w: {k: round(v / MEGABYTE) for k, v in f.items()} for w, f in figures.items()})
    assert figures["import"]["arrays"] == 0
    assert figures["load"]["arrays"] > 2 * LARGEST  # or the bound would mean little
    for figure in figures.values():
        assert figure["peak"] - figure["arrays"] <= 2 * LARGEST + SLACK, figures
