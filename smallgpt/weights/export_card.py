"""The model card of an export: README.md with what the run recorded, as model hubs show it."""

import json
import re
from pathlib import Path
from typing import Any

from smallgpt.files import read_json
from smallgpt.runs import metrics
from smallgpt.runs.checkpoint import Checkpoint
from smallgpt.weights.export import Source

NO_LICENCES = (
    "The licences of these data were not recorded with them: look them up before you publish."
)
LIBRARIES = {"hf": "transformers", "onnx": "onnx", "gguf": "gguf"}


def card(source: Source, to: str, use: str, limits: list[str]) -> str:
    """The text of README.md. use: how a program opens this export, in Markdown. limits: what is
    special to this export."""
    task = "text-classification" if source.head else "text-generation"
    header = {
        "library_name": LIBRARIES[to],
        "pipeline_tag": task,
        "license": "other",  # a run does not record the licences of its texts
        "tags": ["small-gpt"],
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in header.items()]
    sections = [
        "---\n" + "\n".join(lines) + "\n---",
        f"# {source.found.run.name}",
        describe(source),
        f"## Use\n\n{use}",
        "## Data\n\n" + data_table(source.found.sources),
        *own_card(source.found.run),
        "## Numbers\n\n" + bullets([*numbers(source), *training(source.found)]),
        "## Limits\n\n" + bullets([*common_limits(source), *limits]),
    ]
    return "\n\n".join(sections) + "\n"


def bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def describe(source: Source) -> str:
    """What it is, in two sentences."""
    c = source.config
    parameters = sum(p.numel() for p in source.model.parameters())
    kind = "A language model for dialogues"
    if source.head:
        labels = ", ".join(source.head["labels"])
        kind = f"A text classifier ({labels})"
    tokenizer = source.tokenizer
    return (
        f"{kind}, trained with small-gpt: {parameters:,} parameters, {c.n_layer} layers, "
        f"width {c.n_embd}, texts of up to {source.longest} tokens. "
        f"Form: {c.pos} positions, {c.norm}, {c.mlp}{', QK-norm' if c.qk_norm else ''}. "
        f"Tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens."
    )


def data_table(sources: list[dict[str, Any]]) -> str:
    """What the weights were trained on. Of a path only the name: a card is read by strangers."""
    lines = ["| data | recorded as |", "|---|---|"]
    for source in sources:
        name, record = name_and_record(source)
        lines.append(f"| {name} | {record} |")
    return "\n".join(lines) + "\n\n" + NO_LICENCES


def own_card(run: Path) -> list[str]:
    """The card that scripts/publish.py has put into a run's folder, which may name licences, one
    level deeper; nothing where there is none."""
    file = run / "README.md"
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    deeper = re.sub(r"^#", "###", text.strip(), flags=re.M)
    return [f"## The card of the run\n\n{deeper}"]


def name_and_record(source: dict[str, Any]) -> tuple[str, str]:
    """A source in words, and what identifies it."""
    if source["kind"] == "text":
        return Path(source["path"]).name, f"sha256 {source.get('sha256', 'unknown')}"
    if source["kind"] == "set":
        settings = source.get("settings", {})
        file = Path(settings.get("path", "")).name
        name = f"training split of {settings.get('set', 'a labelled set')} ({file})"
        return name, f"fingerprint {source.get('fingerprint', 'unknown')}"
    return str(source.get("name", "unknown")), "unknown text"


def numbers(source: Source) -> list[str]:
    """The scores that the run measured."""
    found = source.found
    lines = []
    for record in metrics.read(found.run, "val"):
        if record["step"] == found.meta["step"]:
            scores = {key: value for key, value in record.items() if is_score(key, value)}
            lines.append("validation: " + ", ".join(scored(scores)))
    result = read_json(found.run / "result.json") if source.head else None
    if result and result["step"] == found.meta["step"]:
        count = result["examples"]["test"]
        lines.append(f"test, {count:,} examples: " + ", ".join(scored(result["test"])))
        for name, scores in result["baselines"].items():
            lines.append(f"{name}, same test: " + ", ".join(scored(scores)))
        lines += result["notes"]
    return lines or ["the run has measured none at this step"]


def is_score(key: str, value: Any) -> bool:
    return key in ("loss", "bits_per_byte", "accuracy", "macro_f1") and value is not None


def scored(scores: dict[str, float]) -> list[str]:
    """As "loss 1.2345", in the order of the dictionary."""
    return [f"{key.replace('_', ' ')} {value:.4f}" for key, value in scores.items()]


def training(found: Checkpoint) -> list[str]:
    """How it was trained."""
    meta = found.meta
    lines = [f"step {meta['step']:,} of the run"]
    if meta.get("tokens"):
        lines[0] += f", {meta['tokens']:,} tokens"
    if "seconds" in meta:
        lines[0] += f", {meta['seconds']:.0f} s"
    settings = meta.get("settings", {})
    if "seed" in settings:
        lines.append(f"seed {settings['seed']}")
    versions = meta.get("versions", {})
    if versions:
        lines.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    return lines


def common_limits(source: Source) -> list[str]:
    """What holds of any export of this model."""
    limits = ["It has learned what its data say, errors and rudeness included; it knows no facts."]
    if source.tokenizer.lowercase:
        limits.append(
            "All text is read in small letters. A capital sigma at the end of a word, and letters "
            "newer than Unicode 14, may become other tokens here than where it was trained."
        )
    if source.head:
        limits.append(
            f"A text of over {source.longest} tokens must lose some: small-gpt cuts its middle."
        )
    else:
        limits.append(f"It can read {source.longest} tokens, the reply included.")
    return limits
