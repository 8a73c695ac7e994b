"""What PPO trains, in a folder and back: policy adapter, critic, value head, and what PPO has to remember."""

import os
from collections.abc import Callable
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lora.adapters import CRITIC, POLICY, is_of, load_weights
from lora.heads import load_value_head, save_value_head
from lora.sharding import whole_parameters
from utils.files import read_json_object, write_json

STATE_FILE = "ppo_state.json"


class PolicyFiles:
    """Writes and reads the folders of a policy: output folder, checkpoints and best/."""

    def __init__(
        self,
        unwrapped: Callable[[], PeftModel],
        tokenizer: PreTrainedTokenizerBase,
        memory: Callable[[], dict[str, Any]],
    ) -> None:
        """unwrapped: gives the model; memory: what goes to ppo_state.json."""
        self.unwrapped = unwrapped
        self.tokenizer = tokenizer
        self.memory = memory

    def gather(self) -> dict[str, Tensor]:
        """Policy, critic and value head as whole tensors on the CPU.  Every process has to call it."""
        parts = (POLICY, CRITIC, "v_head")
        return whole_parameters(self.unwrapped(), lambda name: any(is_of(name, part) for part in parts))

    def write(self, folder: str, state: dict[str, Tensor]) -> None:
        """All that a later stage or a resumed run needs.  state: from `gather`."""
        os.makedirs(folder, exist_ok=True)
        write_json(self.memory(), folder, STATE_FILE)  # the model card, which comes next, tells of it
        model = self.unwrapped()
        adapters = [name for name in (POLICY, CRITIC) if name in model.peft_config]
        model.save_pretrained(folder, state_dict=state, selected_adapters=adapters)
        save_value_head(state, folder)
        self.tokenizer.save_pretrained(folder)

    def load(self, folder: str) -> dict[str, Any]:
        """Fill policy adapter, critic and value head from such a folder; returns what PPO had to remember."""
        model = self.unwrapped()
        load_weights(model, folder, POLICY)
        if CRITIC in model.peft_config:
            load_weights(model, os.path.join(folder, CRITIC), CRITIC)
        if hasattr(model.get_base_model(), "v_head"):
            load_value_head(model.get_base_model(), folder)
        return read_json_object(os.path.join(folder, STATE_FILE))
