"""The accuracy of heads, and the tokens that a pass of drafting by them yields."""

import pytest
import torch

from charformer_training import add_auxiliary_losses
from charformer_training.head_accuracy import head_accuracies
from tests.training.any_models import build
from tests.training.any_models import make_ids as make_tokens


def found_by_hand(predicted: dict[int, torch.Tensor], ids: torch.Tensor) -> tuple[dict[int, float], float]:
    """The accuracy of the heads of each offset, and the tokens of a pass; position by position."""
    rows, length = ids.shape
    right = {
        offset: {(r, t): bool(found[r, t] == ids[r, t + offset]) for r in range(rows) for t in range(length - offset)}
        for offset, found in predicted.items()
    }
    last, lengths = max(right), []
    for place in right[last]:
        run = 0
        while run + 2 <= last and right[run + 2][place]:
            run += 1
        lengths.append(run)
    accuracies = {offset: sum(of.values()) / len(of) for offset, of in right.items()}
    return accuracies, 1 + sum(lengths) / len(lengths)


@pytest.mark.parametrize("heads", ["linear", "residual", "sequential"])
def test_accuracies_of_a_charformer_are_those_counted_by_hand(make_model, make_ids, heads):
    model, ids = make_model(num_targets=3, target_heads=heads, vocab_size=3).eval(), make_ids(batch=6) % 3
    for block in model.target_blocks.values():
        torch.nn.init.normal_(block.linear.weight)
    found = head_accuracies(model, {"input_ids": ids, "labels": ids})
    with torch.no_grad():
        outputs = model(ids, output_hidden_states=True, return_final_hidden_state=True)
        predicted, state = {1: outputs.logits.argmax(-1)}, outputs.final_hidden_state
        for offset in (2, 3):
            previous = ids[:, offset - 1 :]
            logits, state = model.draft(offset, state[:, : previous.shape[1]], previous)
            predicted[offset] = logits.argmax(-1)
        lower = model.auxiliary_heads["layer_1_target_2"](model.model.norm(outputs.hidden_states[1])).argmax(-1)
    accuracies, tokens = found_by_hand(predicted, ids)
    assert {name for name in found if "layer" not in name} == {
        "accuracy_next_char",
        "accuracy_target_2",
        "accuracy_target_3",
        "tokens_per_pass",
    }
    for offset, name in enumerate(("next_char", "target_2", "target_3"), start=1):
        value, count = found[f"accuracy_{name}"]
        assert float(value) == pytest.approx(accuracies[offset])
        assert count == 6 * (20 - offset)
    assert float(found["tokens_per_pass"][0]) == pytest.approx(tokens)
    assert found["tokens_per_pass"][1] == 6 * 17
    assert 1 < tokens < 3
    assert float(found["accuracy_layer_1_target_2"][0]) == pytest.approx(found_by_hand({2: lower}, ids)[0][2])


@pytest.mark.parametrize("heads", ["shared", "own"])
def test_accuracies_of_any_model_are_those_counted_by_hand(heads):
    model, ids = build("llama", vocab_size=5, pad_token_id=0), make_tokens(batch=8) % 5
    add_auxiliary_losses(model, num_targets=2, intermediate_layers=[2], heads=heads)
    if heads == "shared":
        torch.nn.init.normal_(model.auxiliary_heads["target_2"].linear.weight)
    model.eval()
    found = head_accuracies(model, {"input_ids": ids, "labels": ids})
    with torch.no_grad():
        states = model.model(ids, output_hidden_states=True).hidden_states
        ahead = model.auxiliary_heads["target_2"](states[-1])
        lower = model.auxiliary_heads["layer_2"](model.model.norm(states[2]))
        if heads == "shared":
            ahead, lower = model.lm_head(ahead), model.lm_head(lower)
        predicted = {1: model(ids).logits.argmax(-1), 2: ahead.argmax(-1)}
    accuracies, tokens = found_by_hand(predicted, ids)
    assert float(found["accuracy_next_token"][0]) == pytest.approx(accuracies[1])
    assert float(found["accuracy_target_2"][0]) == pytest.approx(accuracies[2])
    assert float(found["accuracy_layer_2"][0]) == pytest.approx(found_by_hand({1: lower.argmax(-1)}, ids)[0][1])
    assert float(found["tokens_per_pass"][0]) == pytest.approx(tokens) == pytest.approx(1 + accuracies[2])


def test_positions_without_a_target_do_not_count(make_model, make_ids):
    model, ids = make_model(num_targets=3).eval(), make_ids()
    labels = ids.masked_fill(torch.arange(20) >= 15, -100)
    labels[1] = -100
    found = head_accuracies(model, {"input_ids": ids, "labels": labels})
    short = head_accuracies(model, {"input_ids": ids[:1, :15], "labels": ids[:1, :15]})
    assert str(found) == str(short)
    assert [int(count) for _, count in found.values()][:3] == [14, 13, 12]
    nothing = head_accuracies(model, {"input_ids": ids, "labels": torch.full_like(ids, -100)})
    assert all(count == 0 and value.isfinite() for value, count in nothing.values())


def test_packed_texts_do_not_run_into_each_other(make_model, make_ids):
    model, ids = make_model(num_targets=2).eval(), make_ids(batch=1)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    packed = head_accuracies(model, {"input_ids": ids, "labels": ids, "position_ids": positions})
    assert packed["accuracy_target_2"][1] == 6 + 10


@pytest.mark.parametrize("batch", [3, 32])
def test_trainer_reports_means_over_the_whole_evaluation(make_trainer, batch):
    trainer = make_trainer({"num_targets": 3}, per_device_eval_batch_size=batch, eval_head_accuracy=True)
    metrics = trainer.evaluate()
    rows = [{name: torch.as_tensor(value)[None] for name, value in row.items()} for row in trainer.eval_dataset]
    right: dict[str, float] = {}
    count: dict[str, int] = {}
    for row in rows:
        for name, (value, number) in head_accuracies(trainer.model.eval(), row).items():
            right[name] = right.get(name, 0) + float(value * number)
            count[name] = count.get(name, 0) + int(number)
    expected = {f"eval_{name}": total / count[name] for name, total in right.items()}
    assert {"eval_accuracy_next_char", "eval_accuracy_layer_2_target_3", "eval_tokens_per_pass"} <= set(expected)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    without = make_trainer({"num_targets": 3}, per_device_eval_batch_size=batch).evaluate()
    assert without["eval_loss"] == metrics["eval_loss"]
    assert set(metrics) - set(without) == set(expected)


def test_models_without_heads_are_refused(make_trainer):
    with pytest.raises(
        ValueError, match="eval_head_accuracy is true; it does not work with LlamaForCausalLM, which is not"
    ):
        make_trainer(build("llama"), eval_head_accuracy=True)
