"""Windows and chunks end where the episode, or its instruction, does."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.reading.episodes import read_actions
from data_pipelines.reading.pipeline import EvalBatches, TrainBatches
from data_pipelines.reading.rlds import open_dataset
from data_pipelines.reading.segments import segments_of
from data_pipelines.reading.statistics import dataset_statistics
from data_pipelines.reading.windows import segments, window_index
from data_pipelines.tensorflow_cpu import tf
from tests.data_pipelines import tiny_rlds

# The instruction of each step of each episode, one letter a step: it changes, comes back, and never changes.
SENTENCES = ("aaabbbbb", "abacc", "dddd", "e")


@settings(max_examples=60, deadline=None)
@given(sentences=st.text("ab", min_size=1, max_size=20), context=st.integers(1, 8), data=st.data())
def test_windows_hold_every_step_once_in_order_under_one_instruction(
    sentences: str, context: int, data: st.DataObject
) -> None:
    offset = data.draw(st.integers(0, context - 1))
    first, _ = segments(tf.constant(list(sentences))[:, None])
    index, mask = (array.numpy() for array in window_index(first, tf.constant(offset), context))
    assert index[mask].tolist() == list(range(len(sentences)))
    assert mask[:, 0].all() and (np.diff(mask.astype(int)) <= 0).all()  # padding only at the end
    assert ((0 <= index) & (index < len(sentences))).all()
    for steps, exists in zip(index, mask, strict=True):
        assert len({sentences[step] for step in steps[exists]}) == 1


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    episodes = []
    for number, sentences in enumerate(SENTENCES):
        episode = tiny_rlds.episode(number, len(sentences))
        for step, sentence in zip(episode["steps"], sentences, strict=True):
            step["language_instruction"] = sentence
        episodes.append(episode)
    folder = tmp_path_factory.mktemp("rlds") / "tiny"
    return tiny_rlds.write(folder, {"train": [episodes[:3], episodes[3:]], "val": [episodes]})


def test_a_step_is_trained_with_its_own_instruction(directory: Path) -> None:
    batches = TrainBatches(
        open_dataset(directory), "train", batch_size=1, context=3, seed=0, shuffle_megabytes=1
    )
    seen = set()
    while batches.epoch < 2:
        batch = next(batches)
        for episode, step in batch["proprio"][batch["mask"]][:, :2].astype(int):
            assert batch["instruction"][0].decode() == SENTENCES[episode][step]
            seen.add((episode, step))
    assert len(seen) == sum(map(len, SENTENCES))


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_end_with_the_instruction_for_policy_and_tokenizer_alike(
    directory: Path, chunk: int
) -> None:
    dataset, rows = open_dataset(directory), {}
    for batch in EvalBatches(dataset, "val", batch_size=2, context=3, chunk=chunk):
        where = batch["proprio"][batch["mask"]][:, :2].astype(int)
        rows |= {
            tuple(place): row
            for place, row in zip(where, batch["action"][batch["mask"]], strict=True)
        }
    places = [(e, s) for e, sentences in enumerate(SENTENCES) for s in range(len(sentences))]
    actions = read_actions(dataset, "val")
    np.testing.assert_array_equal([rows[place] for place in places], actions.chunked(chunk))
    single = {place: action for place, action in zip(places, actions.action, strict=True)}
    for (episode, step), row in rows.items():
        sentence, end = SENTENCES[episode], step
        for action in row.reshape(chunk, -1):
            np.testing.assert_array_equal(action, single[episode, end])
            if end + 1 < len(sentence) and sentence[end + 1] == sentence[end]:
                end += 1


def test_every_instruction_is_known_before_training(directory: Path) -> None:
    statistics = dataset_statistics(open_dataset(directory))
    assert statistics.instructions == ("a", "b", "c", "d", "e")
    assert (statistics.num_episodes, statistics.num_segments) == (4, 8)


@pytest.mark.parametrize("context", [1, 2, 3, 8])
def test_windows_are_counted_as_they_are_cut(directory: Path, context: int) -> None:
    dataset = open_dataset(directory)
    batches = EvalBatches(dataset, "val", batch_size=1, context=context)
    masks = [batch["mask"] for batch in batches]  # too few would lack steps, too many be empty
    assert sum(int(mask.sum()) for mask in masks) == sum(map(len, SENTENCES))
    assert all(mask.any() for mask in masks)
    assert int(segments_of(dataset, "val").windows(context).sum()) == len(masks)
