"""charformer-compare: what is drawn and printed of several runs, and wrong input."""

import json
import math
from pathlib import Path

import pytest

from charformer_training.compare import main, read_run


def write_run(folder: Path, log: list[dict], config: dict | None = None, **state) -> Path:
    folder.mkdir(parents=True)
    state = {"log_history": log, "global_step": log[-1]["step"], "max_steps": 4, "train_batch_size": 8} | state
    (folder / "trainer_state.json").write_text(json.dumps(state))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def entries(terms: dict[str, list[float]], bpc: list[float]) -> list[dict]:
    steps = range(1, len(next(iter(terms.values()))) + 1)
    log = [
        {"step": step, "loss": 3.0 / step, "learning_rate": 0.1 / step}
        | {f"loss_{name}": values[step - 1] for name, values in terms.items() if step <= len(values)}
        for step in steps
    ]
    log += [{"step": 2 * n, "eval_loss": 1.0, "eval_bpc": value, "eval_bpb": value} for n, value in enumerate(bpc, 1)]
    return [*log, {"step": len(steps), "train_loss": 2.0}]


@pytest.fixture
def runs(tmp_path):
    terms = {
        "last_position": [2.0] * 4,
        "next_char": [2.5, 2.0, 1.5, 1.6],
        "layer_1": [2.8, 2.6],
        "target_2": [2.9] * 4,
    }
    # Keys of a Trainer's file are sorted; the lengths differ where a layer drops out.
    first = write_run(
        tmp_path / "with", entries({"next_char": terms["next_char"]} | terms, [2.7, 2.5]), {"num_targets": 2}
    )
    second = write_run(
        tmp_path / "$without_{$",
        entries({"next_char": [2.4, 2.2], "layer_1": [3.0], "last_position": [2.1, 2.2]}, [2.6]),
        {"num_targets": 1, "use_cache": False},
        train_batch_size=16,
    )
    return [str(first), str(second)]


def test_each_run_is_a_curve_in_the_panels_of_what_all_have(runs, tmp_path, figures, capsys):
    assert main([*runs, "--output", str(tmp_path / "picture.png")]) == 0
    (figure,) = figures
    drawn = {
        axis.get_title(): [([*line.get_xdata()], [*line.get_ydata()]) for line in axis.lines] for axis in figure.axes
    }
    assert list(drawn) == ["eval_bpc", "loss (the weighted sum of its terms)", "next_char", "layer_1", "last_position"]
    assert drawn["eval_bpc"] == [([2, 4], [2.7, 2.5]), ([2], [2.6])]
    assert drawn["next_char"] == [([1, 2, 3, 4], [2.5, 2.0, 1.5, 1.6]), ([1, 2], [2.4, 2.2])]
    assert drawn["layer_1"] == [([1, 2], [2.8, 2.6]), ([1], [3.0])]
    labels = {axis.get_title(): axis.get_ylabel() for axis in figure.axes}
    assert labels["eval_bpc"] == "bits per character" and labels["next_char"] == "nats per byte"
    assert {axis.get_xlabel() for axis in figure.axes} == {"step"}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == runs
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"with", "$without_{$", "picture.png"}


def test_table_has_last_and_best_figures_and_the_settings_that_differ(runs, tmp_path, capsys):
    assert main([*runs, "--output", str(tmp_path / "picture.png")]) == 0
    rows = [[cell.strip() for cell in line.split("  ") if cell] for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["last (best at step)", *runs]
    assert ["steps", "4 of 4", "2 of 4"] in rows
    assert ["eval_bpc", "2.5000 (2.5000 at 4)", "2.6000 (2.6000 at 2)"] in rows
    assert ["next_char", "1.6000 (1.5000 at 3)", "2.2000 (2.2000 at 2)"] in rows
    assert ["layer_1", "2.6000 (2.6000 at 2)", "3.0000 (3.0000 at 1)"] in rows
    differing = rows[rows.index(["Settings that differ:"]) + 1 :]
    assert differing[:2] == [["num_targets", "2", "1"], ["rows in a batch", "8", "16"]]
    assert differing[2] == []  # neither use_cache, nor what is the same


def test_a_setting_that_is_null_is_none_and_only_an_absent_one_is_unknown(tmp_path, capsys):
    log = entries({"next_char": [2.0]}, [])
    configs = {"all": {"intermediate_layers": "all", "new": None}, "none": {"intermediate_layers": None}, "old": {}}
    runs = [str(write_run(tmp_path / name, log, config)) for name, config in configs.items()]
    assert main([*runs, "--output", str(tmp_path / "picture.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    differing = lines[lines.index("Settings that differ:") + 1 :]
    assert differing[0].split() == ["intermediate_layers", "all", "none", "-"]
    assert differing[1] == ""  # `new` is known of one run only


def test_layers_of_deep_models_are_shown_as_their_mean(tmp_path, figures):
    log = entries({"next_char": [2.0], **{f"layer_{layer}": [float(layer)] for layer in range(1, 12)}}, [])
    runs = [str(write_run(tmp_path / name, log)) for name in "ab"]
    assert main([*runs, "--output", str(tmp_path / "picture.png")]) == 0
    panels = {axis.get_title(): axis for axis in figures[0].axes}
    assert list(panels)[1:] == ["next_char", "layers"]
    assert [[*line.get_ydata()] for line in panels["layers"].lines] == [[6.0], [6.0]]
    assert panels["layers"].get_ylabel() == "nats"  # nothing says that these are bytes


def test_a_run_that_is_not_finished_is_read_from_its_newest_checkpoint(tmp_path):
    for step in (9, 10, 11):
        log = [{"step": step, "loss": float(step), "learning_rate": 0.5}]
        write_run(tmp_path / "run" / f"checkpoint-{step}", log, {"num_targets": step})
    run = read_run(tmp_path / "run")
    assert (run.step, run.log[0]["loss"]) == (11, 11.0)
    assert run.settings["num_targets"] == 11 and run.settings["highest learning rate logged"] == 0.5


def test_names_of_terms_cannot_drive_the_terminal(tmp_path, capsys):
    log = [{"step": 1, "loss": 1e300, "loss_\x1b[2J": 2.0}]
    runs = [str(write_run(tmp_path / name, log)) for name in "ab"]
    assert main([*runs, "--output", str(tmp_path / "picture.png")]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\\x1b[2J  " in printed and "1e+300 (1e+300 at 1)" in printed


def test_a_figure_that_is_not_a_number_is_never_the_best(tmp_path, capsys):
    log = [{"step": 1, "loss": math.nan}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": math.nan}]
    runs = [str(write_run(tmp_path / name, log)) for name in "ab"]
    assert main([*runs, "--output", str(tmp_path / "picture.png")]) == 0
    assert "nan (2.0000 at 2)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no run: neither it nor a checkpoint in it has a trainer_state.json"),
        ('{"log_history": [{"st', "trainer_state.json cannot be read: "),
        ("\x00\xff", "trainer_state.json cannot be read: "),
        ("[1]", "holds no JSON object"),
        ("[" * 100_000, "trainer_state.json cannot be read: "),
        ('{"log_history": [{"step": 1' + "0" * 400 + ', "loss": 2.0}]}', "is not that of a Trainer"),
        ("{}", "the log_history of its trainer_state.json is not that of a Trainer"),
        ('{"log_history": [{"step": 1, "loss": "2"}]}', "is not that of a Trainer"),
        ('{"log_history": [], "logging_steps": 500}', "has logged no loss yet (logging_steps=500)"),
    ],
    ids=ascii,
)
def test_wrong_folder_is_refused_in_one_sentence(runs, tmp_path, capsys, content, message):
    folder = tmp_path / "wr\x1bong"
    folder.mkdir()
    if content is not None:
        (folder / "trainer_state.json").write_text(content, encoding="latin-1")
    assert main([*runs, str(folder), "--output", str(tmp_path / "picture.png")]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("charformer-compare: error: ") and captured.err.count("\n") == 1
    assert message in captured.err and "wr\\x1bong" in captured.err and "\x1b" not in captured.err
    assert not captured.out and not (tmp_path / "picture.png").exists()


def test_wrong_arguments_are_refused(runs, tmp_path, capsys):
    for words, message in (
        ([*runs, "nowhere"], "there is no folder nowhere"),
        (runs[:1], "give two or more different runs"),
        ([*runs, f"{runs[0]}/."], "give two or more different runs"),
        ([*runs, "--output", str(tmp_path / "no" / "a.png")], "give a PNG file in a folder that exists"),
        ([*runs, "--output", str(tmp_path / "a.pdf")], "give a PNG file in a folder that exists"),
    ):
        assert main(words) == 1
        assert message in capsys.readouterr().err
