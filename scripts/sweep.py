"""Compare trainings: a grid times seeds, or a search for good settings; one table, one figure.

    python scripts/sweep.py config/sweep_ablation.yaml set.trunk=checkpoints/trunk_zh
    python scripts/sweep.py config/sweep_train_size.yaml workers=2
    python scripts/sweep.py config/search_sentiment.yaml set.trunk=checkpoints/trunk_en

Each run is a `python sentiment_train.py` (or train.py, with script=train) of its own, under
out_dir/name/. The same command again goes on where it stopped: finished runs are kept, an
interrupted one resumes. With several GPUs several run at once. The same command on other machines
that share the folder, or in other terminals, takes its part of the runs; what one that has died
leaves is taken over by the others.

A search draws settings from ranges, chooses by validation, and ends early what is worse than most
(Optuna's TPE and median pruner). The test stays sealed until the best settings are found: they are
trained again with fresh seeds, and only these runs read it.
"""

import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from smallgpt import console, hardware, settings
from smallgpt.console import UserError
from smallgpt.runs import checkpoint
from smallgpt.runs.metrics import say
from smallgpt.settings import Count, Positive
from smallgpt.sweeps import compare
from smallgpt.sweeps.jobs import Crew, Job, Script, check, folder_name, why_failed
from smallgpt.sweeps.search import Search, Space, space_problems, trial_name


@dataclass
class SweepSettings:
    name: str = "sweep"  # folder of the sweep under out_dir
    out_dir: str = "checkpoints"  # where it lives
    script: Script = "sentiment_train"  # what each run is a run of
    config: str = ""  # YAML of that script that all runs share
    set: dict[str, str] = field(default_factory=dict)  # settings of all runs: set.epochs=2
    grid: dict[str, list[str]] = field(default_factory=dict)  # values, every combination is run
    search: Space = field(default_factory=dict)  # ranges: search.optim.lr="1e-4..1e-2 log"
    trials: Positive = 20  # of a search
    search_seed: Count = 1000  # of all trials, and of what is drawn
    prune: bool = True  # end trials that are worse than the median of the others
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # a run of a combination for each
    workers: Count = 0  # runs at once; 0 = one per GPU, or one

    def check(self) -> list[str]:
        """Problems that the types do not show, in plain words."""
        problems = [p.replace("run=", "name=") for p in checkpoint.name_problems(self.name)]
        for key, values in self.grid.items():
            if not values:
                problems.append(f"grid.{key} must be a list of values, such as [a, b], not []")
            if key in self.set:
                problems.append(f"{key} is in set and in grid: leave one out")
        for key in ("run", "out_dir", "seed"):
            if key in {*self.grid, *self.search, *self.set}:
                own = "is set by the sweep itself (name, out_dir, seeds): leave it out"
                problems.append(f"{key} {own}")
        if not self.grid and not self.search:
            example = "such as grid.mask=[true,false]"
            problems.append(f"grid is empty: give settings and their values, {example}")
        if not self.seeds or len({*self.seeds}) < len(self.seeds):
            problems.append(f"seeds={self.seeds} must be one or more different numbers")
        return problems + (self.search_problems() if self.search else [])

    def search_problems(self) -> list[str]:
        """What is wrong with a search, in plain words."""
        problems = space_problems(self.search)
        if self.grid:
            problems.append("grid and search exclude each other: leave one of them out")
        for key in self.search:
            if key in self.set:
                problems.append(f"{key} is in set and in search: leave one out")
        if self.search_seed in self.seeds:
            problems.append(
                f"search_seed={self.search_seed} must be none of seeds, which the best settings "
                "are tried with"
            )
        if "select" in self.search:
            problems.append("select is what trials are judged by: put it in set, not in search")
        if "score_test" in {*self.search, *self.set}:
            problems.append("score_test is set by the search itself: leave it out")
        return problems


def main() -> int:
    s = settings.load(SweepSettings, doc=__doc__)
    folder = Path(s.out_dir) / s.name
    common = common_settings(s)
    gpus = hardware.gpus(common.get("device", "auto"))
    crew = Crew(s.workers or max(1, gpus))
    if s.search:
        search, number = search_all(s, folder, common, crew)
        jobs = [] if number else jobs_of_best(s, search)
        note = note_on_best(s, search) if jobs else ""
    else:
        jobs, number, note = plan(s, folder, common), 0, ""
    grid = Grid(jobs)
    if jobs:
        logs = "the log.txt of each is in its folder"
        print(f"{len(jobs)} runs, {crew.size} at once, in {folder}; {logs}", flush=True)
        number = crew.work(grid)
    if number:
        print(f"stopped by a signal; what ran is saved in {folder}, and the same command continues")
        return 128 + number
    rows = compare.rows_of(jobs)
    if rows:
        print("\n" + compare.write(rows, folder, note))
        print(f"table.md, table.csv and figure.png are in {folder}")
    problems = grid.problems_left()
    if problems:
        heading = f"{len(problems)} of {len(jobs)} runs failed"
        raise UserError("\n  - ".join([heading, *problems]))
    return 0


# --- a grid ---------------------------------------------------------------------------------------


def plan(s: SweepSettings, folder: Path, common: dict[str, str]) -> list[Job]:
    """Every run. UserError if one was begun with other settings, or with another trunk.

    Seeds are outermost: an interrupted sweep has compared all combinations on the first of them."""
    combinations = itertools.product(*s.grid.values())
    cells = [dict(zip(s.grid, values, strict=True)) for values in combinations]
    jobs: dict[str, Job] = {}
    for seed, cell in itertools.product(s.seeds, cells):
        keys = {**common, **cell, "seed": str(seed)}
        job = Job(s.script, cell, seed, folder / folder_name(cell, seed), keys)
        same = job.folder.name.lower()  # on a disk that knows no capitals
        if same in jobs:
            raise UserError(
                f"two combinations in grid have the same folder, {job.folder.name}: "
                "write their values differently"
            )
        jobs[same] = job
    for job in jobs.values():
        check(job)
    return list(jobs.values())


def common_settings(s: SweepSettings) -> dict[str, str]:
    """What all runs share: the settings of the file config, and those of set."""
    common = shared(Path(s.config)) if s.config else {}
    common |= s.set
    for key in ("run", "out_dir", "seed"):  # of the shared file
        common.pop(key, None)
    return common


def shared(path: Path) -> dict[str, str]:
    """The settings in a YAML file and its bases, by dotted names, as text.

    The runs get them one by one, and not the file: a run's record shows whether it has changed."""
    found: dict[str, str] = {}
    try:
        for values in settings.read_yaml(path).values():
            found |= settings.dotted(values)
    except UserError as error:
        raise UserError(f"config: {error}") from None
    return found


class Grid:
    """Runs that are known from the start: the queue of a grid."""

    def __init__(self, jobs: list[Job]):
        self.jobs = jobs
        self.finished: set[Path] = set()
        self.problems: dict[Path, str] = {}  # of the runs that failed here

    def open_jobs(self) -> list[Job]:
        """Those that are not finished, and were not tried here in vain."""
        found = []
        for job in self.jobs:
            if job.folder not in self.finished and job.result():
                self.finished.add(job.folder)
            if job.folder not in self.finished and job.folder not in self.problems:
                found.append(job)
        return found

    def should_end(self, job: Job) -> bool:
        return False

    def ended(self, job: Job, status: int) -> None:
        found = job.result()
        if found:
            say(f"{job.name}: {compare.headline(found)}")
        else:
            self.problems[job.folder] = why_failed(job, status)

    def count(self) -> tuple[int, int]:
        return len(self.finished), len(self.jobs)

    def problems_left(self) -> list[str]:
        """Why runs failed that nobody else has finished."""
        return [text for folder, text in self.problems.items() if folder not in self.finished]


# --- a search -------------------------------------------------------------------------------------


def search_all(
    s: SweepSettings, folder: Path, common: dict[str, str], crew: Crew
) -> tuple[Search, int]:
    """Run the trials. Returns the search, and the signal that stopped it or 0."""
    search = Search(folder, s.script, common, s.search, s.trials, s.search_seed, s.prune)
    for job in search.jobs():
        check(job)
    chosen = f"{search.measure} on validation chooses, the test stays sealed"
    print(f"{s.trials} trials, {crew.size} at once, in {folder}; {chosen}", flush=True)
    number = crew.work(search)
    if not number:
        file = search.write()
        best = search.best()
        print(f"best: {trial_name(best)}, {search.show(best.value)}; all trials are in {file}")
    return search, number


def jobs_of_best(s: SweepSettings, search: Search) -> list[Job]:
    """The best settings with each of the seeds: these runs read the test."""
    best = search.best()
    drawn = search.drawn(best)
    jobs = []
    for seed in s.seeds:
        keys = {**search.common, **drawn, "seed": str(seed)}
        folder = search.folder / f"{trial_name(best)}_seed-{seed}"
        jobs.append(Job(s.script, drawn, seed, folder, keys))
    for job in jobs:
        check(job)
    return jobs


def note_on_best(s: SweepSettings, search: Search) -> str:
    """How the settings in the table were chosen."""
    n = len(search.in_state("COMPLETE", "PRUNED"))
    chosen = f"Chosen among {n} trials of seed {s.search_seed} by {search.measure} on"
    if s.script == "train":
        return f"{chosen} the held-out text, which the scores above are of: they flatter a little."
    return f"{chosen} validation; these runs have fresh seeds, and they alone have read the test."


if __name__ == "__main__":
    console.run(main)
