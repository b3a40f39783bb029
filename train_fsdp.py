"""Pretrain a GPT on a mesh of processes: the loop of train.py, with a model that is cut.

    torchrun --nproc_per_node=8 train_fsdp.py config/train300M_fsdp.yaml
    torchrun --nproc_per_node=8 train_fsdp.py config/train300M_fsdp.yaml \\
        mesh.replicate=2 mesh.shard=4
    torchrun --nproc_per_node=8 train_fsdp.py config/train300M_tp2.yaml

mesh.shard cuts weights, gradients and optimizer (FSDP2), mesh.replicate copies that group (HSDP),
mesh.tp cuts each matrix product, mesh.pp the blocks into the stages of a pipeline; the four
multiply to the number of processes. The losses are those of one process, up to rounding, and a run
may go on with another mesh. docs/scaling.md says what to choose.
"""

from dataclasses import dataclass, field

from smallgpt import console, settings
from smallgpt.parallel.layout import MeshSettings, MeshSpread
from smallgpt.parallel.world import start
from smallgpt.settings import Free
from train import TrainSettings, train


@dataclass
class MeshTrainSettings(TrainSettings):
    mesh: Free[MeshSettings] = field(default_factory=MeshSettings)  # how the model is cut


def main() -> int:
    s = settings.load(MeshTrainSettings, doc=__doc__)
    with start(s.device, s.timeout, settings.flat(s)) as world:
        return train(s, world, MeshSpread(world, s.mesh))


if __name__ == "__main__":
    console.run(main)
