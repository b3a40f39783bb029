"""A small GPT. Its parts are imported by their own names; what a trained model is used for is here:

    from smallgpt import load_chat, load_classifier

    load_chat("checkpoints/quickstart").reply("你好")
    load_classifier("checkpoints/sentiment")(["房间很干净", "又脏又吵"])

torch is imported when the first of these names is asked for, not by `import smallgpt`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smallgpt.inference import load_chat, load_classifier
    from smallgpt.sampling import SampleSettings

__all__ = ["SampleSettings", "load_chat", "load_classifier"]


def __getattr__(name: str) -> Any:
    """One of `__all__`, from the module that has it (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from smallgpt import inference

    return getattr(inference, name)
