"""Functions of support/ that take numbers or texts and give such back, against values computed by hand."""

import pytest
import torch

import common
import dpo
from support import ranks
from support.loading import like_lengths, positive_index, split_completions, widths
from support.statistics import mean_and_error

# ---- which label is the positive one -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "wanted", "index"),
    [
        (["NEGATIVE", "POSITIVE"], None, 1),
        (["positive", "neutral", "negative"], None, 0),
        (["neg", "pos"], None, 1),
        (["LABEL_0", "LABEL_1"], None, 1),
        (["1 star", "5 stars"], "5 stars", 1),
    ],
)
def test_positive_is_found_by_its_name(names, wanted, index):
    assert positive_index(dict(enumerate(names)), wanted) == index


@pytest.mark.parametrize(
    ("names", "wanted"),
    [(["good", "bad"], None), (["LABEL_0", "LABEL_1", "LABEL_2"], None), (["neg", "pos"], "x"), (["pos", "POS"], None)],
)
def test_positive_is_not_guessed(names, wanted):
    with pytest.raises(ValueError, match=f"which of the labels {', '.join(names)} is {wanted or 'positive'}"):
        positive_index(dict(enumerate(names)), wanted)


# ---- where prompt and completion meet ----------------------------------------------------------------------


def test_completions_that_repeat_the_prompt_lose_it():
    prompts = ["I saw", "We saw", "It is"]
    texts = ["I saw it.", "We saw it.", "is good"], ["I saw no.", "We saw no.", "It is bad"]
    chosen, rejected, layout = split_completions(prompts, *texts)
    assert layout == "completions repeat their prompt, which is taken off"
    assert chosen == [" it.", " it.", ""]  # the third row follows no layout: its completion can't be told
    assert rejected == [" no.", " no.", ""]


def test_completions_that_bring_their_own_space_stand_as_they_are():
    for texts in ([" good", ", good"], ["bad", "bad"]), (["good", "fine"], ["bad", " bad"]):  # one space in all
        chosen, rejected, layout = split_completions(["I saw", "We saw"], *texts)
        assert layout == "completions continue their prompt as they stand"
        assert [chosen, rejected] == [texts[0], texts[1]]
    chosen, _, layout = split_completions(["I saw ", "We saw"], ["it", "it"], ["no", "no"])
    assert layout == "completions continue their prompt as they stand" and chosen == ["it", "it"]


def test_half_of_the_rows_are_not_enough_to_say_that_completions_repeat_the_prompt():
    # "It" begins its own completion by chance: taken off, it would leave a text that is none.
    texts = ["It was", " it."], ["Itself", " no."]
    chosen, rejected, layout = split_completions(["It", "We saw"], *texts)
    assert [chosen, rejected] == [texts[0], texts[1]] and "as they stand" in layout


@pytest.mark.parametrize("missing", range(3))
def test_columns_of_unequal_length_are_refused(missing):
    columns = [["I saw", "We saw"], ["good", "good"], ["bad", "bad"]]
    columns[missing].pop()
    with pytest.raises(ValueError, match="zip"):
        split_completions(*columns)


def test_a_space_is_put_in_where_the_data_never_has_one():
    chosen, rejected, layout = split_completions(["I saw", "We saw"], ["good", ""], ["bad", "bad"])
    assert layout == "no text has a space where prompt and completion meet, so one is put in"
    assert chosen == [" good", ""] and rejected == [" bad", " bad"]


# ---- which rows make a batch -------------------------------------------------------------------------------


def test_widths_are_those_of_the_longer_completions():
    pairs = [dpo.Pair([1, 2, 3, 4], [5], [6, 7]), dpo.Pair([1], [5, 6, 7], [8])]
    assert widths(pairs).tolist() == [2, 3]


def test_like_lengths_are_batches_of_every_row_in_random_order():
    lengths = torch.randint(1, 100, (330,), generator=common.seeded(0, "lengths"))
    batches = like_lengths(lengths, 8, common.seeded(0, "order"), window=10)
    assert sorted(torch.cat(batches).tolist()) == list(range(330))
    assert sorted(map(len, batches)) == [2] + [8] * 41  # the ragged batch is there, and there is one
    spread = [(lengths[rows].max() - lengths[rows].min()).item() for rows in batches]
    assert sum(spread) / len(spread) < 15  # of 99: ten batches sorted together; at random it would be 78
    assert all(len(set((rows // 80).tolist())) > 1 for rows in batches if len(rows) > 2)  # from all over the data set
    means = torch.stack([lengths[rows].float().mean() for rows in batches])
    neighbours = torch.corrcoef(torch.stack([means[1:], means[:-1]]))[0, 1]
    assert abs(neighbours) < 0.5  # long batches come at no particular time
    again = like_lengths(lengths, 8, common.seeded(0, "order"), window=10)
    assert [rows.tolist() for rows in again] == [rows.tolist() for rows in batches]
    other = like_lengths(lengths, 8, common.seeded(1, "order"), window=10)
    assert [rows.tolist() for rows in other] != [rows.tolist() for rows in batches]


def test_micro_batches_are_of_a_ranks_own_rows_and_their_weights_of_all(monkeypatch):
    # The middle one of three ranks has rows 3 .. 6 of 9; a rank that has none goes through one with weight 0.
    monkeypatch.setattr(ranks, "rank_slice", lambda rows: {9: (slice(3, 7), 4 / 9), 1: (slice(0, 1), 0)}[rows])
    assert list(ranks.micro_batches(9, 3)) == [(slice(3, 6), 3 / 9), (slice(6, 7), 1 / 9)]
    assert list(ranks.micro_batches(9)) == [(slice(3, 7), 4 / 9)]
    assert list(ranks.micro_batches(1, 3)) == [(slice(0, 1), 0)]


# ---- numbers of the evaluation -----------------------------------------------------------------------------


def test_mean_comes_with_the_standard_error_of_the_mean():
    # Values 0, 1/2, 1: variance (1/4 + 0 + 1/4) / 2 = 1/4, standard error 1/2 / sqrt(3) = 0.288675.
    assert mean_and_error([0.0, 0.5, 1.0]) == (0.5, pytest.approx(0.288675, abs=1e-6))
    assert mean_and_error([0.25]) == (0.25, None)
    # Two samples each of three prompts: means 0, 1/2, 1 as above. As six values they would be thought surer.
    assert mean_and_error([0, 0, 0.25, 0.75, 1, 1], group=2) == (0.5, pytest.approx(0.288675, abs=1e-6))
    assert mean_and_error([0.25, 0.75], group=2) == (0.5, None)
