"""Packing: shared beginnings once, every token sees exactly its own past."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from charter.lm.engine_pack import pack

IDS = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@given(st.lists(IDS, min_size=1, max_size=8))
def test_every_token_sees_exactly_its_own_beginning(sequences):
    packed = pack(sequences)
    width = packed.token_ids.shape[1]
    for ids, row, path in zip(sequences, packed.rows, packed.paths, strict=True):
        assert packed.token_ids[row, path].tolist() == list(ids)
        assert packed.positions[row, path].tolist() == list(range(len(ids)))
        for depth, column in enumerate(path):
            if packed.mask is None:
                seen = list(range(column + 1))
            else:
                seen = np.flatnonzero(packed.mask[row, 0, column] == 0).tolist()
            assert seen == path[: depth + 1].tolist()
    assert packed.mask is None or packed.mask.shape == (len(packed.token_ids), 1, width, width)


def test_six_questions_about_one_answer_cost_the_answer_once():
    common = list(range(65))
    questions = [common + [100 + q] * 30 for q in range(6)]
    packed = pack([q for q in questions for _ in range(2)])
    assert packed.token_ids.shape == (1, 65 + 6 * 30)


def test_the_same_prompt_several_times_is_read_once_and_plainly():
    packed = pack([[1, 2, 3]] * 8)
    assert packed.token_ids.tolist() == [[1, 2, 3]]
    assert packed.mask is None


def test_unrelated_prompts_keep_to_their_own_rows():
    packed = pack([[1] * 10, [2] * 10, [3] * 4, [4] * 5])
    assert packed.token_ids.shape == (3, 10)
    assert packed.rows[2] == packed.rows[3]
