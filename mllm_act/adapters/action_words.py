"""Action names to token ids, once, when a run is set up. Actions are never made of text: see ``adapters.language``."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from mllm_act.errors import UserError

Sequences = tuple[tuple[int, ...], ...]


def words(tokenizer_json: str, names: Sequence[str]) -> Sequences:
    """Returns the token ids of each action's name, none for one that has no token.

    ``tokenizer_json`` is a Hugging Face ``tokenizer.json``, here and below, as text.
    """
    tokenizer = Tokenizer.from_str(tokenizer_json)
    return tuple(tuple(tokenizer.encode(name, add_special_tokens=False).ids) for name in names)


def digits(tokenizer_json: str) -> tuple[int, ...]:
    """Returns the token ids of the digits 0 to 9.

    Raises:
      UserError: if the vocabulary lacks some.
    """
    tokenizer = Tokenizer.from_str(tokenizer_json)
    found = {digit: tokenizer.token_to_id(digit) for digit in "0123456789"}
    missing = [digit for digit, token in found.items() if token is None]
    if missing:
        raise UserError(
            f"config.adapter: expected a vocabulary with the digits 0 to 9 for adapter lang, found none of "
            f"{', '.join(missing)}; choose adapter semlang, or another preset"
        )
    return tuple(token for token in found.values() if token is not None)


def end(tokenizer_json: str) -> int:
    """Returns the token that ends an action: the newline's, which every byte-level vocabulary has.

    Raises:
      UserError: if the vocabulary has none.
    """
    ids = Tokenizer.from_str(tokenizer_json).encode("\n", add_special_tokens=False).ids
    if not ids:
        raise UserError(
            "config.preset: expected a vocabulary with a newline, which ends an action, found none; choose another "
            "preset"
        )
    return ids[-1]
