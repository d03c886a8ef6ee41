"""charformer-compare: what is drawn and printed of several runs, and wrong input."""

import json
import math
from pathlib import Path

import pytest

from charformer_training.compare import _ABSENT, Run, _differ, _shown, main, read_run, remarks, why_losses_differ


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
    assert list(drawn) == ["eval_bpc", "next_char", "layer_1", "last_position"]  # no loss: one has target_2 in it
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
    assert differing[:2] == [["per_device_train_batch_size", "8", "16"], ["num_targets", "2", "1"]]
    assert differing[2] == []  # neither use_cache, nor what is the same


def compared(tmp_path: Path, capsys, terms: dict, *runs: dict) -> list[list[str]]:
    """The table of runs with these terms and saved settings, as rows of cells."""
    folders = []
    for number, settings in enumerate(runs):
        state = {"max_steps": settings.get("max_steps", 4)}
        folders.append(str(write_run(tmp_path / f"run{number}", entries(terms, [2.5]), **state)))
        (tmp_path / f"run{number}" / "manifest.json").write_text(json.dumps({"settings": settings}))
    assert main([*folders, "--output", str(tmp_path / "picture.png")]) == 0
    return [[cell.strip() for cell in line.split("  ") if cell] for line in capsys.readouterr().out.splitlines()]


SCHEDULED = {"intermediate_schedule": "paper", "target_schedule": "constant"}


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        ({"seed": 1, "learning_rate": 0.1}, {"seed": 2, "learning_rate": 0.2}, None),
        ({"max_steps": 4}, {"max_steps": 8}, None),
        (SCHEDULED | {"max_steps": 4}, SCHEDULED | {"max_steps": 8}, "max_steps differ"),
        ({"term_weights": {"layer_1": 0.5}}, {"term_weights": {"layer_1": 0.6}}, "term_weights differ"),
        ({"intermediate_weight": 1}, {"intermediate_weight": 1.0}, None),
        (
            {"auxiliary_losses": {"intermediate_weight": 1}},
            {"auxiliary_losses": {"intermediate_weight": 2}},
            "auxiliary_losses differ",
        ),
    ],
)
def test_loss_is_compared_only_where_it_is_the_same_sum(tmp_path, capsys, figures, first, second, why):
    rows = compared(tmp_path, capsys, {"next_char": [2.0, 1.5], "layer_1": [2.0]}, first, second)
    assert ("loss" in [row[0] for row in rows if row]) == (why is None)
    remark = [f"loss is left out, because the runs weigh their terms differently: {why}"]
    assert (remark in rows) == (why is not None)
    assert len(figures[0].axes) == (4 if why is None else 3)


def with_terms(folder: Path, terms: list[str], settings: dict | None, max_steps: int = 4) -> Run:
    write_run(folder, entries({"next_char": [2.0], **{name: [2.0] for name in terms}}, []), max_steps=max_steps)
    if settings is not None:
        (folder / "manifest.json").write_text(json.dumps({"settings": settings}))
    return read_run(folder)


@pytest.mark.parametrize(
    ("schedule", "lengths", "why"),
    [
        ("paper", (100, 50), "the runs weigh their terms differently: max_steps differ"),
        ("paper", (100, 100), ""),
        ("constant", (100, 50), ""),
        ("rotate_2", (100, 50), ""),
    ],
)
def test_steps_of_runs_by_epochs_are_compared_where_a_schedule_depends_on_them(tmp_path, schedule, lengths, why):
    settings = {"num_targets": 1, "intermediate_schedule": schedule, "max_steps": -1, "num_train_epochs": 3}
    runs = [with_terms(tmp_path / str(number), ["layer_1"], settings, length) for number, length in enumerate(lengths)]
    assert why_losses_differ(runs) == why


def test_epochs_that_give_the_same_number_of_steps_do_not_differ(tmp_path):
    epochs = [{"intermediate_schedule": "paper", "max_steps": -1, "num_train_epochs": number} for number in (3, 6)]
    assert why_losses_differ([with_terms(tmp_path / str(n), ["layer_1"], one) for n, one in enumerate(epochs)]) == ""


LISTED = {"auxiliary_losses": {"intermediate_layers": [1], "intermediate_schedule": "constant"}, "n_layer": 2}
SETTINGS = {"num_targets": 2, "target_schedule": "forward", "num_hidden_layers": 2}
NOT_ALL = "the runs may not add up the same terms: not all have logged "


@pytest.mark.parametrize(
    ("terms", "settings", "why"),
    [
        ((["layer_1", "layer_2"], ["layers"]), (SETTINGS, SETTINGS), ""),  # log_loss_terms
        ((["target_2"], []), (SETTINGS, SETTINGS), ""),  # the other run is not that far
        ((["aux_loss"], []), (SETTINGS, SETTINGS), f"{NOT_ALL}aux_loss"),
        (
            (["layers"], ["layers"]),
            (SETTINGS, SETTINGS | {"num_hidden_layers": 3}),
            "the runs weigh their terms differently: num_hidden_layers differ",
        ),
        ((["layer_1"], ["layer_1"]), (LISTED, LISTED | {"n_layer": 3}), ""),
        ((["target_2"], ["target_2"]), (SETTINGS, SETTINGS | {"num_hidden_layers": 3}), ""),
        ((["layer_1"], []), (SETTINGS, None), f"{NOT_ALL}layer_1, and their settings do not say why"),
        ((["layer_1"], ["layer_1"]), (SETTINGS, None), ""),
        (
            (["layer_1"], []),
            (SETTINGS | {"auxiliary_losses": None}, {"auxiliary_losses": None}),
            f"{NOT_ALL}layer_1, and their settings do not say why",
        ),
        ((["layer_1"], ["layers"]), (SETTINGS | {"auxiliary_losses": None}, SETTINGS), ""),
    ],
)
def test_names_of_terms_count_only_where_settings_do_not_explain_them(tmp_path, terms, settings, why):
    both = [with_terms(tmp_path / str(n), *one) for n, one in enumerate(zip(terms, settings, strict=True))]
    assert why_losses_differ(both) == why
    assert remarks(both) == ([f"loss is left out, because {why}"] if why else [])


@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [
        ([1, 0.5], [1.0, 0.5], False),
        ({"a": [0, {"b": 2}]}, {"a": [-0.0, {"b": 2.0}]}, False),
        (2**60, 2.0**60, False),
        ([math.nan, math.inf], [math.nan, math.inf], False),
        ([1], [True], True),
        ({"a": 0}, {"a": False}, True),
        ([2**60], [2**60 + 1], True),
        ([1], [1.5], True),
        ([1], ["1"], True),
    ],
    ids=str,
)
def test_numbers_are_compared_as_numbers_at_any_depth(one, other, differ):
    assert _differ([one, other]) == differ


def test_a_long_value_is_shown_from_its_beginning_unless_it_has_two_forms():
    long = "beginning" * 10
    for values in ([_ABSENT, long], [long, _ABSENT, long]):
        assert {*_shown(values)} == {"-", f"{long[:57]}..."}
    assert _shown([f"{long}x", _ABSENT, f"{long}y"]) == ["...gbeginningx", "-", "...gbeginningy"]


def test_validation_split_is_not_taken_for_the_part_that_is_evaluated(tmp_path):
    def run(name: str, digit: str, evaluated: int | None) -> Run:
        folder = write_run(tmp_path / name, entries({"next_char": [2.0]}, [2.5]))
        (folder / "metrics.json").write_text(json.dumps({"splits": {"validation": [900, digit * 64]}}))
        if evaluated is not None:
            saved = {"validation_data": f"sha256 {digit * 64}, {evaluated} bytes"}
            (folder / "_result.json").write_text(json.dumps({"settings": saved}))
        return read_run(folder)

    whole, cut, other = run("whole", "0", None), run("cut", "0", 90), run("other", "1", None)
    differ = "The validation texts differ, so figures of evaluations cannot be compared."
    assert remarks([whole, cut]) == []
    assert remarks([whole, other]) == remarks([cut, other]) == [differ]
    assert remarks([cut, run("less", "0", 80)]) == [differ]


def test_all_saved_settings_are_compared_in_full(tmp_path, capsys):
    long = [f"layer.{number}" for number in range(99)]
    shared = {"optim": "adamw", "hidden_size": 16, "validation_data": None, "betas": True}
    first = shared | {"seed": 1, "weight_decay": 0.123456789, "modules": [*long, "x"], "data_seed": None}
    second = shared | {"seed": 2, "weight_decay": 0.123456788, "modules": [*long, "y"], "betas": 1, "data_seed": 3}
    first["auxiliary_losses"], second["auxiliary_losses"] = {"a": 1, "b": {"c": 2}}, {"b": {"c": 3}, "a": 1, "d": None}
    rows = compared(tmp_path, capsys, {"next_char": [2.0]}, first, second)
    assert rows[rows.index(["Settings that differ:"]) + 1 : -2] == [
        ["betas", "true", "1"],
        ["seed", "1", "2"],
        ["weight_decay", "0.123456789", "0.123456788"],
        ["modules", '...yer.98", "x"]', '...yer.98", "y"]'],
        ["data_seed", "none", "3"],
        ["auxiliary_losses.b", '{"c": 2}', '{"c": 3}'],
        ["auxiliary_losses.d", "-", "none"],
    ]


def test_other_texts_and_vocabularies_are_said(tmp_path, capsys):
    texts = [{"validation_data": f"sha256 {digit * 64}, 9 bytes", "vocab_size": 256 + int(digit)} for digit in "01"]
    rows = compared(tmp_path, capsys, {"next_char": [2.0]}, *texts)
    assert ["The validation texts differ, so figures of evaluations cannot be compared."] in rows
    assert ["The vocabularies differ, so losses in nats per token cannot be compared."] in rows
    assert ["validation_data", "sha256 000000000000..., 9 bytes", "sha256 111111111111..., 9 bytes"] in rows


def test_runs_without_a_figure_in_common_get_a_table(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name, entries({name: [2.0]}, []))) for name in ("layer_1", "layer_2")]
    assert main([*runs, "--output", str(tmp_path / "picture.png")]) == 0
    assert "No picture is drawn" in capsys.readouterr().out and not (tmp_path / "picture.png").exists()


def test_a_setting_that_is_null_is_none_and_only_an_absent_one_is_unknown(tmp_path, capsys):
    log = entries({"next_char": [2.0]}, [])
    configs: dict[str, dict] = {
        "all": {"intermediate_layers": "all", "new": None},
        "none": {"intermediate_layers": None},
        "old": {},
    }
    runs = [str(write_run(tmp_path / name, log, config)) for name, config in configs.items()]
    assert main([*runs, "--output", str(tmp_path / "picture.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    differing = lines[lines.index("Settings that differ:") + 1 :]
    assert differing[0].split() == ["intermediate_layers", "all", "none", "-"]
    assert differing[1] == ""  # `new` is known of one run only


def test_a_saved_learning_rate_is_shown_in_place_of_the_highest_logged(tmp_path):
    for saved, name in ((0.5, "_result.json"), (0.25, "manifest.json")):
        run = write_run(tmp_path / name, entries({"next_char": [2.0]}, []))
        assert read_run(run).settings["highest learning rate logged"] == 0.1
        (run / name).write_text(json.dumps({"settings": {"learning_rate": saved}}))
        settings = read_run(run).settings
        assert settings["learning_rate"] == saved and "highest learning rate logged" not in settings


def test_layers_of_deep_models_are_shown_as_their_mean(tmp_path, figures):
    layers = {f"layer_{layer}": [float(layer)] for layer in range(1, 13)}
    log = entries({"next_char": [2.0], **layers}, [])
    layers.pop("layer_12")  # what only one run has is not in the mean
    logs = {"a": log, "b": entries({"next_char": [2.0], **layers}, [])}
    runs = [str(write_run(tmp_path / name, log)) for name, log in logs.items()]
    assert main([*runs, "--output", str(tmp_path / "picture.png")]) == 0
    panels = {axis.get_title(): axis for axis in figures[0].axes}
    assert list(panels) == ["next_char", "layers"]
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
