import torch

from charformer_training.running_means import EvaluationTerms, TrainingTerms, group_by_layer


def tensors(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def test_parts_of_a_step_add_up_and_steps_are_averaged():
    terms = TrainingTerms()
    for step in (1, 2):
        for _ in range(2):
            terms.add(step, tensors(a=float(step), b=10.0), scale=0.5)
    assert terms.means() == {"a": 1.5, "b": 10.0}


def test_a_dropped_term_is_averaged_over_the_steps_it_was_in():
    terms = TrainingTerms()
    terms.add(1, tensors(a=1.0, b=4.0), 1.0)
    terms.add(2, tensors(a=2.0, b=6.0), 1.0)
    terms.add(3, tensors(a=6.0), 1.0)
    assert terms.means() == {"a": 3.0, "b": 5.0}


def test_first_value_that_is_not_finite_is_found():
    terms = TrainingTerms()
    terms.add(1, tensors(a=1.0, b=1.0), 1.0)
    assert terms.first_not_finite() is None
    terms.add(2, tensors(a=1.0, b=float("nan")), 1.0)
    terms.add(3, tensors(a=float("inf"), b=float("nan")), 1.0)
    assert terms.first_not_finite() == (2, ["b"])


def test_evaluation_weights_by_count_and_skips_empty_batches():
    terms = EvaluationTerms()
    terms.add("a", torch.tensor(1.0), 3)
    terms.add("a", torch.tensor(5.0), torch.tensor(1))
    terms.add("a", torch.tensor(float("nan")), 0)
    assert terms.totals() == {"a": (8.0, 4)}


def test_terms_are_grouped_over_layers():
    terms = {"next_char": 1.0, "layer_1": 2.0, "layer_12": 4.0, "layer_1_target_2": 5.0, "target_2": 6.0}
    assert group_by_layer(terms) == {"next_char": 1.0, "layers": 3.0, "layers_target_2": 5.0, "target_2": 6.0}
