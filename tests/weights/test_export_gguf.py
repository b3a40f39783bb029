"""llama.cpp computes from an exported GGUF what model.py computes, reads the same ids and gives the
same replies."""

import json
import re
import urllib.request
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exporting import GPT2, classifier_of, some_ids, source_of, stress_lines, vocabulary
from smallgpt import tokenizer as tokenizers
from smallgpt.console import UserError
from smallgpt.sampling import Conversation, SampleSettings, one_line
from smallgpt.tokenizer import Tokenizer
from smallgpt.weights import export, export_gguf
from smallgpt.weights.export import Source
from smallgpt.weights.pretrained import open_trunk

torch.set_num_threads(1)

# several spaces, line breaks and combining marks, where its BPE splits otherwise
NAMED_IN_THE_CARD = r"\s[\s\x1c]|[\u0300-\u036f\n]"
FORMS = {
    "gpt2": ("bpe", GPT2 | {"bias": True}, 5e-4),  # the last digit of a table makes a difference
    "gpt2 without biases, untied": ("char", GPT2 | {"tie_weights": False}, 5e-4),
    "apertus": ("char", {}, 2e-5),
    "apertus, grouped, untied": ("char", {"n_kv_head": 2, "tie_weights": False}, 2e-5),
    "arcee": ("bpe", {"qk_norm": False, "n_kv_head": 2}, 2e-5),
    "qwen3": ("bpe", {"mlp": "swiglu"}, 2e-5),
    "llama": ("char", {"mlp": "swiglu", "qk_norm": False, "rope_base": 50000.0}, 2e-5),
}


@pytest.fixture(scope="module")
def llama():
    pytest.importorskip("gguf")
    return pytest.importorskip("xllamacpp")


def written(source: Source, folder: Path) -> Path:
    with export.new_folder(folder) as temporary:
        export_gguf.write(source, temporary)
    return folder / "model.gguf"


def opened(llama, file: Path):
    """A server with the file on one thread, with a cache in float32."""
    p = llama.CommonParams()
    p.model.path = str(file)
    p.n_ctx = p.n_batch = p.n_ubatch = 64
    p.n_parallel = p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
    p.cache_type_k = p.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    p.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    p.n_gpu_layers = p.verbosity = 0
    p.warmup = p.fit_params = False
    return llama.Server(p)


exact_gelu = torch.nn.functional.gelu


def gelu_of_llama_cpp(x: Tensor, approximate: str) -> Tensor:
    """Looked up in a table of half precision, for -10 < x < 10."""
    found = exact_gelu(x.half().float(), approximate=approximate).half().float()
    return torch.where(x.abs() < 10, found, x.relu())


@torch.no_grad()
@pytest.mark.parametrize("name", FORMS)
def test_each_form_gives_the_same_probabilities(llama, tmp_path, monkeypatch, name):
    """A wrong name, another order of the rows of q and k, or another epsilon would change them. Of
    a GPT-2 all that differs is the GELU."""
    kind, shape, tolerance = FORMS[name]
    source = source_of(vocabulary(kind), **shape)
    server = opened(llama, written(source, tmp_path / "out"))
    ids = some_ids(source.tokenizer.vocab_size)[:1]
    ids[0, 0] = source.tokenizer.bos
    rows = source.config.vocab_size
    request = {
        "prompt": ids[0].tolist(),
        "n_predict": 1,
        "n_probs": rows,
        "temperature": 0.0,
        "logit_bias": [[ord("a"), 100.0]],  # it tells probabilities only where it says a character
    }
    (choice,) = server.handle_completions(request)["choices"]
    found = {one["id"]: one["logprob"] for one in choice["logprobs"]["content"][0]["top_logprobs"]}
    log_probs = torch.tensor([found[id] for id in range(rows)])
    expected = source.model(ids)[0, -1].log_softmax(-1)
    assert expected.std() > 1
    assert (log_probs - expected).abs().max() <= max(tolerance, 5e-3 * name.startswith("gpt2"))
    monkeypatch.setattr(torch.nn.functional, "gelu", gelu_of_llama_cpp)
    expected = source.model(ids)[0, -1].log_softmax(-1)
    assert (log_probs - expected).abs().max() <= tolerance


def their_ids(server, tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of each text, all in one request: a number stays what it is, and parts two texts."""
    content = []
    for text in texts:
        content += [tokenizer.pad, text]
    request = urllib.request.Request(
        f"{server.listening_address}/tokenize",
        json.dumps({"content": content, "add_special": False, "parse_special": False}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        ids = json.loads(answer.read())["tokens"]
    found = []
    for id in ids:
        if id == tokenizer.pad:
            found.append([])
        else:
            found[-1].append(id)
    return found


@pytest.mark.parametrize("kind", ["char", "bpe", "gpt2"])
def test_the_ids_are_the_same(llama, tmp_path, gpt2_folder, kind):
    """One other id, and the model reads another text. A BPE may differ at what the model card
    names."""
    is_gpt2 = kind == "gpt2"
    tokenizer = open_trunk(str(gpt2_folder)).tokenizer if is_gpt2 else vocabulary(kind)
    server = opened(llama, written(source_of(tokenizer), tmp_path / "out"))
    lines = stress_lines(1000)
    exact = 0
    for text, found in zip(lines, their_ids(server, tokenizer, lines), strict=True):
        if found == tokenizer.encode(text):
            exact += 1
        else:
            assert kind == "bpe" and re.search(NAMED_IN_THE_CARD, text), text
    assert exact == 1000 if kind != "bpe" else exact >= 800


@torch.no_grad()
def test_a_greedy_chat_is_that_of_chat(llama, tmp_path):
    """The template, a second <|bos|>, or a turn closed otherwise would make another dialogue of
    it."""
    source = source_of(vocabulary("char"))
    server = opened(llama, written(source, tmp_path / "out"))
    greedy = SampleSettings(temperature=0, repetition_penalty=1, max_tokens=8)
    not_alone = range(0x80, 0x100)  # bytes of longer characters, which it shows otherwise
    banned = [*source.silent, *not_alone]
    talk = Conversation(source.model, source.tokenizer, greedy)
    talk.banned = torch.tensor(banned)
    talk.banned_first = torch.tensor([*banned, *source.ends])
    messages = []
    for text in ("the cat", "你好 12", "cat the"):
        talk.say(text)
        expected = "".join(talk.reply())
        messages.append({"role": "user", "content": text})
        answer = server.handle_chat_completions(
            {
                "messages": messages,
                "temperature": 0.0,
                "max_tokens": 8,
                "logit_bias": [[id, False] for id in banned],
            }
        )
        messages.append(answer["choices"][0]["message"])
        assert one_line(messages[-1]["content"]) == expected != ""
    assert talk.reply_begin < len(talk.ids) < 64, "no turn was forgotten"


def test_what_llama_cpp_does_not_have_is_refused(tmp_path):
    """A file that loads, and computes another model or reads other ids, is worse than none."""
    small = tokenizers.train(tokenizers.TokenizerSettings(lowercase=True), ["text"])
    for source, words in [
        (classifier_of(vocabulary("char")), "llama.cpp has no classifiers of this kind"),
        (source_of(vocabulary("char"), mlp="gelu"), "model.mlp=gelu is in the way"),
        (source_of(small), "tokenizer.lowercase=true"),
    ]:
        with pytest.raises(UserError, match=words):
            written(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())
