"""Prompts: any text becomes tokens, in training of a fixed length."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

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


def test_ids_that_actions_are_written_over_or_that_the_model_lacks_are_named() -> None:
    used = {token for instruction in INSTRUCTIONS for token in PROMPT.encode(instruction)}
    largest = max(used)
    prompts.check_ids(PROMPT, INSTRUCTIONS, largest + 1, range(largest + 1, largest + 10))
    with pytest.raises(UserError, match=rf"without the ids {largest} to .*, found {largest}"):
        prompts.check_ids(PROMPT, INSTRUCTIONS, 1024, range(largest, 1024))
    with pytest.raises(UserError, match=f"below {largest}, the model's vocabulary, found"):
        prompts.check_ids(PROMPT, INSTRUCTIONS, largest, range(0))
