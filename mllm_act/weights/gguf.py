"""Reads Llama weights in GGUF, the format of llama.cpp: tensors (often quantized), sizes and tokenizer in one file."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from mllm_act.errors import UserError
from mllm_act.weights import bpe
from mllm_act.weights.tensors import Source, Tensor, not_installed, sha256

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
_IGNORED = ("rope_freqs.weight",)
_SIZES = {
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
}


def read(path: Path) -> Source:
    """Opens a file; its tensors are dequantized to float32 when they are read.

    Raises:
      UserError: if the file cannot be read or is not a Llama.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise not_installed("gguf", str(path)) from error
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError, TypeError) as error:
        raise UserError(
            f"{path}: expected a GGUF file, found one that cannot be read ({error}); download it again"
        ) from error
    metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    kind = metadata.get("general.architecture")
    if kind != "llama":
        raise UserError(
            f"{path}: expected a GGUF of architecture 'llama', found {kind!r}; pass the GGUF of a Llama model"
        )
    missing = [key for key in _SIZES.values() if key not in metadata]
    if missing:
        raise UserError(
            f"{path}: expected the keys {', '.join(missing)}, found none of them; convert the model to GGUF again"
        )
    config = {ours: metadata[theirs] for ours, theirs in _SIZES.items()}
    tensors = {}
    for tensor in reader.tensors:
        if tensor.name in _IGNORED:
            continue
        name = _name(tensor.name)
        heads = {"q": "num_attention_heads", "k": "num_key_value_heads"}.get(_projection(name))
        shape = tuple(int(n) for n in reversed(tensor.shape))
        values = functools.partial(_values, tensor, shape, config[heads] if heads else None)
        tensors[name] = Tensor(shape, np.dtype(np.float32), values)
    config |= {
        "model_type": "llama",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    return Source(str(path), tensors, config, bpe.tokenizer_json(metadata, path), sha256(path))


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


def _values(tensor: Any, shape: tuple[int, ...], heads: int | None) -> np.ndarray:
    """Dequantizes a tensor, and puts the rows of q and k in the order of Hugging Face's rotary embedding.

    llama.cpp rotates adjacent pairs of rows, Hugging Face pairs a head's first half with its second, so the conversion
    to GGUF interleaved the halves of each head. This undoes it.
    """
    from gguf.quants import dequantize

    values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    if heads is not None:
        values = values.reshape(heads, -1, 2, shape[-1]).swapaxes(1, 2)
    return values.reshape(shape)
