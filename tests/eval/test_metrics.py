"""Scoring rules on fixed inputs; the expected values were produced by the official scorers."""

from __future__ import annotations

import pytest

from eval.intervals import wilson_interval
from eval.metrics.choices import read_first_letter, read_mmbench, read_scienceqa
from eval.metrics.vqa import (
    flatten,
    leave_one_out,
    normalise,
    normalise_evalai,
    textvqa_accuracy,
    vizwiz_accuracy,
    vqa_accuracy,
)
from eval.metrics.yes_no import binary_figures, mean_figures, read_exact, read_mme, read_pope_llava

# Answer, VQA v2's normalisation, the EvalAI processor's.
NORMALISED = [
    ("The Dog.", "dog", "dog"),
    ("two", "2", "2"),
    ("1,000", "1000", "1000"),
    ("a 3.5 oz. can", "3.5 oz can", "3.5 oz can"),
    ("Dont", "don't", "don't"),
    ("it's", "it's", "it 's"),
    ("What's that?", "what's that", "what 's that"),
    ("yes, please", "yes please", "yes please"),
    ("red/blue", "red blue", "red blue"),
    ("red / blue", "red blue", "red blue"),
    ("U.S.A.", "usa", "usa"),
    ("10:30", "10:30", "10:30"),
    ("T-shirt", "t shirt", "t shirt"),
    ("none", "0", "0"),
    ("An apple and the pear", "apple and pear", "apple and pear"),
    ("12,3 a,b", "123 ab", "123 ab"),
    ("youd've", "you'd've", "you'd've"),
    ("somebody'd", "somebodyd", "somebodyd"),
    ("." * 40 + "x", "." * 8 + "x", "." * 8 + "x"),
    ("line\none", "line 1", "line 1"),
    ("tab\there", "tab here", "tab here"),
    ("", "", ""),
    ("The", "", ""),
    ("日本, 語", "日本 語", "日本 語"),
    ("ten's", "ten's", "10 's"),
    ("$5.00", "$5.00", "$5.00"),
    ("5.", "5", "5"),
    ("Im", "im", "im"),
    ("`a`", "", ""),
]


@pytest.mark.parametrize(("text", "vqa", "evalai"), NORMALISED)
def test_normalisation_is_the_official_one(text: str, vqa: str, evalai: str) -> None:
    assert normalise(flatten(text)) == vqa
    assert normalise_evalai(text) == evalai


def people(*answers: str, ids: bool = True) -> list[dict[str, object]]:
    return [
        {"answer": answer, "answer_confidence": "yes"} | ({"answer_id": n} if ids else {})
        for n, answer in enumerate(answers)
    ]


@pytest.mark.parametrize(
    ("others", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_leave_one_out_counts_the_other_nine(others: int, expected: float) -> None:
    assert leave_one_out([True] * others + [False] * (10 - others)) == pytest.approx(expected)


def test_vqa_normalises_only_where_people_disagree() -> None:
    assert vqa_accuracy("The dog", people(*["dog"] * 10))[0] == 0.0
    assert vqa_accuracy("The dog", people(*["dog"] * 9, "a dog."))[0] == 1.0


def test_vqa_leaves_out_equal_records_where_there_are_no_ids() -> None:
    # Everybody who said "dog" is one and the same record, so nobody else is left to agree with.
    assert vqa_accuracy("dog", people(*["dog"] * 5, *["cat"] * 5, ids=False))[0] == 0.5
    assert vqa_accuracy("dog", people(*["dog"] * 5, *["cat"] * 5))[0] == 1.0


def test_vizwiz_takes_peoples_answers_as_they_stand() -> None:
    assert vizwiz_accuracy("Unanswerable.", ["unanswerable"] * 10)[0] == 1.0
    assert vizwiz_accuracy("a dog", ["a dog"] * 10)[0] == 0.0


@pytest.mark.parametrize(
    ("answer", "compared"),
    [
        ("Dont know", "don’t know"),
        ("cant tell", "can't tell"),
        ("couldn'tve", "couldn’t’ve"),
        ("it's", "it's"),
    ],
)
def test_vizwiz_writes_most_contractions_with_a_typographic_apostrophe(answer: str, compared: str) -> None:
    assert vizwiz_accuracy(answer, [compared] * 10) == (1.0, compared)
    assert normalise(answer) == compared.replace("’", "'")


def test_textvqa_normalises_both_sides() -> None:
    assert textvqa_accuracy("Nokia's", ["nokia 's"] * 10)[0] == 1.0
    assert textvqa_accuracy("", ["the"] * 10)[0] == 1.0


@pytest.mark.parametrize(
    ("answer", "llava", "strict", "mme"),
    [
        ("Yes", "yes", "yes", "yes"),
        ("No", "no", "no", "no"),
        ("NO", "yes", "no", "no"),
        ("No, there is", "no", "", "no"),
        ("It is. No", "yes", "", ""),
        ("There is not one", "no", "", ""),
        ("know", "yes", "", "no"),
        (" yes\n", "yes", "yes", "yes"),
        ("no\n", "yes", "no", "no"),
        ("", "yes", "", ""),
        ("否", "yes", "", ""),
    ],
)
def test_yes_and_no_under_three_rules(answer: str, llava: str, strict: str, mme: str) -> None:
    assert (read_pope_llava(answer), read_exact(answer), read_mme(answer)) == (llava, strict, mme)


def test_binary_figures_by_hand() -> None:
    pairs = (
        [("yes", "yes")] * 6 + [("yes", "no")] * 2 + [("no", "yes")] * 3 + [("no", "no")] * 8 + [("yes", "")]
    )
    figures = binary_figures(pairs, "rule")
    assert figures["accuracy"].value == pytest.approx(70.0)
    assert figures["precision"].value == pytest.approx(100 * 6 / 9)
    assert figures["recall"].value == pytest.approx(100 * 6 / 9)
    assert figures["f1"].value == pytest.approx(100 * 6 / 9)
    assert figures["yes_ratio"].value == pytest.approx(45.0)
    assert binary_figures(pairs, "rule", forgiving_recall=True)["recall"].value == pytest.approx(75.0)
    assert all(figure.low < figure.value < figure.high for figure in figures.values())


def test_binary_figures_of_answers_that_are_all_right_or_all_wrong_are_no_certainty() -> None:
    right = binary_figures([("yes", "yes")] * 20 + [("no", "no")] * 60, "rule")
    low, _ = wilson_interval(20, 20)  # 20 were called "yes", 20 are: precision, recall and F1 are of these
    for name in ("precision", "recall", "f1"):
        assert (right[name].value, right[name].high, right[name].method) == (100.0, 100.0, "wilson")
        assert right[name].low == pytest.approx(100 * low), name
    wrong = binary_figures([("yes", "no")] * 20 + [("no", "yes")] * 60 + [("yes", "")] * 20, "rule")
    for name, n in (("precision", 60), ("recall", 40)):
        assert (wrong[name].value, wrong[name].low) == (0.0, 0.0)
        assert wrong[name].high == pytest.approx(100 * wilson_interval(0, n)[1]), name
    forgiven = binary_figures([("yes", "no")] * 20 + [("yes", "")] * 20, "rule", forgiving_recall=True)
    assert forgiven["recall"].high == pytest.approx(100 * wilson_interval(0, 20)[1])


@pytest.mark.parametrize(("said", "value"), [("gold", 100.0), ("yes", 50.0)])
def test_means_of_pictures_that_are_all_alike_are_no_certainty(said: str, value: float) -> None:
    group = [
        (f"{picture}.jpg", gold, gold if said == "gold" else said)
        for picture in range(20)
        for gold in ("yes", "no")
    ]
    made = mean_figures([group, group], "rule")
    share = 100 * wilson_interval(0, 20)[1]
    assert (made["accuracy"].value, made["accuracy"].method) == (value, "wilson over pictures")
    assert made["accuracy"].low == pytest.approx(value - share * value / 100)
    assert made["accuracy"].high == pytest.approx(value + share * (100 - value) / 100)
    assert made["f1"].high - made["f1"].low > 10
    mixed = [*group[:-1], ("19.jpg", "no", "no" if said == "yes" else "")]
    assert mean_figures([mixed, group], "rule")["accuracy"].method == "bootstrap over pictures"


def test_f1_without_a_true_yes_is_zero_and_not_undefined() -> None:
    rest = [("yes", "no")] * 7 + [("no", "yes")] * 8 + [("no", "no")] * 14
    none = binary_figures(rest, "rule")["f1"]
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(100 * wilson_interval(0, 15)[1])
    one = binary_figures([("yes", "yes"), *rest], "rule")["f1"]  # a third of the resamples are without it
    assert one.value == pytest.approx(100 * 2 / 17)
    assert one.low == 0.0 < one.value < one.high
    groups = [[(f"{n}.jpg", *pair) for n, pair in enumerate(rest)]] * 2
    assert mean_figures(groups, "rule")["f1"].high == pytest.approx(100 * wilson_interval(0, 29)[1])


def test_binary_figures_without_any_yes() -> None:
    figures = binary_figures([("no", "no")] * 3, "rule")
    assert (figures["accuracy"].value, figures["f1"].value) == (100.0, 0.0)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B. because", "B"),
        ("The answer is C.", "C"),
        ("The answer is C", ""),
        ("The answer is A. The answer is B.", ""),
        ("E", ""),
        ("b", ""),
        ("", ""),
    ],
)
def test_scienceqa_letters(answer: str, letter: str) -> None:
    assert read_scienceqa(answer, 4) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. red", "B"),
        ("It is A or B", ""),
        ("The correct answer is **C**, while A and B are not", "C"),
        ("a red one", "B"),
        ("red or blue", ""),
        ("Cannot determine the answer", "Z"),
        ("", ""),
    ],
)
def test_mmbench_letters(answer: str, letter: str) -> None:
    assert read_mmbench(answer, {"A": "green", "B": "red", "C": "blue"}) == letter


def test_mmbench_measures_an_answer_in_lower_case() -> None:
    # Twice the options' eight characters are the most; the capital letter is two in lower case.
    assert read_mmbench("a cat it is, ah\u0130", {"A": "a cat", "B": "dog"}) == ""
    assert read_mmbench("a cat it is, ahh", {"A": "a cat", "B": "dog"}) == "A"


def test_first_letter() -> None:
    assert [read_first_letter(text) for text in (" b. dog", "", "C")] == ["B", "", "C"]
