"""Instructions to token ids: the template, the text tokenizer, and the length that prompts are padded to.

All of it is one JSON object in the checkpoint, so that acting uses exactly what training used. Tokens are never turned
back into text: actions do not pass through here.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mllm_act.errors import UserError


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Turns instructions into prompts.

    Attributes:
      template: a text with ``{instruction}`` in it.
      tokenizer_json: a Hugging Face ``tokenizer.json``, as text.
      length: N, the tokens that prompts are padded to in training.
    """

    template: str
    tokenizer_json: str
    length: int

    def encode(self, instruction: str) -> list[int]:
        """Returns the token ids of the prompt for one instruction."""
        return _tokenizer(self.tokenizer_json).encode(fill(self.template, instruction)).ids

    def fitting(self, instruction: str) -> list[int]:
        """Returns the token ids of the prompt for one instruction.

        Raises:
          UserError: there are more than N.
        """
        ids = self.encode(instruction)
        if len(ids) > self.length:
            raise UserError(
                f"prompt_tokens: expected prompts of at most {self.length} tokens, found {len(ids)} in the one "
                f"for {instruction!r}; pass --config.prompt_tokens={len(ids)}"
            )
        return ids

    def tokens(
        self, instructions: Sequence[str]
    ) -> tuple[Int[np.ndarray, "B N"], Bool[np.ndarray, "B N"]]:
        """Returns token ids, padded at the end with zeros, and the mask of those that exist.

        Raises:
          UserError: if a prompt is longer than N tokens.
        """
        return pad([self.fitting(instruction) for instruction in instructions], self.length)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types."""
        return dataclasses.asdict(self)


def pad(
    encoded: Sequence[Sequence[int]], length: int
) -> tuple[Int[np.ndarray, "B N"], Bool[np.ndarray, "B N"]]:
    """Pads token ids at the end with zeros to N = ``length``; returns them and the mask of those that exist."""
    ids = np.zeros((len(encoded), length), np.int32)
    exists = np.arange(length) < np.array([[len(sequence)] for sequence in encoded])
    ids[exists] = np.concatenate(encoded)
    return ids, exists


_cache: dict[str, Tokenizer] = {}


def _tokenizer(text: str) -> Tokenizer:
    if text not in _cache:
        _cache[text] = Tokenizer.from_str(text)
    return _cache[text]


def train_text_tokenizer(texts: Iterable[str], vocabulary: int) -> str:
    """Learns a byte-level BPE of at most ``vocabulary`` ids, which can encode any text.

    Deterministic in the set of texts. Returns its ``tokenizer.json``.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(set(texts)), trainer)
    return tokenizer.to_str()


def fill(template: str, instruction: str) -> str:
    """Returns the text of a prompt.

    Raises:
      UserError: if the template has no ``{instruction}``.
    """
    if "{instruction}" not in template:
        raise UserError(f"prompt_template: expected {{instruction}} in it, found {template!r}")
    return template.replace("{instruction}", instruction)


def readable(
    prompt: Prompt, instructions: Sequence[str], vocabulary: int, action_tokens: range
) -> Prompt:
    """Returns a prompt whose ids the model can read.

    Adapters write over rows of the vocabulary's end, which are rare words. Where an instruction has such a word, the
    text tokenizer of the result cuts it into pieces.

    Args:
      prompt: as the config has it.
      instructions: of the dataset.
      vocabulary: V, the number of ids of the model.
      action_tokens: ids that the adapter writes over.

    Raises:
      UserError: if a prompt is too long, the model lacks an id, or an id that the adapter writes over cannot be cut
        into pieces; it names the instruction.
    """
    if any(token in action_tokens for text in instructions for token in prompt.encode(text)):
        cut = _without(prompt.tokenizer_json, action_tokens)
        prompt = dataclasses.replace(prompt, tokenizer_json=cut)
    prompt.tokens(instructions)  # reports one that is too long
    for instruction in instructions:
        for token in prompt.encode(instruction):
            if token >= vocabulary:
                raise UserError(
                    f"config.pretrained: expected token ids below {vocabulary}, the model's vocabulary, found {token} "
                    f"in the prompt for {instruction!r}; the text tokenizer belongs to another model: import the "
                    "weights again with python -m mllm_act.import_hf"
                )
            if token in action_tokens:
                text = _tokenizer(prompt.tokenizer_json).id_to_token(token)
                raise UserError(
                    f"config.prompt_template: expected prompts without the ids {action_tokens.start} to "
                    f"{action_tokens.stop - 1}, the rows of actions, found {token} ({text!r}) in the one "
                    f"for {instruction!r}; reword it"
                )
    return prompt


def _without(tokenizer_json: str, ids: range) -> str:
    """Returns a BPE tokenizer that cuts words into pieces instead of giving ``ids``, and any other as it was.

    What has no pieces stays: the alphabet, unless its bytes are a fallback, and special tokens.
    """
    tokenizer = json.loads(tokenizer_json)
    model = tokenizer["model"]
    if model["type"] != "BPE":
        return tokenizer_json
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    made = {"".join(pair) for pair in merges}
    fallback = model.get("byte_fallback", False)
    bytes_ = {f"<0x{byte:02X}>" for byte in range(256)}
    special = {token["id"] for token in tokenizer.get("added_tokens", ())}
    removed = {
        piece
        for piece, i in model["vocab"].items()
        if i in ids and i not in special and (piece in made or (fallback and piece not in bytes_))
    }
    model["vocab"] = {piece: i for piece, i in model["vocab"].items() if piece not in removed}
    model["merges"] = [
        merge
        for merge, pair in zip(model["merges"], merges, strict=True)
        if not removed & {*pair, "".join(pair)}
    ]
    return json.dumps(tokenizer, ensure_ascii=False)
