"""scripts/plan.py: what a person is told before paying for GPUs."""

import re
import time

import pytest

from helpers import ROOT
from scripts import plan

CONFIGS = sorted((ROOT / "config").glob("train*_*.yaml"))
TINY = [
    "world_size=8",
    "batch_tokens=65536",
    "micro_batch=8",
    "model.n_layer=4",
    "model.n_head=4",
    "model.n_embd=128",
    "model.vocab_size=512",
]


@pytest.fixture
def show(monkeypatch, capsys, tmp_path):
    """show("world_size=8", ...) -> what is printed on both streams; nothing is simulated."""

    def show(*words: object, status: int = 0) -> str:
        given = ["scripts/plan.py", "simulate=false", f"out_dir={tmp_path}", *map(str, words)]
        monkeypatch.setattr("sys.argv", given)
        assert plan.main() == status
        return "".join(capsys.readouterr())

    return show


def row(text: str, name: str) -> list[str]:
    """The cells of a row of the table."""
    (line,) = re.findall(rf"^  {re.escape(name)}  +(.*)$", text, re.MULTILINE)
    return re.split(r"  +", line)


def test_the_command_checks_itself(run, tmp_path):
    """The formulas are those of a program that goes on changing: a simulated step of every start
    shows whether they still hold."""
    mesh = ["mesh.tp=2", "mesh.replicate=2", "mesh.shard=2", "mesh.sequence=true"]
    result = run("scripts.plan", [*TINY, *mesh, f"out_dir={tmp_path}"])
    assert result.status == 0, result.err
    assert "simulated: 2 blocks on CPUs, hsdp 2x2 x tp 2 (sequence)" in result.out
    assert "the traffic is equal to the byte" in result.out
    found = re.search(r"memory ([\d.]+) MB, by the plan ([\d.]+) MB", result.out)
    simulated, planned = map(float, found.groups())
    assert planned == pytest.approx(simulated, rel=0.1)
    assert (tmp_path / "plan_pretrain.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_table(show, tmp_path):
    """A student reads off the days and the money: they must follow from the speed."""
    out = tmp_path / "a.png"
    text = show(*TINY, "tokens=1e12", "price=2.5", "gpu=A100", "best=2", f"out={out}")
    assert text.splitlines()[0].endswith("4 blocks, 128 wide, vocabulary 512")
    assert "machines  8 x A100, 8 in a node\n" in text
    columns = row(text, "tokens/s")
    assert len(columns) == 3, "the settings' layout and two others"
    for number, speed in enumerate(columns):
        days = 1e12 / float(speed.replace(",", "")) / 86400
        shown = float(row(text, "days for 1e+12 tokens")[number].replace(",", ""))
        cost = float(row(text, "cost")[number].replace(",", ""))
        assert shown == pytest.approx(days, abs=0.01)
        assert cost == pytest.approx(days * 24 * 8 * 2.5, abs=0.5)
    assert f"wrote {out}" in text and out.exists()


def test_the_link_of_each_collective(show):
    """Two nodes of four: shards of four stay inside, their copies talk through the network."""
    mesh = ["mesh.replicate=2", "mesh.shard=4"]
    text = show(*TINY, *mesh, "gpus_per_node=4", "link=100Gb", "best=0")
    assert "4 in a node, 100Gb/s for each GPU between nodes" in text
    assert len(row(text, "shard all_gather, in a node")) == 1
    assert len(row(text, "replicate all_reduce, network")) == 1


@pytest.mark.parametrize("size", [8, 64, 1024])
@pytest.mark.parametrize("name", ["train300M_fsdp", "train1.5B_fsdp"])
def test_large_plans_are_quick(show, name, size):
    """The plan of 1,024 GPUs must not need one."""
    began = time.process_time()
    batch = size * 4096
    text = show(ROOT / f"config/{name}.yaml", f"world_size={size}", f"batch_tokens={batch}")
    assert time.process_time() - began < 30
    assert len(row(text, "MFU")) == 4


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_several_processes_has_a_plan(show, config):
    if "mesh" not in config.read_text(encoding="utf-8"):
        pytest.skip("a config of train.py")
    assert "settings  " in show(config, "best=0")


def test_a_layout_that_cannot_run_is_named_and_others_are_found(show):
    """524,288 tokens are too few for 1,024 processes with a batch each; a pipeline shares them."""
    text = show(*TINY, "world_size=16", "batch_tokens=2048", "model.n_head=8")
    assert "the layout of the settings cannot run: batch_tokens=2048 cannot be shared" in text
    assert "best 1" in text and "settings  " not in text


LONG = ["gpu=4090", "model.n_layer=32", "model.block_size=8388608", "batch_tokens=67108864"]
HUGE = ["gpu=4090", "model.n_embd=8192", "model.n_layer=48", "model.n_head=64"]


@pytest.mark.parametrize(
    "words, says, helps",
    [
        (HUGE, "optimizer", "more GPUs than world_size=8, or mesh.offload=true"),
        (LONG, "activations", "a shorter model.block_size than 8388608; or GPUs with more"),
        (["gpu=4090", "model.vocab_size=16777216"], "temporary", "a smaller vocabulary"),
    ],
)
def test_nothing_fits(show, words, says, helps):
    """A script must not start what cannot run; a person must know what to change, and that it
    would be enough."""
    text = show(*TINY, *words, status=1)
    (sentence,) = re.findall("^error: no layout fits: (.*)$", text, re.MULTILINE)
    assert says in sentence and f"what helps is {helps}" in sentence
    needs, room = re.search(r"needs ([\d.]+) GB, and ([\d.]+) GB of a GPU's", sentence).groups()
    assert float(needs) > float(room)
    assert row(text, "all, of 24 GB")[-1] == f"{needs} GB (too much)"


def test_only_the_settings_layout_is_asked_for(show):
    """With best=0 a script asks whether the run that it starts fits."""
    text = show(*TINY, *HUGE[1:], "best=0", status=1)
    assert "error: the layout of the settings needs" in text and "set best=3" in text
    assert "smallest" not in text
    text = show(*TINY, *HUGE[1:], "world_size=64", "batch_tokens=524288")
    assert "error" not in text


@pytest.mark.parametrize(
    "words, says",
    [
        (["gpu=H1000"], "gpu=H1000 is not known: choose one of B200, H200, H100"),
        (["link=fast"], "link=fast is no speed: write it as 400Gb (bits) or 50GB"),
        (["link=0Gb"], "link=0Gb is no speed"),
        (["world_size=12"], "world_size=12 is not a multiple of gpus_per_node=8"),
        (["mesh.shard=3", "best=0"], "3 processes, but there are 8"),
        (["mesh.tp=3", "world_size=3", "best=0"], "n_head=4 is no multiple of it"),
        (["batch_tokens=1000"], "batch_tokens=1000 cannot be shared equally"),
        (["mesh.pp=8", "best=0"], "8 stages"),
        (["optim.name=muon"], "the plan knows AdamW only"),
        (["mesh.offload=true"], "mesh.offload=true: the plan knows nothing"),
        (["dtype=float32"], "dtype=float32: speeds are known in bfloat16"),
        (["init_from=checkpoints/a"], "init_from: give the model's shape as settings"),
        (["model.vocab_size=0", "tokenizer.kind=o200k_base"], "set model.vocab_size"),
        (["out=a.jpg"], "out=a.jpg must end with .png"),
        (["out=no/such/a.png"], "out=no/such/a.png: there is no folder no/such"),
    ],
)
def test_mistakes(mistake_of, tmp_path, words, says):
    arguments = [*TINY, "simulate=false", f"out_dir={tmp_path}", *words]
    message = mistake_of(plan.main, arguments)
    assert says in message and "\n" not in message
