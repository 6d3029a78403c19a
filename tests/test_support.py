"""Functions of support/ that take numbers or texts and give such back, against values computed by hand."""

import pytest
import torch

import common
import dpo
from support import ranks
from support.errors import UserError
from support.loading import like_lengths, positive_index, split_completions, widths
from support.statistics import mean_and_error

# ---- which label is the positive one -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "wanted", "index"),
    [
        (["NEGATIVE", "POSITIVE"], None, 1),
        (["positive", "neutral", "negative"], None, 0),
        (["neg", "neu", "pos"], None, 2),
        (["opposite", "possible", "pos"], None, 2),
        (["LABEL_0"], None, 0),
        (["LABEL_0", "LABEL_1"], None, 1),
        (["1 star", "5 stars"], "5 stars", 1),
        (["POSITIVE", "VERY POSITIVE"], "very positive", 1),
    ],
)
def test_positive_is_found_by_its_name(names, wanted, index):
    assert positive_index(dict(enumerate(names)), wanted) == index


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["good", "bad"], None),
        (["LABEL_0", "LABEL_1", "LABEL_2"], None),
        (["neg", "pos"], "x"),
        (["pos", "POS"], None),
        (["pos", "POS"], "pos"),
        (["pos", "positive"], None),
        (["POSITIVE", "VERY POSITIVE"], None),
        (["negative", "positive", "positive_review"], None),
        (["neg", "pos", "very_pos"], None),
        (["positive", "not positive"], None),
        (["negative review", "positive review"], None),
        (["1 star", "5 stars"], None),
    ],
)
def test_positive_is_not_guessed(names, wanted):
    with pytest.raises(UserError, match=f"which of the labels {', '.join(names)} is {wanted or 'positive'}"):
        positive_index(dict(enumerate(names)), wanted)


# ---- where prompt and completion meet ----------------------------------------------------------------------


AFTER, WITHOUT = "continue their prompt after white space", "continue their prompt without white space"
PUT_IN = "continue their prompt after a space, put in as no completion begins with one"
REPEAT = "repeat their prompt, which is taken off"


def split(*columns):
    """Rows of prompt, chosen, rejected -> what split_completions makes of them: such rows again, and the sentence."""
    *columns, layout = split_completions(*map(list, zip(*columns, strict=True)), "--pairs x, split train")
    return list(zip(*columns, strict=True)), layout


@pytest.mark.parametrize(
    ("prompt", "completion", "rest"),
    [
        ("A film", "A film is good", " is good"),
        ("A film", "A film, good", ", good"),
        ("A film", "A films", "s"),  # a prompt may be cut anywhere
        ("A film \t", "A film\nis good", "\nis good"),
        ("A film ", "A film is good", " is good"),
        (" A film\n", "\tA film. ", ". "),
        ("Film", "Film is good", " is good"),  # one word, but both sides begin with it
        ("A film", "A film", ""),
        ("A film ", "A film \n", ""),  # nothing but white space is left
    ],
)
def test_a_completion_that_repeats_its_prompt_loses_it_but_for_white_space(prompt, completion, rest):
    assert split((prompt, completion, completion)) == (
        [(prompt.rstrip(), rest, rest)], f"completions: 1 of 1 {REPEAT}")


def test_white_space_at_a_prompts_end_becomes_the_completions():
    rows = [("I saw ", "it", "no"), ("I saw\n\n", " it", " "), ("I saw", " it", " no"), (" ", " it", "no")]
    found = [("I saw", " it", " no"), ("I saw", "\n\n it", ""), ("I saw", " it", " no"), ("", "  it", " no")]
    assert split(*rows) == (found, f"completions: 4 of 4 {AFTER}")


def test_each_side_of_each_row_is_read_for_itself():
    repeats, continues = ("A film", "A film is a joy", "A film is a bore"), ("A film", " is a joy", " is a bore")
    found = ("A film", " is a joy", " is a bore")
    assert split(repeats, *[continues] * 3) == (
        [found] * 4, f"completions: 3 of 4 {AFTER}, 1 of 4 {REPEAT}")
    first, second = ("A film", repeats[1], continues[2]), ("A film", continues[1], repeats[2])
    assert split(first, first) == (
        [found] * 2, f"chosen completions: 2 of 2 {REPEAT}; rejected ones: 2 of 2 {AFTER}")
    assert split(first, first, second) == (
        [found] * 3, f"chosen completions: 1 of 3 {AFTER}, 2 of 3 {REPEAT}; "
                     f"rejected ones: 2 of 3 {AFTER}, 1 of 3 {REPEAT}")


def test_a_space_is_put_in_where_no_completion_begins_with_one():
    # Neither white space at a prompt's end nor an empty completion says that completions bring their own.
    rows = [("I saw", "good", "bad"), ("I saw ", "fine", " "), ("I saw", "", ", no"), ("A film", "A film is", "A film")]
    found = [("I saw", " good", " bad"), ("I saw", " fine", ""), ("I saw", "", " , no"), ("A film", " is", "")]
    assert split(*rows) == (
        found, f"completions: 2 of 4 {PUT_IN}, 1 of 4 {AFTER}, 1 of 4 {REPEAT}")
    rows[2] = ("I saw", "", " no")  # now one does: all stand as they are, on both sides
    found[0], found[2] = ("I saw", "good", "bad"), ("I saw", "", " no")
    assert split(*rows) == (found, f"chosen completions: 1 of 4 {AFTER}, 2 of 4 {WITHOUT}, 1 of 4 {REPEAT}; "
                                   f"rejected ones: 2 of 4 {AFTER}, 1 of 4 {WITHOUT}, 1 of 4 {REPEAT}")


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1)])  # the chosen one begins with it, or the rejected one
def test_one_word_that_begins_one_side_alone_is_refused(order):
    def rows(*given):
        return [tuple(row[column] for column in order) for row in given]

    word, other = ("It", "It was so", " it is"), ("A film", " is", " was")
    with pytest.raises(UserError) as refused:
        split(*rows(other, word, other))
    one, two = word[order[1]], word[order[2]]
    assert str(refused.value) == (
        f"--pairs x, split train, row 1: of {one!r} and {two!r} only one begins with the prompt 'It', and one word may "
        "do so by chance: let both begin with it, or take the row out; rows count from 0")
    # Where that side begins with its prompt in all rows it is no chance.
    found, _ = split(*rows(("A film", "A film is", " was"), word))
    assert found == rows(("A film", " is", " was"), ("It", " was so", " it is"))


@pytest.mark.parametrize("missing", range(3))
def test_columns_of_unequal_length_are_refused(missing):
    columns = [["I saw", "We saw"], ["good", "good"], ["bad", "bad"]]
    columns[missing].pop()
    with pytest.raises(ValueError, match="zip"):
        split_completions(*columns, "pairs")


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


def test_noise_is_the_cpus_and_below_one_where_there_is_no_fp64(monkeypatch):
    expected = torch.rand(2, 3, generator=common.seeded(0, "a"), dtype=torch.float64)
    assert common.noise_on(torch.device("cpu"), common.seeded(0, "a"), 2, 3).tolist() == expected.tolist()
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([0.25, 1 - 2**-53], dtype=torch.float64))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self)  # no MPS here
    found = common.noise_on(torch.device("mps"), None, 2)
    assert found.dtype == torch.float32 and found.tolist() == [0.25, 1 - 2**-24]
