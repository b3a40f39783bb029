"""Tokens are drawn from the distribution of the settings; a conversation in the cache says exactly
what a model that reads everything again for each token would say."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from model import GPT, GPTConfig
from smallgpt import sampling, settings
from smallgpt.console import UserError
from smallgpt.sampling import Conversation, SampleSettings, one_line, pick, replies
from smallgpt.tokenizer import BYTES, CHAR_PATTERN, Tokenizer, TokenizerSettings, train

torch.set_num_threads(
    1
)  # tensors this small gain nothing from more, and wait for them on a busy machine

TOKENIZER: Tokenizer = train(TokenizerSettings("char"), ["你好吗我很好谢" * 2])
V = 320  # rows of the models here: the tokenizer's 269, rounded up
GREEDY = SampleSettings(temperature=0, repetition_penalty=1.0, top_p=1.0, max_tokens=12)
TEXTS = ["你好", "how are you?", "我很好 谢谢", "x", "龘!", "好好好"]


def chatty(block_size: int = 256, seed: int = 3, **parts) -> GPT:
    """A model whose random weights are large: it says something else after every history."""
    torch.manual_seed(seed)
    model = GPT(
        GPTConfig(vocab_size=V, block_size=block_size, n_layer=2, n_head=2, n_embd=32, **parts)
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape), alpha=0.3)
        model.lm_head.weight[128:256] *= 0.1  # parts of characters are rare
        # make the ends likelier: replies then stop by themselves, at different lengths
        model.lm_head.weight[[TOKENIZER.sep, TOKENIZER.end]] *= 1.6
    return model


class Script(torch.nn.Module):
    """A mock model: the k-th token it is asked for is the k-th of a script, then come `ranking`."""

    def __init__(self, *script: int, block_size: int = 256, ranking: tuple[int, ...] = ()):
        super().__init__()
        self.config = SimpleNamespace(block_size=block_size, vocab_size=V)
        self.script, self.ranking = list(script), ranking
        self.lm_head = torch.nn.Identity()
        self.wte = SimpleNamespace(weight=torch.zeros(1))

    def new_cache(self) -> SimpleNamespace:
        return SimpleNamespace(k=torch.zeros(1))

    def trunk(self, idx, cache, start):
        scores = torch.zeros(1, idx.size(1), V)
        for i, token in enumerate((self.script.pop(0), *self.ranking)):
            scores[0, -1, token] = 100 - i
        return scores


def exchange(talk: Conversation, text: str) -> str:
    talk.say(text)
    return "".join(talk.reply())


@torch.no_grad()
def naive_reply(model: GPT, history: list[int], max_tokens: int = GREEDY.max_tokens) -> list[int]:
    """The likeliest reply to a history, by reading all of it again for every token."""
    t, said = TOKENIZER, []
    while len(said) < max_tokens:
        scores = model(torch.tensor([history + said]))[0, -1]
        scores[[t.bos, t.pad, t.cls, t.pair, *range(t.vocab_size, V)]] = -torch.inf
        if not said:
            scores[[t.sep, t.end]] = -torch.inf
        token = scores.argmax().item()
        if token in (t.sep, t.end):
            break
        said.append(token)
    return said


# --- choosing one token ---------------------------------------------------------------------------

PROBS = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
LOGITS = PROBS.log() + 3.0  # softmax does not see the 3


def measure(
    seen: list[int] = (), logits: torch.Tensor = LOGITS, n: int = 4000, **settings
) -> list[float]:
    """How often each token is drawn."""
    s = SampleSettings(**{"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0} | settings)
    generator = torch.Generator().manual_seed(0)
    counts = Counter(pick(logits, list(seen), s, generator) for _ in range(n))
    return [counts[i] / n for i in range(len(logits))]


def normalised(*weights: float) -> list[float]:
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, PROBS.tolist()),
        ({"temperature": 0.5}, normalised(*(p**2 for p in PROBS.tolist()))),
        ({"temperature": 2.0}, normalised(*(p**0.5 for p in PROBS.tolist()))),
        ({"top_k": 2}, normalised(0, 0.4, 0, 0.25, 0)),
        ({"top_k": 5}, PROBS.tolist()),
        ({"top_k": 99}, PROBS.tolist()),
        ({"top_p": 0.3}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.5}, normalised(0, 0.4, 0, 0.25, 0)),  # the token that crosses 0.5 is kept
        ({"top_p": 0.7}, normalised(0, 0.4, 0, 0.25, 0.2)),
        (
            {"top_k": 3, "top_p": 0.75},
            normalised(0, 0.4, 0, 0.25, 0),
        ),  # of 0.85: top_p counts what top_k left
        (
            {"temperature": 0.5, "top_p": 0.75},
            normalised(0, 0.4**2, 0, 0.25**2, 0),
        ),  # top_p after temperature
        ({"temperature": 0}, [0, 1, 0, 0, 0]),
        ({"top_k": 1}, [0, 1, 0, 0, 0]),
        ({"top_p": 1e-9}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e-4}, [0, 1, 0, 0, 0]),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_the_probabilities_of_the_settings(settings, expected):
    """4000 draws: within 0.03, four standard deviations; and what is cut off never appears."""
    frequencies = measure(**settings)
    assert frequencies == pytest.approx(expected, abs=0.03)
    assert [f > 0 for f in frequencies] == [p > 0 for p in expected]


@pytest.mark.parametrize("spread", [0.1, 1.5, 4.0], ids=["flat", "middling", "peaked"])
def test_the_nucleus_is_that_of_the_whole_vocabulary(spread):
    """Where the few likeliest tokens do not reach top_p, all are sorted: none must be missed."""
    generator = torch.Generator().manual_seed(0)
    probs = (torch.randn(3000, generator=generator) * spread).softmax(0)
    for p in (0.05, 0.5, 0.9, 0.999):
        kept, tokens = sampling.nucleus(probs, p)
        assert torch.equal(kept, probs[tokens])
        assert kept.sum() >= p - 1e-6 and kept[:-1].sum() < p + 1e-6, "it reaches p, and no further"
        others = probs.index_fill(0, tokens, 0)
        assert others.max() <= kept.min()


def test_repetition_penalty_makes_what_was_said_less_likely_whatever_its_sign():
    """CTRL's rule: a positive score is divided, a negative one multiplied; twice said is punished
    once."""
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0])
    expected = torch.tensor([1.0, -2.0, 0.5, 0.0]).softmax(0).tolist()
    assert measure([0, 1, 1, 0], logits, repetition_penalty=2.0) == pytest.approx(
        expected, abs=0.03
    )
    assert measure([0, 1], logits) == pytest.approx(logits.softmax(0).tolist(), abs=0.03)
    greedy = SampleSettings(temperature=0, repetition_penalty=5.0)
    assert pick(logits, [0], greedy) == 2
    assert logits[0] == 2.0, "the caller's scores are not written to"


def test_equal_scores_are_all_possible_and_forbidden_ones_never():
    logits = torch.tensor([0.0, -torch.inf, 0.0, -torch.inf])
    assert measure(logits=logits) == pytest.approx([0.5, 0, 0.5, 0], abs=0.03)
    assert measure([1], logits, repetition_penalty=1.5, temperature=5.0, top_k=3)[1::2] == [0, 0]


def test_half_precision_scores_are_compared_in_full_precision():
    logits = torch.linspace(0, 8, 300).to(torch.bfloat16)
    assert pick(logits, [], SampleSettings(top_p=0.9), torch.Generator().manual_seed(0)) in range(
        300
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("temperature=-0.1", "temperature must be float >= 0 and <= 1000, not -0.1"),
        (
            "temperature=0.0001",
            "temperature=0.0001 must be at least 0.001, or 0: always the likeliest token",
        ),
        ("temperature=1e39", "temperature must be float >= 0 and <= 1000, not 1e39"),
        ("top_k=-1", "top_k must be int >= 0, not -1"),
        ("top_p=0.0", "top_p must be float > 0 and <= 1, not 0.0"),
        ("top_p=1.1", "top_p must be float > 0 and <= 1, not 1.1"),
        ("repetition_penalty=1e-40", "repetition_penalty must be float >= 0.01 and <= 100"),
        ("repetition_penalty=1e39", "repetition_penalty must be float >= 0.01 and <= 100"),
        ("max_tokens=0", "max_tokens must be int >= 1, not 0"),
    ],
)
def test_limits(change, problem):
    """Regression: sample.temperature=1e39, which float32 cannot hold, ended in a traceback."""
    assert settings.load(SampleSettings, []) == SampleSettings()
    with pytest.raises(UserError) as error:
        settings.load(SampleSettings, [change])
    assert str(error.value).startswith(problem)


# --- a conversation -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts", [{}, {"pos": "learned", "norm": "layernorm", "qk_norm": False}, {"n_kv_head": 1}]
)
def test_the_cached_conversation_says_what_an_uncached_model_says(parts):
    model = chatty(**parts)
    talk, history, lengths = Conversation(model, TOKENIZER, GREEDY), [TOKENIZER.bos], set()
    for text in TEXTS:
        history += [*TOKENIZER.encode(text), TOKENIZER.sep]
        said = naive_reply(model, history)
        assert exchange(talk, text) == one_line(TOKENIZER.decode(said))
        history += [*said, TOKENIZER.sep]
        assert talk.ids == history
        lengths.add(len(said))
    assert parts or len(lengths) > 1, (
        "replies of several lengths, ended by the model and by max_tokens"
    )


def test_a_turn_costs_its_own_length():
    """Every token of the history goes through the model once, however long the conversation."""
    model, fed = chatty(), []
    trunk = model.trunk
    model.trunk = lambda idx, **kwargs: fed.append(idx.size(1)) or trunk(idx, **kwargs)
    talk = Conversation(model, TOKENIZER, GREEDY)
    for text in TEXTS:
        before = len(talk.ids)
        fed.clear()
        exchange(talk, text)
        grown = len(talk.ids) - before  # this turn, its separators and the reply
        assert sum(fed) <= grown + 1, "1: the separator that closed the reply before"
        assert fed[1:] == [1] * (len(fed) - 1), "one token at a time after the prefill"
    assert len(talk.ids) > 50, "so that reading it again at every turn would have shown"


def test_the_same_seed_gives_the_same_text():
    model, wild = chatty(), SampleSettings(temperature=2.0, top_p=1.0, max_tokens=10)

    def texts(seed: int) -> list[str]:
        wild.seed = seed
        talk = Conversation(model, TOKENIZER, wild)
        return [exchange(talk, text) for text in TEXTS]

    first = texts(seed=5)
    torch.rand(3)  # the global generator has no part in it
    assert texts(seed=5) == first != texts(seed=6)


def one_by_one(model: GPT, prompts: list[str], s: SampleSettings) -> list[str]:
    return [exchange(Conversation(model, TOKENIZER, s), prompt) for prompt in prompts]


@pytest.mark.parametrize(
    "settings",
    [GREEDY, SampleSettings(temperature=1.5), SampleSettings(temperature=0, max_tokens=99)],
    ids=["greedy", "sampled", "to the end of the block"],
)
@pytest.mark.parametrize(
    "parts", [{}, {"pos": "learned", "norm": "layernorm", "qk_norm": False}, {"n_kv_head": 1}]
)
def test_replies_made_together_are_those_made_one_by_one(parts, settings):
    """A reply must not depend on the prompts beside it: on their padding, their positions, or on
    when they end."""
    model = chatty(block_size=48, **parts)
    prompts = [*TEXTS, "0123456789" * 20]
    expected = one_by_one(model, prompts, settings)
    assert replies(model, TOKENIZER, prompts, settings) == expected
    assert len(set(map(len, expected))) > 1, "they end at different steps"


def test_a_step_makes_a_token_of_every_reply(monkeypatch):
    """The cost is that of the longest reply; more prompts than ROWS are answered in groups."""
    model, rows = chatty(), []
    trunk = model.trunk
    model.trunk = lambda idx, **kwargs: rows.append(len(idx)) or trunk(idx, **kwargs)
    monkeypatch.setattr(sampling, "ROWS", 4)
    assert len(replies(model, TOKENIZER, TEXTS, GREEDY)) == len(TEXTS) == 6
    assert rows == [4] * GREEDY.max_tokens + [2] * GREEDY.max_tokens
    assert replies(model, TOKENIZER, [], GREEDY) == []


def test_replies_leave_the_model_as_it_was():
    model, wild = chatty().train(), SampleSettings(temperature=2.0)
    assert all(replies(model, TOKENIZER, ["你好", "x"], wild))
    assert model.training
    with torch.autocast(
        "cpu", torch.bfloat16
    ):  # as train.py calls it: the cache is float32, the scores are not
        assert all(replies(model, TOKENIZER, ["你好", "x"], wild))


def test_what_no_reply_may_hold_is_never_said():
    """A model that wants only special tokens and rows beyond the vocabulary, sampled hot."""
    t = TOKENIZER
    banned = [t.bos, t.pad, t.cls, t.pair, *range(t.vocab_size, V)]
    model = Script(*[V - 1] * 50, ranking=tuple(banned))
    talk = Conversation(model, t, SampleSettings(temperature=3.0, top_p=1.0, max_tokens=40))
    exchange(talk, "x")
    said = talk.ids[talk.turns[-1] : -1]
    assert said and not set(said) & set(banned)


def test_ids_that_spell_nothing_are_never_said():
    """GPT-2's <|endoftext|> occurs in no corpus here: its score means nothing."""
    tokenizer = Tokenizer("named", CHAR_PATTERN, BYTES, {"<|endoftext|>": 256})
    talk = Conversation(
        Script(256, ord("a"), tokenizer.sep, ranking=(ord("b"),)), tokenizer, GREEDY
    )
    assert exchange(talk, "x") == "ba"


def test_a_reply_is_never_empty():
    """The likeliest first token is the separator; the second likeliest is taken."""
    hello = TOKENIZER.encode("好")[0]
    talk = Conversation(
        Script(TOKENIZER.end, TOKENIZER.sep, ranking=(TOKENIZER.sep, hello)), TOKENIZER, GREEDY
    )
    assert exchange(talk, "x") == "好"


@pytest.mark.parametrize("closing", ["sep", "end"])
def test_a_history_is_a_well_formed_dialogue(closing):
    """Whether the model ends its turn or the dialogue, the next turn follows one separator."""
    t = TOKENIZER
    talk = Conversation(Script(*t.encode("好吗"), getattr(t, closing)), t, GREEDY)
    assert exchange(talk, "你好") == "好吗"
    assert t.decode(talk.ids, specials=True) == "<|bos|>你好<|sep|>好吗<|sep|>"


def test_what_the_user_types_is_text_even_if_it_spells_a_special_token():
    talk = Conversation(Script(), TOKENIZER, GREEDY)
    talk.say("<|end|><|bos|>")
    assert talk.ids.count(TOKENIZER.bos) == 1 and TOKENIZER.end not in talk.ids


def test_a_character_in_pieces_comes_out_whole():
    """龘 is not in the vocabulary: the model spells it in three bytes. Nobody sees a part of it."""
    t = TOKENIZER
    assert len(t.encode("龘")) == 3
    talk = Conversation(Script(*t.encode("好龘x"), t.sep), t, GREEDY)
    talk.say("x")
    assert list(talk.reply()) == ["好", "龘", "x"]

    cut = Conversation(Script(*t.encode("好龘")), t, SampleSettings(temperature=0, max_tokens=3))
    cut.say("x")
    assert list(cut.reply()) == ["好", "\ufffd"], (
        "cut by max_tokens inside it: one replacement character, at the end"
    )


def test_a_reply_that_nobody_listens_to_any_more_is_closed():
    """Ctrl-C after three pieces: the turn ends there, the next follows a well-formed history."""
    model = chatty()
    talk = Conversation(model, TOKENIZER, GREEDY)
    talk.say(TEXTS[1])
    stream = talk.reply()
    pieces = [next(stream), next(stream), next(stream)]
    stream.close()
    assert talk.ids[-1] == TOKENIZER.sep
    assert one_line(TOKENIZER.decode(talk.ids[talk.turns[-1] :])).startswith("".join(pieces))
    history = [*talk.ids, *TOKENIZER.encode("x"), TOKENIZER.sep]
    assert exchange(talk, "x") == one_line(TOKENIZER.decode(naive_reply(model, history)))


def test_an_interrupt_inside_the_model_leaves_a_usable_conversation():
    model = chatty()
    talk, trunk = Conversation(model, TOKENIZER, GREEDY), model.trunk

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    exchange(talk, "你好")
    model.trunk = interrupted
    with pytest.raises(KeyboardInterrupt):
        exchange(talk, "x")
    model.trunk = trunk
    history = [*talk.ids, *TOKENIZER.encode("好"), TOKENIZER.sep]
    assert exchange(talk, "好") == one_line(TOKENIZER.decode(naive_reply(model, history)))


def test_undo_returns_to_the_state_before():
    """After taking back an exchange the conversation goes on as if it had never been."""
    model = chatty()
    straight, detour = (Conversation(model, TOKENIZER, GREEDY) for _ in range(2))
    for text in TEXTS[:2]:
        assert exchange(straight, text) == exchange(detour, text)
    exchange(detour, "这一句话要收回去")
    assert detour.undo()
    assert (detour.ids, detour.turns) == (straight.ids, straight.turns)
    for text in TEXTS[2:4]:
        assert exchange(straight, text) == exchange(detour, text)
    assert [detour.undo() for _ in range(5)] == [True] * 4 + [False]
    assert (detour.ids, detour.turns, detour.cached) == ([TOKENIZER.bos], [], 1)
    assert exchange(detour, "x") == exchange(Conversation(model, TOKENIZER, GREEDY), "x")


def test_reset_forgets_everything():
    model = chatty()
    talk = Conversation(model, TOKENIZER, GREEDY)
    exchange(talk, "how are you?")
    talk.reset()
    assert not talk.undo()
    assert exchange(talk, "你好") == exchange(Conversation(model, TOKENIZER, GREEDY), "你好")


# --- a conversation longer than the block ---------------------------------------------------------


def test_whole_oldest_turns_go_when_the_history_outgrows_the_block():
    """Forty turns in a block of 48: the model reads the beginning of a dialogue, then the latest
    whole turns, and replies as a model does that reads just that."""
    model, t = chatty(block_size=48), TOKENIZER
    talk, said = Conversation(model, t, GREEDY), [t.bos]
    for turn in range(40):
        text = TEXTS[turn % len(TEXTS)]
        talk.say(text)
        said += [*t.encode(text), t.sep]
        stream = talk.reply()
        pieces = [next(stream)]  # the history has been cut by now
        history = talk.ids[: talk.turns[-1]]
        assert history[0] == t.bos and said[-len(history) + 1 :] == history[1:], (
            "the latest of what was said"
        )
        assert said[-len(history)] in (t.bos, t.sep), "cut between turns"
        assert all(history[begin - 1] in (t.bos, t.sep) for begin in talk.turns[:-1])
        pieces += stream
        reply = talk.ids[talk.turns[-1] :]
        said += reply
        assert len(talk.ids) <= 48
        assert reply[:-1] == naive_reply(model, history)[: len(reply) - 1]
        assert "".join(pieces) == one_line(t.decode(reply))
    assert len(said) > 5 * 48


def test_no_more_turns_go_than_must():
    """The cut leaves as much history as fits beside a reply of max_tokens."""
    talk, cuts = Conversation(chatty(block_size=48), TOKENIZER, GREEDY), 0
    for _ in range(20):
        talk.say("12345")
        begins = list(talk.turns)
        "".join(talk.reply())
        if gone := len(begins) - len(talk.turns[:-1]):
            last_gone = begins[gone] - begins[gone - 1]  # length of the youngest turn that went
            assert talk.turns[-1] + last_gone + GREEDY.max_tokens > 48 - 2, "it could have stayed"
            cuts += 1
    assert cuts > 5


def test_a_reply_of_max_tokens_fits_however_full_the_history_is():
    """Turns of every length before it: none leaves room for one token less than was asked for."""
    for n in range(1, 30):
        talk = Conversation(Script(*TOKENIZER.encode("a" * 99), block_size=32), TOKENIZER, GREEDY)
        assert exchange(talk, "b" * n) == "a" * GREEDY.max_tokens, f"after a turn of {n} characters"


def test_a_single_turn_longer_than_the_block_keeps_its_end():
    model, t = chatty(block_size=48), TOKENIZER
    talk = Conversation(model, t, GREEDY)
    exchange(talk, "你好")
    text = "0123456789" * 20
    reply = exchange(talk, text)
    history = talk.ids[: talk.turns[-1]]
    assert history[0] == t.bos and history[-1] == t.sep and len(history) + GREEDY.max_tokens <= 48
    assert len(history) > 30 and text.endswith(t.decode(history))
    said = talk.ids[talk.turns[-1] : -1]
    assert said == naive_reply(model, history)[: len(said)] and reply == one_line(t.decode(said))
    assert exchange(talk, "x"), "and the conversation goes on"


def test_undo_after_the_cut_keeps_a_well_formed_history():
    model, t = chatty(block_size=48), TOKENIZER
    talk = Conversation(model, t, GREEDY)
    for text in TEXTS * 3:
        exchange(talk, text)
        if talk.undo():
            assert talk.ids[0] == t.bos and talk.ids[-1] in (t.bos, t.sep)
            history = [*talk.ids, *t.encode(text), t.sep]
            if len(history) <= 36 - 1:  # nothing more to cut
                assert exchange(talk, text) == one_line(t.decode(naive_reply(model, history)))


def test_a_reply_is_one_line_and_no_command_to_the_terminal():
    """A byte-level model can say anything, a terminal's escape sequences; a reply is a line."""
    assert one_line("a\x1b[2Jb\nc\td é 你 👨‍👩‍👧") == "a [2Jb c d é 你 👨‍👩‍👧"
