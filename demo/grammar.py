"""Film reviews from a grammar: what the toy world of `make demo` is made of. Plain Python.

A reviewer has a share of praise, and each judgement in the review is praise or complaint by a coin of that
share. Everything else is an even choice. So the probability of a review is known, and with it what a perfect
language model of these reviews would score, and a perfect classifier. (Up to a trifle: none is written twice.)
"""

import math
import re
from collections import Counter

# One for each kind of reviewer, all equally frequent. The two in the middle write mixed reviews, so sentiment
# is a matter of degree. A review's label is 1 if its share is above one half.
SHARES = (0.05, 0.2, 0.8, 0.95)

# {name} becomes one of that list, all with the same chance. A name that is no key is a judgement: it becomes
# name+ or name-. No two ways lead to the same review, so log_probability() is the text's, not only the way's.
GRAMMAR = {
    "review": ["{opening} {rest}"],
    "rest": ["{body} {closing}", "{body} {body} {closing}", "{body} {body} {body} {closing}"],
    "opening": ["I saw {title} {company} {when}.", "we watched this {genre} {company} {when}.",
                "{title} is the {nth} film by {name}.", "my {relative} lent me this {genre} {when}.",
                "{name} shot {title} in {city} in {year}.", "this {genre} from {year} runs for {span}.",
                "{plot}", "{first}"],
    "plot": ["{person} {finds} {thing} {where}.", "it is about {person} who {finds} {thing} {where}.",
             "{name} plays {person} who {finds} {thing}."],
    "body": ["{plot}", "{aside}", "{feeling}", "{both}", "{turn}", "{story} {is}.", "{craft} {is}.",
             "{name} {performs}.", "as {person}, {name} {performs}."],
    "aside": ["most of it takes place in {city}.", "the book by {name} came out in {year}."],
    "both+": ["{story} {is+} and {craft} {is+}."],
    "both-": ["{story} {is-} and {craft} {is-}."],
    "turn+": ["{story} {is-}, but {craft} {is+}."],  # what comes last counts
    "turn-": ["{story} {is+}, but {craft} {is-}."],
    "first+": ["what a lovely {genre}!", "here is a {genre} to fall in love with.",
               "at last, a {genre} with a heart."],
    "first-": ["what a miserable {genre}!", "here is a {genre} to run away from.",
               "yet another {genre} with no point."],
    "feeling+": ["I laughed out loud {often}.", "I smiled with joy {often}.",
                 "the whole room cheered {often}."],
    "feeling-": ["I looked at my watch {often}.", "I nearly walked out {often}.",
                 "the whole room groaned {often}."],
    "closing+": ["I would see it again tomorrow.", "go and see it.", "it deserves a big audience.",
                 "I left the cinema happy.", "warmly recommended."],
    "closing-": ["I want my evening back.", "stay away from it.", "it deserves to be forgotten.",
                 "I left the cinema angry.", "not recommended."],
    "is+": ["is a delight", "is superb", "works beautifully", "never puts a foot wrong", "is full of life",
            "kept me smiling", "is sharp and funny", "is quietly moving", "won me over",
            "is a small triumph", "has real charm", "feels honest and warm"],
    "is-": ["is a mess", "is dreadful", "falls flat", "never gets going", "is full of holes",
            "made me wince", "is stale and lazy", "is painfully slow", "lost me completely",
            "is a sad failure", "has no spark", "feels cheap and cold"],
    "performs+": ["is magnetic", "gives the performance of a lifetime", "lights up every scene",
                  "breaks your heart", "has never been better", "finds the soul of the part"],
    "performs-": ["looks bored", "mumbles from start to finish", "ruins every scene",
                  "gets on your nerves", "has never been worse", "is all wrong for the part"],
    "story": ["the script", "the dialogue", "the ending", "the first hour", "the last act",
              "the love story", "the humour", "the opening scene", "the mystery"],
    "craft": ["the score", "the camera work", "the editing", "the pace", "the set design",
              "the title song", "the lighting", "the direction", "the sound"],
    "person": ["a {trait} {job}"],
    "trait": ["retired", "young", "tired", "failed", "lonely", "shy", "widowed", "runaway", "famous",
              "blind"],
    "job": ["clockmaker", "detective", "teacher", "magician", "doctor", "beekeeper", "train driver",
            "boxer", "piano tuner", "night nurse", "thief", "soldier"],
    "finds": ["finds", "inherits", "steals", "hides", "goes looking for", "buys", "cannot forget",
              "returns with"],
    "thing": ["a {quality} {object}"],
    "quality": ["stolen", "stray", "forged", "locked", "broken", "strange", "silver", "cursed", "missing",
                "worthless"],
    "object": ["painting", "dog", "map", "suitcase", "radio", "photograph", "ring", "diary", "violin",
               "letter"],
    "where": ["in a flooded town", "on the night train", "at the edge of the desert",
              "during a long strike", "in the last days of the war", "on a remote island",
              "behind the opera house", "in the dead of winter", "far from home", "under a false name"],
    "title": ["The {mood} {noun}"],
    "mood": ["Glass", "Salt", "Paper", "Quiet", "Tin", "Crimson", "Hollow", "Northern", "Second",
             "Borrowed"],
    "noun": ["Harbour", "Orchard", "Lantern", "Saint", "Road", "Season", "Engine", "Moon", "Lighthouse",
             "Garden"],
    "name": ["{forename} {surname}"],
    "forename": ["Mara", "Tobias", "June", "Felix", "Iris", "Hugo", "Nadia", "Silas", "Greta", "Amos",
                 "Lena", "Otto"],
    "surname": ["Venn", "Crale", "Abara", "Stroud", "Calloway", "Bellweather", "Thorne", "Okoro", "Lund",
                "Pike", "Marrow", "Quill"],
    "genre": ["western", "thriller", "comedy", "musical", "ghost story", "war film", "romance",
              "silent film"],
    "relative": ["sister", "uncle", "neighbour", "boss", "mother", "teacher"],
    "company": ["with my brother", "with two friends", "alone", "with the whole family", "on a first date",
                "with a full house"],
    "when": ["last night", "on a rainy Sunday", "in the summer", "a year ago", "over the holidays",
             "by chance"],
    "city": ["Lisbon", "Trieste", "Bergen", "Glasgow", "Odessa", "Valparaiso"],
    "year": [str(year) for year in range(1931, 2020)],
    "nth": ["first", "second", "third", "fourth", "latest"],
    "span": ["ninety minutes", "two hours", "nearly three hours", "just over an hour"],
    "often": ["twice", "three times", "at the end", "in the second half", "from the first scene on"],
}


def expand(name, share, rng, tally):
    """A text for {name}; tally counts its judgements, "+" and "-", and the "nats" of its even choices."""
    if name not in GRAMMAR:
        sign = "+" if rng.random() < share else "-"
        tally[sign] += 1
        name += sign
    tally["nats"] += math.log(len(GRAMMAR[name]))
    return re.sub(r"\{(.+?)\}", lambda slot: expand(slot[1], share, rng, tally), rng.choice(GRAMMAR[name]))


def capitals(text):
    """The text with a capital letter at the start of each sentence."""
    return re.sub(r"(^|[.!] )([a-z])", lambda start: start[1] + start[2].upper(), text)


def likelihoods(tally):
    """-> for each of SHARES, P(the review's judgements | share)."""
    return [share ** tally["+"] * (1 - share) ** tally["-"] for share in SHARES]


def log_probability(tally):
    """-> log P(review) in nats. Its share is not in the text, so P is the mean over SHARES."""
    return math.log(sum(likelihoods(tally)) / len(SHARES)) - tally["nats"]


def positive(tally):
    """-> P(label is 1 | review): what a perfect classifier of whole reviews says."""
    likelihood = likelihoods(tally)
    return sum(likelihood[len(SHARES) // 2 :]) / sum(likelihood)


def write_reviews(count, rng, seen):
    """-> rows of the prompts' columns, sorted by label as the real ones are, and their tallies.

    None is in the set `seen`, to which they are added.
    """
    rows, tallies = [], []
    while len(rows) < count:
        share = SHARES[len(rows) * len(SHARES) // count]
        tally = Counter()
        text = capitals(expand("review", share, rng, tally))
        if text not in seen:
            seen.add(text)
            rows.append({"text": text, "label": int(share > 0.5)})
            tallies.append(tally)
    return rows, tallies


def write_pairs(count, rng, seen):
    """-> rows of the pairs' columns: an opening, and what a pleased and a displeased reviewer make of it."""
    half = len(SHARES) // 2
    pleased, displeased = SHARES[half:], SHARES[:half]
    rows = []
    while len(rows) < count:
        row = {"prompt": capitals(expand("opening", 0.5, rng, Counter()))}
        for column, shares in (("positive_completion", pleased), ("negative_completion", displeased)):
            row[column] = " " + capitals(expand("rest", rng.choice(shares), rng, Counter()))
        if tuple(row.values()) not in seen:
            seen.add(tuple(row.values()))
            rows.append(row)
    return rows
