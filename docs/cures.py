"""What to do about the messages that do not say it themselves: by module, a part of the message and the cure.

A message that names what is accepted needs no entry. tests/test_docs.py finds messages that have neither.
"""

_TOO_LITTLE_SPACE = "Free some space, or give a folder on another disk; `save_total_limit` keeps fewer checkpoints."
_SEES_THE_ANSWER = "Take a model that reads from left to right, or losses on a classifier of this one."
_OTHER_LOSS = "Compute the losses in a term of your own, with `add_loss_term`."
_GONE = "Check the path; relative ones begin in the folder from which the program was started."
_REASON = "This is the reason in another message, which says what to do."
_COPY_AGAIN = "Copy or download the folder again, or take one of the run's checkpoints."

CURES: dict[str, dict[str, str]] = {
    "configuration_charformer": {
        "has no field": "Correct the name; `CharformerConfig` in the API reference lists the fields.",
        "does not divide hidden_size": "Take a number of heads that divides the width.",
    },
    "loss_settings": {
        "is none of them": "Let the schedule choose among the layers that the message lists.",
        "names a layer twice": "Name each layer once.",
    },
    "tokenization_charformer": {
        "each is the name of a byte there": "Choose longer names, such as `<pad>`; names of one character are bytes.",
        "is outside 0..…": "Decode ids of this tokenizer only; the vocabulary of the model may be larger than its own.",
        "leaves nothing of its text": "Raise `max_length`, or truncate the other text, or both (`longest_first`).",
    },
    "any_model": {
        "do not contain the outputs of its layers": "Choose layers that the message does not name, or further targets"
        " alone (`intermediate_layers=None`).",
        "last layer's output alone": "Use further targets alone: `intermediate_layers=None`.",
        "has auxiliary losses already": "Add all of the losses in one call. To change them, load the model anew first.",
        "has no output embeddings": "Take the class with the head, such as `AutoModelForCausalLM`.",
        "add_auxiliary_losses takes": "Take one of the kinds of model that the message names; the page on models lists them.",
    },
    "arguments": {"come to more than 1": "Lower one of the two; what they leave is the test split."},
    "causal_lm": {"reads in both directions": _SEES_THE_ANSWER},
    "language_models": {
        "reads in both directions": _SEES_THE_ANSWER,
        "so the auxiliary losses would not be comparable": _OTHER_LOSS,
    },
    "classifiers": {
        "reads neither one position nor the mean": _OTHER_LOSS,
        "so the auxiliary losses would not be comparable": _OTHER_LOSS,
    },
    "checkpoints": {
        "saving … failed": _TOO_LITTLE_SPACE,
        "which holds the best model so far": "Put that folder back, or train again with `--overwrite_output_dir`.",
        "the best model's checkpoint": "Resume from an earlier checkpoint, or leave out `load_best_model_at_end`.",
    },
    "checks": {
        "a path holds no zero byte": "Give the path without it; it usually comes from a file with another encoding.",
        "there is no home directory": "Write the path in full, without `~`.",
    },
    "compare": {
        "is not the folder of a run": "Give the run's folder, not a file in it.",
        "holds no run": "Give the `output_dir` of a run that has written a checkpoint or has ended.",
        "is not that of a Trainer": "The file was changed or cut. Compare a checkpoint of the run instead.",
        "has logged no loss yet": "Train with a `logging_steps` below `max_steps`.",
        "cannot be read": "The file was changed or cut. Compare a checkpoint of the run instead.",
        "holds no JSON object": "The file was changed or cut. Compare a checkpoint of the run instead.",
    },
    "corpus_files": {
        "row … cannot be read": "Correct that row: as JSON on one line, or with the same quotes as the others.",
        "cannot be read": "Make the file readable, or download it again if it is damaged, and keep it until the text is read.",
        "is not UTF-8 after row": "Convert the table: `iconv -f ENCODING -t UTF-8`.",
        "has the columns": "Give one of these as `text_column`.",
        "a name is given twice": "Correct that row: each of its names may stand in it once.",
        "columns have the name": "Rename all but one of these columns.",
        "cannot be written in UTF-8": "Half of a surrogate pair stands alone there. Write the table again from its source.",
    },
    "data": {
        "the run would be a part of its own text": "Write the run into another folder than that of the text.",
        "holds no text file": "Unpack or convert what the folder holds, or give another folder.",
        "is empty": "Give a file that holds text; an interrupted download can leave an empty one.",
        "has the columns": "Give one of these as `text_column`.",
        "cannot be read": "Check the name, the `dataset_config`, the split and the connection to the Hub.",
        "there is no text in the file": "Check `text_column`: all of its rows are empty.",
    },
    "draft_heads": {
        "the model's output embeddings": "Resize heads and embeddings together, or train the heads again.",
    },
    "evaluate_cli": {
        "the folder of … cannot be": "Give a file in a folder that you may write to.",
        "is not available or not known": "Give `cpu`, or `cuda` where PyTorch was installed for the GPU.",
        "it holds shapes without values": _REASON,
        "is empty": "Often a shell variable is not set: give the model and the text as the message shows.",
    },
    "evaluation": {
        "the text is a single character": "Give a longer text.",
        "bits by position need more than a window": "Give a longer text, or leave out `--plots`.",
        "is not finite": "Evaluate in float32 (`--dtype float32`). If that fails too, copy or download the weights again.",
        "it is a folder, a device or a pipe": _REASON,
        "its values have another type": _REASON,
        "its values are no bits": _REASON,
        "there is no file": _GONE,
        "is empty": "Give a file that holds text.",
    },
    "files": {
        "saving … failed": _TOO_LITTLE_SPACE,
        "is not a regular file": "Move the link, device or folder of that name away, or give another `output_dir`.",
    },
    "fused_head": {
        "it is defined for": "Use one of the Trainers that the message names, or let this one call the model's own head.",
        "shift_labels are given": "Pass `labels` in their place; they are shifted in the model.",
    },
    "heads_file": {
        "it holds a model without auxiliary heads": "Give the folder of the full model, not the one for inference alone.",
        "was saved with another model": "Load the heads into the model that they were trained with.",
        "was saved with another draft_vocabulary": "Load the heads by `load_auxiliary_losses`, which takes their vocabulary too.",
        "the model's configuration says": _COPY_AGAIN,
        "was saved with other auxiliary losses": "Add the losses with the settings of that model, or load them by"
        " `load_auxiliary_losses`.",
    },
    "locks": {
        "cannot be made": "Give an `output_dir` in a folder that you may write to.",
        "cannot be written to": "Give an `output_dir` that you may write to, on a disk that is not read-only.",
    },
    "loss_terms": {"models of Transformers need labels": "Add `labels` to the batches; the data collator makes them."},
    "optimizer": {
        "muon takes models of Transformers": "Leave `muon` out, or use `torch.optim.Muon` in a loop of your own."
    },
    "pretrained": {
        "it holds no config.json": "Give the folder that holds `config.json`: the run's own, or one of its checkpoints.",
        "there is no folder": _GONE + " A Hub id has the form `user/name`; a private one needs `HF_TOKEN`.",
        "the config.json of … is damaged": _COPY_AGAIN,
        "the config.json of … is not accepted": "Correct the field that follows, or take the file as it was saved.",
        "are damaged or truncated": _COPY_AGAIN,
        "the weights of … cannot be read": _COPY_AGAIN,
        "are not those of its config.json": _COPY_AGAIN,
        "lacks weights of a language model": "The folder holds a model for another task. Give the language model's.",
    },
    "probe": {
        "so its layers cannot be found": "The reason stands at the end. Models with another input are not supported.",
        "returns no logits": "Take the class with the head, such as `AutoModelForCausalLM`.",
        "returns no hidden states": "Take a model that accepts `output_hidden_states=True`.",
    },
    "pushing": {
        "failed": "The reason follows. Often the token in `HF_TOKEN` may not write; `hf auth whoami` tells whose it is.",
        "The model is in": "Push it later: `python examples/push_to_hub.py FOLDER user/my-model`.",
    },
    "recipes": {
        "there is no option": "Correct the name; `charformer-train --help` lists all options.",
        "a word with one dash": "Write `--field value`.",
        "a word belongs to no option": "Write `--field` before each value. Quote text with spaces.",
        "there is no recipe": "Give the path of a YAML file, or the name of one of these.",
        "the Trainer does not accept its settings": "Correct the field that the reason names.",
        "it is not text in UTF-8": "Give a text file of fields, or convert it: `iconv -f ENCODING -t UTF-8`.",
        "there is no field": "Correct the name; `charformer-train --help` lists all fields.",
    },
    "resuming": {
        "cannot be read": "Resume from an earlier checkpoint.",
        "holds no complete checkpoint": "Begin anew with `--overwrite_output_dir`; nothing that could go on was saved.",
        "is not good": "Resume from the checkpoint that the message names.",
        "is the checkpoint of another model": "Give the settings of the run, or another `output_dir` for the new ones.",
    },
    "run_settings": {"it takes settings of a run": "Name one of them."},
    "shipped": {"comes with the package": "Name one of the files that the message lists."},
    "strict_yaml": {
        "is given twice": "Delete one of the two lines.",
        "is not valid YAML": "Correct the line that the message names: `field: value`, and quotes around odd text.",
    },
    "term_gradients": {
        "no parameter of the body": "Leave out the options that measure gradients, or train a part of the body.",
        "the batch has no labels": "Add `labels` to the batches; the data collator makes them.",
    },
    "train": {
        "no checkpoint to go on from": "Give another `output_dir` for the new settings, or train again with"
        " `--overwrite_output_dir`.",
        "its steps are not those of a run": _REASON,
        "validation loss is not finite": "Lower the learning rate, warm it up for longer, or clip gradients"
        " (`max_grad_norm`), and train again.",
        "the trained model is whole": "Cure what follows, then give the command again with `--resume auto`: nothing is"
        " trained twice.",
    },
    "trainer_options": {
        "the package deepspeed is not installed": "`pip install deepspeed`, or leave the field out.",
        "the first evaluation would be at step": "Lower `eval_steps` or `eval_delay`, or raise `max_steps`.",
        "report_to is": "Install the logger's package, or give `none`.",
        "only torch_compile_backend 'inductor' has modes": "Leave one of the two out.",
        "optim_target_modules is given": "Leave the field out, or take an optimizer with target modules, such as GaLore.",
        "does not use it": "Leave the field out, or take an optimizer of the Adam family.",
        "optim is": "Take another optimizer, or correct what the reason names.",
        "more than max_steps": "Lower one of them, or raise `max_steps`.",
        "does not accept": "Give only what that schedule of Transformers takes.",
    },
}
