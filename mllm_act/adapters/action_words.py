"""Action names to token ids, once, when a run is set up. Acting never goes through text: see ``adapters.language``."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from mllm_act.errors import UserError

Sequences = tuple[tuple[int, ...], ...]


def words(tokenizer_json: str, names: Sequence[str]) -> Sequences:
    """Returns the token ids of each name; an empty sequence for a name without tokens.

    ``tokenizer_json`` is a Hugging Face ``tokenizer.json`` as text, here and below.
    """
    tokenizer = Tokenizer.from_str(tokenizer_json)
    return tuple(tuple(tokenizer.encode(name, add_special_tokens=False).ids) for name in names)


def digits(tokenizer_json: str) -> tuple[int, ...]:
    """Returns the token ids of the digits 0 to 9.

    Raises:
      UserError: if the vocabulary lacks a digit.
    """
    tokenizer = Tokenizer.from_str(tokenizer_json)
    ids = {digit: tokenizer.token_to_id(digit) for digit in "0123456789"}
    missing = [digit for digit, token in ids.items() if token is None]
    if missing:
        raise UserError(
            f"config.adapter: expected a vocabulary with the digits 0 to 9 for adapter lang, found none of "
            f"{', '.join(missing)}; choose adapter semlang, or another preset"
        )
    return tuple(token for token in ids.values() if token is not None)


def end(tokenizer_json: str) -> int:
    """Returns the token that ends an action: the newline, which every byte-level vocabulary has.

    Raises:
      UserError: if the vocabulary has no newline.
    """
    ids = Tokenizer.from_str(tokenizer_json).encode("\n", add_special_tokens=False).ids
    if not ids:
        raise UserError(
            "config.preset: expected a vocabulary with a newline, which ends an action, found none; choose another "
            "preset"
        )
    return ids[-1]


def digit_sequences(
    names: Sequence[str], sequences: Sequence[Sequence[int]], digits: Sequence[int]
) -> Sequences:
    """Returns Lang's sequences: digits for each action, as many as its words have tokens, no two actions the same.

    Mapping each token to a digit, as the paper puts it, is not injective for more than ten words. Where the lengths
    admit it (Kraft's inequality), no sequence is the beginning of another: they form the canonical prefix code. Where
    they do not, the actions of each length are numbered.

    Args:
      names: of the actions.
      sequences: the token ids of their words.
      digits: the token ids of 0 to 9.

    Raises:
      UserError: if there are more actions of a length than numbers with that many digits.
    """
    assert len(digits) == 10
    lengths = [len(sequence) for sequence in sequences]
    longest = max(lengths)
    prefix_free = sum(10 ** (longest - n) for n in lengths) <= 10**longest
    numbers, total, count = [""] * len(lengths), 0, dict.fromkeys(lengths, 0)
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        n = lengths[i]
        if count[n] == 10**n:
            raise UserError(
                f"config.actions: expected at most {10**n} actions of {n} tokens, as many as there are numbers of {n} "
                f"digits for adapter lang, found {lengths.count(n)}, {names[i]!r} among them; use more words"
            )
        numbers[i] = f"{total:0{longest}}"[:n] if prefix_free else f"{count[n]:0{n}}"
        total, count[n] = total + 10 ** (longest - n), count[n] + 1
    return tuple(tuple(digits[int(digit)] for digit in number) for number in numbers)
