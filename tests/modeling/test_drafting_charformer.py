"""What is looked up in a text, and when it is drafted."""

from modeling_charformer.drafting_charformer import Pace, as_string, continuation


def test_text_that_goes_in_circles_is_looked_up_at_full_length():
    circle = as_string([9, *[5, 6, 7] * 4])
    assert continuation(circle, 7, 8) == [5, 6, 7, 5, 6, 7, 5]
    assert continuation(circle, 2, 8) == [5, 6]
    assert continuation(as_string([*range(40)]), 7, 2) == []


def test_looked_up_text_is_trusted_against_a_drafter_that_is_right_less_often():
    pace = Pace()
    assert not pace.trusts_text()
    for _ in range(4):
        pace.verified([0.5], 0)
    pace.contradicted = [0, 4]
    assert not pace.trusts_text()
    pace.contradicted = [3, 4]
    assert pace.trusts_text()
    for _ in range(30):
        pace.verified([0.5], 1)
    assert not pace.trusts_text()
