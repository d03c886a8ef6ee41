"""What a stranger does, who has Transformers and no charformer package. Started by tests; prints JSON on its last line."""

import json
import sys
import warnings
from typing import Any


try:
    import modeling_charformer  # noqa: F401
except ImportError:
    pass
else:
    sys.exit("the package is on the path; this program would show nothing")

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
    pipeline,
)


def load_all(repo: str, **where: Any) -> dict[str, Any]:
    where |= {"trust_remote_code": True}
    tokenizer = AutoTokenizer.from_pretrained(repo, **where)
    inputs = tokenizer("abc", return_tensors="pt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded: Any = AutoModelForCausalLM.from_pretrained(repo, output_loading_info=True, **where)
        model, loading = loaded
    base: Any = AutoModel.from_pretrained(repo, **where)
    config = AutoConfig.from_pretrained(repo, **where)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    return {
        "logits": model(**inputs).logits.tolist(),
        "hidden": base(**inputs).last_hidden_state.tolist(),
        "ids": model.generate(**inputs, max_new_tokens=5, do_sample=False).tolist(),
        "text": generator("abc", max_new_tokens=5, do_sample=False)[0]["generated_text"],
        "module": type(model).__module__,
        "auto_map": sorted(config.auto_map),
        "warnings": [str(warning.message) for warning in caught],
        "loading": {key: sorted(map(str, value)) for key, value in loading.items() if value},
        "parameters": model.num_parameters(),
        "loss_terms": sorted(model.train()(**inputs, labels=inputs["input_ids"]).loss_dict),
    }


def load(*places: str) -> list[dict[str, Any]]:
    """Repositories, each at a revision (`user/name@revision`), code and weights."""
    loaded = []
    for place in places:
        repo, revision = place.split("@")
        loaded.append(load_all(repo, revision=revision, code_revision=revision))
    return loaded


def by_pipeline(repo: str) -> str:
    """Everything by name alone."""
    generator = pipeline("text-generation", model=repo, trust_remote_code=True)
    return generator("abc", max_new_tokens=5, do_sample=False)[0]["generated_text"]


def refused(repo: str) -> None:
    AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=False)


def finetune(repo: str, new: str) -> list[Any]:
    """Load with remote code, train by Transformers' own Trainer and by PEFT, and push to repositories of one's own."""
    from peft import LoraConfig, get_peft_model

    model: Any = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
    ids = tokenizer("round the rugged rock", return_tensors="pt")["input_ids"][0]
    args = TrainingArguments(
        output_dir="finetuned",
        max_steps=2,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        hub_model_id=new,
    )
    rows: Any = [{"input_ids": ids, "labels": ids}] * 4
    Trainer(model, args, default_data_collator, rows, processing_class=tokenizer).train()
    model.eval().push_to_hub(new)
    tokenizer.push_to_hub(new)

    adapted: Any = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False))
    merged = adapted.merge_and_unload().eval()
    merged.push_to_hub(f"{new}-merged")
    tokenizer.push_to_hub(f"{new}-merged")
    inputs = torch.tensor([list(b"abc")])
    return merged(inputs).logits.tolist()


if __name__ == "__main__":
    commands: Any = (load, by_pipeline, refused, finetune)
    command = next(command for command in commands if command.__name__ == sys.argv[1])
    print(json.dumps(command(*sys.argv[2:])))
