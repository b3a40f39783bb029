"""The state of the optimizers on disk, by torch.distributed.checkpoint: each process writes what it
holds, any number of processes reads it.

A module of its own, which `checkpoint` imports where a state is saved or loaded: what it needs of
torch takes half a second to import, more than a short start has."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint import Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.api import CheckpointException

from smallgpt.files import checksum


class StateWriter(dcp.HuggingFaceStorageWriter):
    """PyTorch's writer of safetensors, but without its copy of all tensors into one bytes object:
    Python's lock is held for it, and a training beside it stands still.

    Each process computes the checksum of its file, and the main one collects them."""

    def __init__(self, folder: Path):
        super().__init__(str(folder), save_distributed=True)
        self.checksums: dict[str, int] = {}  # by name in the step folder; on the main process

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list]:
        tensors = {}
        results = []
        offsets = {}  # of the part of each tensor that this process holds
        for item in plan.items:
            name = item.index.fqn
            assert name not in tensors, f"{name} lies here in two parts"
            tensor = planner.resolve_data(item).detach()
            tensors[name] = tensor.cpu().contiguous()
            offsets[name] = {"saved_offsets": item.tensor_data.chunk.offsets}
        if tensors:
            shard = plan.storage_data["shard_index"]
            file = Path(self.path) / f"shard-{shard:05d}-model-00001-of-00001.safetensors"
            metadata = {
                "format": "pt",
                "DCP_VERSION": "1.0",
                "DCP_SHARDING_INFO": json.dumps(offsets),
            }
            save_file(tensors, file, metadata)
            results.append((f"state/{file.name}", checksum(file)))
        done = torch.futures.Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[tuple[str, int]]]) -> None:
        """results: what write_data has given on each process."""
        for of_process in results:
            self.checksums.update(of_process)


@contextmanager
def raised_as(kind: type[Exception]) -> Iterator[None]:
    """What failed in some processes is raised in each as this kind, in the words of the first."""
    try:
        yield
    except CheckpointException as problem:
        first, _ = next(iter(problem.failures.values()))
        raise kind(str(first)) from None


def save(tensors: Mapping[str, torch.Tensor], folder: Path) -> dict[str, int]:
    """Write the tensors that this process holds. Returns, on the main process, the checksum of each
    file, by its name in the step folder. OSError if any process fails. A collective."""
    writer = StateWriter(folder)
    alone = not dist.is_initialized()
    with raised_as(OSError):
        dcp.save(tensors, storage_writer=writer, no_dist=alone)
    return writer.checksums


def save_async(
    tensors: Mapping[str, torch.Tensor], folder: Path, group: dist.ProcessGroup | None
) -> Callable[[], dict[str, int]]:
    """Copy the tensors and begin to write them, in a thread; what is returned waits for its end, as
    `save` does. A collective, in a group of its own."""
    writer = StateWriter(folder)
    alone = not dist.is_initialized()
    writing = dcp.async_save(tensors, storage_writer=writer, process_group=group, no_dist=alone)

    def wait() -> dict[str, int]:
        with raised_as(OSError):
            writing.result()
        return writer.checksums

    return wait


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The saved tensors by name, whole, on the meta device: their shapes and types."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    metadata = reader.read_metadata()
    tensors = {}
    for name, saved in metadata.state_dict_metadata.items():
        dtype = saved.properties.dtype
        tensors[name] = torch.empty(saved.size, dtype=dtype, device="meta")
    return tensors


def load(targets: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Read these tensors, in place. SafetensorError if any process fails. A collective."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    alone = not dist.is_initialized()
    with raised_as(SafetensorError):
        dcp.load(targets, storage_reader=reader, no_dist=alone)
