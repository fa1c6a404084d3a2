"""Reads Llama weights in GGUF, the format of llama.cpp: tensors (often quantized), sizes and tokenizer in one file."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from mllm_act.errors import UserError
from mllm_act.weights import bpe
from mllm_act.weights.tensors import Source, Tensor, not_installed, parsing, sha256

_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_SIZES = {
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
}
_VOCABULARY = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges")
_MOST_READS = (
    2_000_000  # of the header; a vocabulary of 128,000 takes 900,000, each some 200 bytes of memory
)


def read(path: Path) -> Source:
    """Opens a file; its tensors are dequantized to float32 when they are read.

    Raises:
      UserError: if the file cannot be read, is not a Llama, or has keys that change the computation and that this code
        does not know.
    """
    with parsing(path, "a GGUF file"), np.errstate(all="ignore"):  # forged offsets overflow
        reader = _reader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        _check_layout(reader)
    kind = metadata.get("general.architecture")
    if kind != "llama":
        raise UserError(
            f"{path}: expected a GGUF of architecture 'llama', found {kind!r}; pass the GGUF of a Llama model"
        )
    missing = [key for key in (*_SIZES.values(), *_VOCABULARY) if key not in metadata]
    if missing:
        raise UserError(
            f"{path}: expected the keys {', '.join(missing)}, found none of them; convert the model to GGUF again"
        )
    config = {ours: metadata[theirs] for ours, theirs in _SIZES.items()}
    wrong = [
        f"{theirs} = {config[ours]!r}"[:80]
        for ours, theirs in _SIZES.items()
        if type(config[ours]) not in (int, float) or not 0 < config[ours] < 1e9
    ]
    if wrong:
        raise UserError(
            f"{path}: expected one positive number for each size, found {', '.join(wrong)}; convert the model to GGUF "
            "again"
        )
    _refuse_unknown(path, metadata, [tensor.name for tensor in reader.tensors])
    tensors = {}
    for tensor in reader.tensors:
        name = _name(tensor.name)
        heads = {"q": "num_attention_heads", "k": "num_key_value_heads"}.get(_projection(name))
        shape = tuple(int(n) for n in reversed(tensor.shape))
        values = functools.partial(_values, path, tensor, shape, config[heads] if heads else None)
        tensors[name] = Tensor(shape, np.dtype(np.float32), values)
    config |= {
        "model_type": "llama",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    with parsing(path, "a GGUF file with a byte-level BPE tokenizer"):
        text, files = bpe.tokenizer_json(metadata, path), bpe.text_files(metadata)
    return Source(str(path), tensors, config, text, sha256(path), files)


def _reader(path: Path) -> Any:
    """Opens a file with the ``gguf`` package, which by itself would follow forged counts beyond the file's end."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise not_installed("gguf", str(path)) from error

    class Reader(GGUFReader):
        reads = 0

        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            if type(self.data) is np.memmap:
                self.data = self.data.view(np.ndarray)  # type: ignore[assignment]  # its slices take less memory
            self.reads += 1
            size = np.dtype(dtype).itemsize * int(count)
            if self.reads > _MOST_READS:
                raise ValueError(f"more than {_MOST_READS:,} values in its header")
            if int(offset) + size > len(self.data):
                raise ValueError(
                    f"{size:,} bytes at offset {offset:,} of a file of {len(self.data):,} bytes"
                )
            return super()._get(offset, dtype, count, override_order)

    return Reader(path)


def _check_layout(reader: Any) -> None:
    """Raises ValueError unless the tensors fill the rest of the file one after the other, in formats of floats."""
    from gguf import GGMLQuantizationType

    if reader.byte_order != "I":
        raise ValueError("bytes in another order than this machine's")
    end = reader.data_offset
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.data_offset):
        if tensor.data_offset != end:
            raise ValueError(f"{tensor.name} at {tensor.data_offset:,}, not at {end:,}")
        kind = GGMLQuantizationType(tensor.tensor_type)
        if kind.name in ("I8", "I16", "I32", "I64", "F64"):
            raise ValueError(f"{tensor.name} of type {kind.name}")
        end = -(-(end + tensor.n_bytes) // reader.alignment) * reader.alignment
    if not end - reader.alignment < len(reader.data) <= end:
        raise ValueError(f"{len(reader.data):,} bytes, not {end:,}")


def _refuse_unknown(path: Path, metadata: dict[str, Any], tensors: list[str]) -> None:
    """Raises UserError for keys and tensors that change the computation and are not supported, such as rope scaling."""
    head = metadata[_SIZES["hidden_size"]] / metadata[_SIZES["num_attention_heads"]]
    known = {
        **dict.fromkeys(_SIZES.values()),
        "llama.context_length": None,
        "llama.vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "llama.rope.dimension_count": head,
        "llama.attention.key_length": head,
        "llama.attention.value_length": head,
        "llama.attention.causal": True,
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.factor": 1.0,
        "llama.rope.scale_linear": 1.0,
    }
    unknown = [
        f"{key} = {value!r}"[:80]
        for key, value in metadata.items()
        if key.startswith("llama.") and value not in (0, "", False)
        if key not in known or known[key] not in (None, value)
    ]
    unknown += [name for name in tensors if name.startswith("rope_")]
    if unknown:
        raise UserError(
            f"{path}: expected a Llama with plain rotary positions, found {', '.join(unknown)}, which is not "
            "supported; pass a model without it"
        )


def _name(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; unknown names are returned unchanged."""
    if name in _WHOLE:
        return _WHOLE[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _BLOCK:
        return f"model.layers.{parts[1]}.{_BLOCK[parts[2]]}.{parts[3]}"
    return name


def _projection(name: str) -> str:
    return name.split(".self_attn.")[-1].split("_proj")[0]


def _values(path: Path, tensor: Any, shape: tuple[int, ...], heads: int | None) -> np.ndarray:
    """Dequantizes a tensor, and puts the rows of q and k in the order of Hugging Face's rotary embedding.

    llama.cpp rotates adjacent pairs of rows, Hugging Face pairs a head's first half with its second, so the conversion
    to GGUF interleaved the halves of each head. This undoes it.
    """
    from gguf.quants import dequantize

    with parsing(path, f"a GGUF file with {tensor.name} in a format that can be dequantized"):
        values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        if heads is not None:
            values = values.reshape(heads, -1, 2, shape[-1]).swapaxes(1, 2)
        return values.reshape(shape)
