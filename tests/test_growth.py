"""bench/growth.py: speed and memory of training, one thing changed at a time."""

import pytest

from bench import growth
from helpers import ROOT


class Here:
    """Measures a point in this process, with times that stand for its operations."""

    def __init__(self, point: growth.Point):
        contender = growth.build(point.args)
        contender.round()
        self.tokens = contender.tokens
        _, self.flops = growth.size_and_flops(point.args)
        self.samples = [{"peak_rss": 2**30, "peak_cuda": 0}]

    def speeds(self) -> list[float]:
        return [1e9 / self.flops, 3e9 / self.flops, 2e9 / self.flops]


@pytest.fixture
def args(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench/growth.py", "--quick"])
    return growth.parse()


def test_one_thing_is_changed_at_a_time(args):
    """With another number of tokens in a step, or other heads, a panel would show two things."""
    every = [point for group in growth.groups(args) for point in group]
    base = every[0]
    others = [point for point in every if point.name != growth.BASE]
    assert {point.axis for point in others} == growth.AXES.keys()
    for point in others:
        found = vars(point.args)
        changed = {key for key, value in vars(base.args).items() if found[key] != value}
        option, _ = growth.AXES[point.axis]
        follows = {"n_embd": {"n_head"}, "block_size": {"batch"}, "batch": {"steps"}}
        assert option in changed and changed <= {option} | follows.get(option, set()), point.name
        assert found[option] == point.value
        assert found["n_embd"] / found["n_head"] == base.args.n_embd / base.args.n_head
        if point.axis == "context":
            assert found["batch"] * found["block_size"] == args.batch * args.block_size


def test_every_point_trains_and_is_shown(args, tmp_path):
    """A point that fails would be noticed only at the end of the benchmark. Speeds that are as the
    operations say are called so."""
    measured = []
    for group in growth.groups(args):
        workers = [Here(point) for point in group]
        assert {worker.tokens for worker in workers} <= {256, 512}, "rounds are of like length"
        measured.append(growth.measured(group, workers))
        for result in measured[-1]:
            assert result.of_predicted == pytest.approx(1)
            assert result.predicted == pytest.approx(result.speed)
    layers, width, context, vocabulary = 2, 32, 16, 2048
    matrices = layers * 12 * width**2 + vocabulary * width
    results = measured[0]
    assert results[0].flops == 6 * matrices + 6 * layers * width * context
    text = growth.table(results)
    assert len(text.splitlines()) == 2 + len(results) and "| context: 256 | " in text
    out = tmp_path / "growth.png"
    growth.draw(measured, out)
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_two_points_take_turns(args, monkeypatch, capsys):
    """The command could not start its points: each is this command again, asked for rounds."""
    monkeypatch.setattr("sys.argv", [str(ROOT / "bench/growth.py"), "--quick"])
    group = growth.groups(args)[0][:2]
    results, content = growth.compare(group, args)
    assert [result.point.name for result in results] == ["base", "layers: 1"]
    assert all(result.speed > 0 for result in results)
    assert "| layers: 1 |" in capsys.readouterr().out
    about = content["contenders"]["layers: 1"]
    assert about["flops_per_token"] == results[1].flops and not about["compiled"]
