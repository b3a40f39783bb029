"""A run for transformers, and for what reads its files.

write      config.json, model.safetensors, the tokenizer, generation_config.json, README.md
form_of    the class that computes what a model does
"""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from smallgpt.console import UserError
from smallgpt.sampling import SampleSettings
from smallgpt.weights import forms
from smallgpt.weights.export import Source, write_json, write_tokenizer
from smallgpt.weights.export_card import card
from smallgpt.weights.forms import Form

USE_LANGUAGE_MODEL = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
messages = [{"role": "user", "content": "How are you?"}]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
reply = model.generate(**prompt)  # do_sample=False: always the likeliest token
print(tokenizer.decode(reply[0, prompt["input_ids"].size(1) :], skip_special_tokens=True))
```"""
USE_CLASSIFIER = """```python
from transformers import pipeline

classify = pipeline("text-classification", FOLDER, top_k=None)
print(classify("a text"), classify({"text": "one of two", "text_pair": "the other"}))
```"""


def form_of(source: Source) -> Form:
    """The class of transformers that computes what the model does. UserError if there is none."""
    if not source.head:
        return forms.form_of(source.config, forms.LANGUAGE_MODELS)
    wanted = {"pool": "last", "mask": True, "marks": 0, "cue": []}
    for name, needed in wanted.items():
        found = source.head.get(name, needed)  # older versions had fewer
        if found != needed:
            value = "..." if name == "cue" else str(found).lower()
            raise UserError(
                f"no classifier of transformers has {name}={value}: they read the state of the "
                "last token that is no padding, of plain texts; export it with to=onnx, which is "
                "exact"
            )
    return forms.form_of(source.config, forms.CLASSIFIERS)


def write(source: Source, folder: Path) -> None:
    """Write all files of the export. UserError where no class computes what the model does."""
    form = form_of(source)
    save_file(
        forms.their_tensors(source.weights(), source.config, form),
        folder / "model.safetensors",
        {"format": "pt"},
    )
    write_json(folder / "config.json", model_config(source, form))
    write_tokenizer(source, folder)
    if not source.head:
        write_json(folder / "generation_config.json", generation_config(source))
    use = USE_CLASSIFIER if source.head else USE_LANGUAGE_MODEL
    text = card(source, "hf", use, limits(source, form))
    (folder / "README.md").write_text(text, encoding="utf-8")


def limits(source: Source, form: Form) -> list[str]:
    """What this export does otherwise than chat.py and scripts/classify.py."""
    if source.head:
        found = [
            "transformers cuts the end of a long text, where truncation is on, not its middle."
        ]
    else:
        found = [
            "What spells a special token, such as <|sep|>, is read as one in a chat template. In "
            "plain text it stays text with split_special_tokens=True.",
            "chat.py makes repetitions less likely, which generation_config.json does not.",
        ]
    if form.has_gate_like_fc:
        found.append(
            "Its squared ReLU is written as relu(gate) * up with twice the same matrix. This is "
            "exact in transformers; programs that ignore hidden_act would compute SwiGLU."
        )
    return found


def model_config(source: Source, form: Form) -> dict[str, Any]:
    """The content of config.json."""
    tokenizer = source.tokenizer
    ids = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.end,
        "pad_token_id": tokenizer.pad,
    }
    found = forms.their_config(source.config, form) | ids
    if not source.head:
        return found
    labels = source.head["labels"]
    return found | {
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
        "problem_type": "single_label_classification",
    }


def generation_config(source: Source) -> dict[str, Any]:
    """The content of generation_config.json: what chat.py does without any settings.

    Its penalty of repetitions is left out: that of transformers also counts the user's words."""
    tokenizer = source.tokenizer
    ends = source.ends
    sample = SampleSettings()
    return {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": ends,
        "pad_token_id": tokenizer.pad,
        "suppress_tokens": source.silent,
        "begin_suppress_tokens": ends,  # an empty reply is none
        "do_sample": True,
        "temperature": sample.temperature,
        "top_k": sample.top_k,
        "top_p": sample.top_p,
        "max_new_tokens": sample.max_tokens,
    }
