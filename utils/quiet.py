"""Keeps the libraries from saying what a user can do nothing about: exactly these messages, and no others.

Each script imports this before any library, because one of the messages comes while transformers is imported.
"""

import importlib
import logging
import os
import warnings

from datasets import disable_progress_bars
from transformers.utils.logging import disable_progress_bar

# (logger, how its message begins)
OF_LOGGERS = (
    # the tokenizer decides which tokens begin, end and pad, and every stage takes them from it
    ("transformers.trainer_utils", "The tokenizer has new PAD/BOS/EOS tokens that differ from the model config"),
    # with a traceback, in front of an exception that runs/memory_plan.py makes a line of
    ("torch._subclasses.fake_tensor", "failed while attempting to run meta for"),
)
# PEFT and TRL ask by the old name
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


class _Dropped(logging.Filter):
    """Lets everything pass but messages that begin so."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.beginning)


for _logger, _beginning in OF_LOGGERS:
    logging.getLogger(_logger).addFilter(_Dropped(_beginning))

# transformers prints a line where WANDB_MODE is "offline", whether or not anything is logged there
_mode = os.environ.pop("WANDB_MODE", None)
importlib.import_module("transformers.integrations.integration_utils")
if _mode is not None:
    os.environ["WANDB_MODE"] = _mode


def hide_progress_bars() -> None:
    """For --disable_tqdm, which the Trainer takes for its own bars alone: those of data sets and weights too."""
    disable_progress_bars()  # and the one of corpus/tokens.py
    disable_progress_bar()
