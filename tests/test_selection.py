"""What of all combinations `make test` runs."""

from itertools import product

from dit_toolkit.tests.selection import covering


def values_in(cases, kept):
    return {value for number in kept for value in cases[number]}


def test_every_value_of_every_parameter_is_there():
    cases = [(("a", a), ("b", b), ("c", c)) for a, b, c in product(range(7), range(5), range(3))]
    kept = covering(cases)
    assert values_in(cases, kept) == {value for case in cases for value in case}
    assert len(kept) < len(cases) / 4


def test_every_value_comes_as_often_as_asked():
    cases = [(("a", a), ("b", b)) for a, b in product(range(6), range(6))]
    kept = covering(cases, times=2)
    for value in {value for case in cases for value in case}:
        assert sum(value in cases[number] for number in kept) >= 2


def test_a_value_with_one_case_keeps_it():
    cases = [("common", "rare"), *[("common", "other")] * 9]
    assert 0 in covering(cases, times=3)


def test_it_is_the_same_everywhere():
    cases = [(("a", a), ("b", b)) for a, b in product(range(9), range(9))]
    assert covering(cases) == covering(list(cases))
