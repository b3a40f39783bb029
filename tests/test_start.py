"""What takes long to import is imported where it is needed."""

import subprocess
import sys

from helpers import ENV, ROOT, command

# each takes a third of a second or more, of two to three to the first step
SLOW = {
    "sympy",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
}


def imports_before(text: str, args: list[str]) -> set[str]:
    """The modules that a command imports before it prints text."""
    done = subprocess.run(
        args,
        cwd=ROOT,
        env={**ENV, "PYTHONPROFILEIMPORTTIME": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    before, found, _ = done.stdout.partition(text)
    assert found, done.stdout[-2000:]
    return {line.rpartition("|")[2].strip() for line in before.splitlines()}


def test_the_first_step_waits_for_nothing_that_comes_later(tmp_path, tiny):
    """The compiler, which torch's optimizers import; what saving needs; TensorBoard."""
    args = command(tiny(tmp_path, max_steps=1, optim__name="muon"))
    imported = imports_before("step 1/1 | train", args)
    assert "torch" in imported and not imported & SLOW


def test_a_model_is_opened_without_what_training_needs():
    """Of chat.py and classify.py."""
    code = "import chat, scripts.classify; print('ready')"
    imported = imports_before("ready", [sys.executable, "-c", code])
    assert "torch" in imported and not imported & SLOW
