"""Prompts: any text becomes tokens, in training of a fixed length."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from mllm_act.errors import UserError
from mllm_act.policy import prompt as prompts

TEMPLATE = "Prompt: control the robot. USER: {instruction} ASSISTANT: "
INSTRUCTIONS = ["close the drawer", "open the window", "press the button from above"]
TEXTS = [prompts.fill(TEMPLATE, instruction) for instruction in INSTRUCTIONS]
PROMPT = prompts.Prompt(TEMPLATE, prompts.train_text_tokenizer(TEXTS, 512), length=24)


@given(st.text(max_size=60))
def test_any_text_survives_and_stays_below_the_action_tokens(text: str) -> None:
    ids = PROMPT.encode(text)
    assert all(0 <= token < 512 for token in ids)
    decoded = Tokenizer.from_str(PROMPT.tokenizer_json).decode(ids)
    assert decoded == TEMPLATE.format(instruction=text)


def test_padding_is_at_the_end() -> None:
    ids, exists = PROMPT.tokens(INSTRUCTIONS)
    assert ids.shape == exists.shape == (3, 24)
    lengths = exists.sum(1)
    assert (np.sort(exists, axis=1)[:, ::-1] == exists).all() and (lengths < 24).all()
    for row, length, instruction in zip(ids, lengths, INSTRUCTIONS, strict=True):
        assert list(row[:length]) == PROMPT.encode(instruction) and not row[length:].any()


def test_the_same_data_set_gives_the_same_tokenizer_whatever_its_order() -> None:
    assert prompts.train_text_tokenizer(TEXTS[::-1] * 2, 512) == PROMPT.tokenizer_json


def test_a_prompt_that_is_too_long_is_named() -> None:
    with pytest.raises(UserError, match=r"at most 24 tokens, found \d+ in the one for 'x+'"):
        PROMPT.tokens(["close the drawer", "x" * 99])


def test_words_of_rows_that_actions_are_written_over_are_cut_into_pieces() -> None:
    """A BPE's last ids are its rarest words; everything else is encoded as before."""
    word = max(token for text in INSTRUCTIONS for token in PROMPT.encode(text))
    [named] = {text for text in INSTRUCTIONS if word in PROMPT.encode(text)}
    rows = range(word, 512)
    prompt = prompts.readable(PROMPT, INSTRUCTIONS, 512, rows)
    ids = prompt.encode(named)
    assert max(ids) < word and len(ids) > len(PROMPT.encode(named))
    assert Tokenizer.from_str(prompt.tokenizer_json).decode(ids) == TEMPLATE.format(
        instruction=named
    )
    for text in set(INSTRUCTIONS) - {named}:
        assert prompt.encode(text) == PROMPT.encode(text)
    assert prompts.readable(PROMPT, INSTRUCTIONS, word + 1, range(word + 1, 512)) is PROMPT


def test_ids_that_the_model_lacks_or_that_have_no_pieces_are_named() -> None:
    largest = max(token for text in INSTRUCTIONS for token in PROMPT.encode(text))
    with pytest.raises(UserError, match=f"below {largest}, the model's vocabulary, found"):
        prompts.readable(PROMPT, INSTRUCTIONS, largest, range(0))
    letters = range(0, 256)
    with pytest.raises(UserError, match=r"without the ids 0 to 255, .* found \d+ \('.'\)"):
        prompts.readable(PROMPT, INSTRUCTIONS, 512, letters)


def test_characters_beyond_the_bytes_of_llamas_tokenizer_are_cut_into_bytes() -> None:
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["a", "好", "aa"]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [("a", "a")], byte_fallback=True)
    )
    prompt = prompts.Prompt("{instruction}", tokenizer.to_str(), 8)
    assert prompt.encode("aa好") == [258, 257]
    assert prompts.readable(prompt, ["aa好"], 259, range(257, 259)).encode("aa好") == [
        256, 256, *"好".encode(),
    ]  # fmt: skip
