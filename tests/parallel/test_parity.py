"""One loss curve: a model that is cut over processes trains to the losses and weights of one that
is not, and a run saved on one layout goes on on another. bench/parity.py has the whole table."""

import json

import pytest

from bench import parity
from bench.parity import (
    DDP2,
    FORMS,
    FSDP2,
    HSDP,
    ONE,
    PP2,
    PP2_FSDP2,
    PP2_TP2,
    TP2,
    TP2_FSDP2,
    TP2_SEQUENCE,
    Job,
    Layout,
    name_of,
)

LAYOUTS = [DDP2, FSDP2, HSDP, TP2, TP2_SEQUENCE, TP2_FSDP2, PP2, PP2_TP2, PP2_FSDP2]
CASES = [(layout, "tied") for layout in LAYOUTS]
CASES += [(FSDP2, "untied"), (TP2, "untied"), (TP2, "1 K/V head"), (TP2_FSDP2, "GPT-2 form")]
# saved on, resumed on
MOVES = [
    (ONE, PP2_TP2),
    (DDP2, ONE),
    (FSDP2, PP2_FSDP2),
    (HSDP, TP2),
    (TP2, HSDP),
    (TP2_FSDP2, FSDP2),
    (PP2, TP2_FSDP2),
    (PP2_TP2, PP2),
    (PP2_FSDP2, ONE),
]
STEPS = 8


def pretraining(folder, form: str, **changes) -> tuple[str, ...]:
    shorter = {"max_steps": STEPS, "save_every": 4, "eval_every": 4, **changes}
    settings = [x for x in parity.pretraining(folder, "float64") if x.split("=")[0] not in shorter]
    return (*settings, *(f"{key}={value}" for key, value in shorter.items()), *FORMS[form])


@pytest.fixture(scope="module")
def runs(tmp_path_factory, start_ranks):
    """The folder of all trainings: those of each number of processes in one group."""
    folder = tmp_path_factory.mktemp("parity")
    parity.write_corpus(folder)

    def train(jobs: list[Job]) -> None:
        for processes in sorted({job.layout.processes for job in jobs}):
            mine = [(x.script, x.arguments) for x in jobs if x.layout.processes == processes]
            file = folder / "jobs.json"
            file.write_text(json.dumps(mine), encoding="utf-8")
            for rank in start_ranks(processes, ["--worker", file], script="bench.parity"):
                result = rank.wait(timeout=200)
                assert result.status == 0, result.err[-3000:]

    def job(layout: Layout, form: str, name: str, **changes) -> Job:
        return Job("train_fsdp", layout, pretraining(folder, form, **changes), name)

    forms = dict.fromkeys(form for _, form in CASES)
    compared = [*CASES, *((ONE, form) for form in forms)]
    train([job(layout, form, name_of(layout.name, form)) for layout, form in compared])
    moved = []
    for before, after in MOVES:
        saved = folder / "runs" / name_of(before.name, "tied") / "step-00000004"
        moved.append(job(after, "tied", name_of(before.name, "to", after.name), resume=saved))
    train(moved)
    return folder / "runs"


@pytest.mark.parametrize("layout, form", CASES, ids=lambda x: getattr(x, "name", x))
def test_a_cut_model_trains_like_a_whole_one(runs, layout, form):
    """A gradient that is summed over the wrong processes, or a weight that is updated twice, would
    show in the second loss."""
    found, one = (runs / name_of(x.name, form) for x in (layout, ONE))
    assert len(parity.losses(one)) == STEPS + 2
    assert parity.loss_difference(found, one) <= 1e-12
    assert parity.weight_difference(found, one) <= 1e-9


@pytest.mark.parametrize("before, after", MOVES, ids=lambda x: x.name)
def test_a_run_goes_on_on_another_layout(runs, before, after):
    """Weights or optimizer state that were saved in parts would come back in the wrong places."""
    found = parity.losses(runs / name_of(before.name, "to", after.name))
    truth = parity.losses(runs / name_of(ONE.name, "tied"))
    for step in range(5, STEPS + 1):
        assert found["train", step] == pytest.approx(truth["train", step], rel=1e-12)
