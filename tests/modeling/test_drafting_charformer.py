"""What is looked up in a text, and when it is drafted."""

from threading import Thread

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from modeling_charformer.drafting_charformer import as_string, continuation, write_drafts
from modeling_charformer.gumbel_noise import GumbelNoise
from modeling_charformer.pace_charformer import Pace, keep_pace, pace_of
from modeling_charformer.verification_charformer import VerifiedDecoding


def test_text_that_goes_in_circles_is_looked_up_at_full_length():
    circle = as_string([9, *[5, 6, 7] * 4])
    assert continuation(circle, 7, 8) == [5, 6, 7, 5, 6, 7, 5]
    assert continuation(circle, 2, 8) == [5, 6]
    assert continuation(as_string([*range(40)]), 7, 2) == []


@pytest.mark.parametrize(("right", "passes"), [(True, 8), (False, 3), (None, 3)])
def test_a_drafter_that_is_mostly_right_is_not_given_up_after_a_few_slow_passes(right, passes):
    pace = Pace()
    pace.rests()
    pace.passed_without(1.0)
    count = 0
    while pace.resting < 0:
        if right is not None:  # else no draft was worth verifying
            pace.verified([0.5], int(right))
        pace.passed(verified=3, drafts=3, tokens=2.0, drafting=0.1, seconds=4.0)
        count += 1
    assert count == passes


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


@pytest.mark.parametrize("seconds", [1.3, 2.0, 3.0])
@pytest.mark.parametrize("tokens", [96, 300])
def test_bad_drafts_cost_a_twentieth_of_the_time_at_most_however_dear_they_are(tokens, seconds):
    pace, used = Pace(), 0.0
    for _ in range(tokens):
        if pace.rests():
            pace.passed_without(1.0)
            used += 1.0
        else:
            first = not pace.recent
            pace.verified([0.5], 0)
            pace.passed(
                verified=3 * first, drafts=3 * first, tokens=1.0, drafting=0.0, seconds=seconds if first else 1.05
            )
            used += seconds if first else 1.05
    assert tokens < used <= 1.05 * tokens


def test_what_drafts_cost_is_measured_anew_when_rows_are_left_out_but_a_rest_goes_on():
    pace = Pace()
    assert pace.rests()
    pace.plain.append(1.0)
    for _ in range(3):
        pace.verified([0.5], 0)
        pace.passed(verified=1, drafts=1, tokens=1.0, drafting=0.1, seconds=1.5)
    pace.begin_again()
    assert [pace.rests() for _ in range(32)] == [True] * 32
    pace = Pace()
    pace.rests()
    pace.plain.append(1.0)
    pace.begin_again()
    assert pace.rests()


@pytest.mark.parametrize(("seconds", "rest"), [(0.5, 32), (2.0, 8)])
def test_drafts_are_given_up_for_a_few_passes_alone_if_it_was_a_plain_pass_that_was_fast_by_chance(seconds, rest):
    """What a plain pass takes comes from one of them at first."""
    pace = Pace()
    assert pace.rests()
    pace.passed_without(0.5)
    for _ in range(3):
        pace.verified([0.5], 0)
        pace.passed(verified=3, drafts=3, tokens=3.0, drafting=0.1, seconds=3.0)
    rests = 0
    while pace.rests():
        pace.passed_without(seconds)
        rests += 1
    assert rests == rest


def test_a_drafter_that_is_seldom_right_is_not_asked():
    asked = []

    def draft(number, previous):
        asked.append(number)
        return torch.eye(4)[:1]

    def drafts(hits):
        pace = Pace()
        pace.plain.append(1.0)
        for number in range(20):
            pace.verified([0.99], int(number < hits))
        pace.passed(verified=1, drafts=1, tokens=1.5, drafting=0.1, seconds=1.2)
        asked.clear()
        choose = lambda drafts, logits: (logits, logits.argmax(-1))  # noqa: E731
        write_drafts(draft, 3, choose, [[]], torch.zeros(1, dtype=torch.long), 3, pace, [0])
        return len(asked)

    assert drafts(0) == 0
    assert drafts(20) == 3


def test_what_drafts_cost_and_bring_is_remembered_until_the_model_is_trained_or_the_call_is_another():
    model = torch.nn.Linear(2, 2)
    assert not pace_of(model, "greedy", False).plain
    pace = pace_of(model, "greedy", False)
    pace.rests()
    pace.passed_without(1.0)
    for _ in range(3):
        pace.verified([0.5], 0)
        pace.passed(verified=4, drafts=4, tokens=1.0, drafting=0.1, seconds=2.0)
    pace.resting = 400
    keep_pace(model, pace)
    again = pace_of(model, "greedy", False)
    assert list(again.plain) == [1.0]
    assert (again.losses, again.resting) == (1, 32)  # in another text drafts are tried again soon
    again.passed_without(9.0)
    assert list(pace.plain) == [1.0]  # it is a copy: another thread may go on with the same one
    assert not pace_of(model, "in a batch", False).plain
    torch.nn.init.zeros_(model.weight)
    assert not pace_of(model, "greedy", False).plain
    with torch.inference_mode():
        assert not pace_of(torch.nn.Linear(2, 2), "greedy", False).plain


def test_generate_remembers_what_drafts_cost(make_model):
    model = make_model(num_targets=3).eval()
    known = []
    for _ in range(2):
        model.generate(torch.tensor([[5]]), max_new_tokens=8, use_extra_targets=True)
        known.append(pace_of(model, (None, 1, False, 1.0, torch.device("cpu")), False).passes)
    assert 0 < known[0] < known[1]


def test_a_pass_of_another_thread_does_not_disturb_drafts(make_model, drafts_in_every_pass):
    model = make_model(num_targets=4).eval()

    class Other(BaseStreamer):
        def put(self, value):
            thread = Thread(target=model, args=(torch.tensor([[7, 8], [9, 10]]),))
            thread.start()
            thread.join()

        def end(self):
            pass

    settings = {"max_new_tokens": 12, "do_sample": False}
    plain = model.generate(torch.tensor([[5]]), **settings)
    assert model.generate(torch.tensor([[5]]), use_extra_targets=True, streamer=Other(), **settings).equal(plain)


def test_a_row_that_has_finished_does_not_keep_the_noise_of_its_place():
    decoding = object.__new__(VerifiedDecoding)
    noise = decoding.noise = GumbelNoise()
    decoding.prompt, decoding.numbers, decoding.live = 3, [0, 1], [1]
    for length in range(4, 200):
        decoding.lengths = [4, length]
        decoding._picked(torch.zeros(2, 1, 8), 0)
    assert noise.drawn is not None
    assert len(noise.drawn) <= 32
