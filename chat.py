"""Talk to the base with an adapter in the terminal, and switch the adapter on the fly; or to all of them on a page.

    python chat.py --base_model_name BASE --adapters SFT=output/sft PPO=output/ppo/best \\
        --reward_model_lora_path output/reward
    python chat.py --web ...    the same at http://127.0.0.1:7860, side by side; pip install -r requirements-web.txt

Replies appear while they are sampled.  The dialogue is remembered, in the prompt template that the adapters were trained
with, and loses its oldest turns when it outgrows the base.  The same --seed and the same input give the same replies.
"""

import utils.quiet  # isort: skip  # noqa: F401 - before any library

import contextlib
from dataclasses import dataclass, field
from typing import NamedTuple

from transformers import TextStreamer

from corpus.formats import Message
from inference.side_by_side import ChatModels, InferenceArguments, load_models, prompt_seed
from inference.web_chat import check_gradio, serve
from utils.arguments import parse_arguments
from utils.console import InputError, printable, run_script, say

with contextlib.suppress(ImportError):  # not every Python has it
    import readline  # noqa: F401  arrow keys and history in input()

HELP = """/adapter NAME   answer with this adapter from now on; without a name: list them
/all [TEXT]     let every model answer TEXT, or your last question
/score          the reward model's score of the last reply, or of all of them after /all
/new            forget the dialogue
/help           this list
/quit           end (so does Ctrl-D); Ctrl-C stops a reply
Anything else is said to the model."""


@dataclass
class ChatArguments(InferenceArguments):
    """Terminal or page."""

    web: bool = field(
        default=False, metadata={"help": "A page at 127.0.0.1, with all models side by side, instead of the terminal."}
    )
    port: int = field(default=7860, metadata={"help": "Port of that page."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.port < 65536:
            raise InputError(f"--port is {self.port}; give a number from 1 to 65535")


class LastResponse(NamedTuple):
    """A response with what it responds to."""

    name: str  # of the model
    query: list[int]
    ids: list[int]


class TerminalStreamer(TextStreamer):
    """Prints a response while it is sampled."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(printable(text), end="\n" if stream_end else "", flush=True)


@dataclass
class Session:
    """A running chat: the models, which of them is the current one, and what was said."""

    models: ChatModels
    current: str
    turns: list[Message] = field(default_factory=list)  # the dialogue so far; ends with a response
    turns_before: list[Message] = field(default_factory=list)  # the dialogue in front of the last question
    question: str = ""  # the last one
    last: list[LastResponse] = field(default_factory=list)  # the last response, or several after /all
    questions: int = 0  # number of questions so far: one that is asked twice gets two responses

    def ask(self, question: str, names: list[str]) -> None:
        """Let these models respond; the current one is among them, and its response goes into the dialogue."""
        self.turns, query = self.models.encode_dialogue(self.turns, question)
        self.questions += 1
        self.question, self.turns_before, self.last = question, self.turns, []
        for name in names:
            if len(names) > 1:
                print(f"--- {name}")
            self.last.append(LastResponse(name, query, self.generate(name, query)))
        ids = next(response.ids for response in self.last if response.name == self.current)
        response: Message = {"role": "assistant", "content": self.models.text(ids)}
        self.turns = [*self.turns, {"role": "user", "content": question}, response]

    def ask_all(self, question: str) -> None:
        """Let every model respond; without a question to the last one again, as if it had not been asked before."""
        if not question and not self.question:
            print("ask something first, or write /all TEXT")
            return
        if not question:
            question, self.turns = self.question, self.turns_before
            self.questions -= 1
        self.ask(question, list(self.models.adapters))

    def generate(self, name: str, query: list[int]) -> list[int]:
        """Sample one response and print it meanwhile."""
        streamer = TerminalStreamer(self.models.tokenizer, skip_prompt=True, skip_special_tokens=True)
        seed = prompt_seed(self.models.seed, f"{self.questions} {self.question}")
        return self.models.generate_ids(name, [query], [seed], streamer)[0]

    def score(self) -> None:
        """Print the reward model's scores of the last responses."""
        if not self.models.can_score:
            print("there is no reward model; start with --reward_model_lora_path FOLDER")
            return
        if not self.last:
            print("nothing to score yet; ask something first")
        for name, query, ids in self.last:
            print(f"{name}: {self.models.score([query], [ids])[0]:.3f}")

    def switch(self, name: str) -> None:
        """Make `name` the one that answers; without a name, or with an unknown one, list them."""
        if name in self.models.adapters:
            self.current = name
            return
        if name:
            print(f"there is no {name}")
        known = [f"{known} (now)" if known == self.current else known for known in self.models.adapters]
        print("models: " + ", ".join(known))

    def obey(self, line: str) -> bool:
        """Do what one line of input says; False when it ends the chat."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if command == "/quit":
            return False
        if command == "/help":
            print(HELP)
        elif command == "/adapter":
            self.switch(rest)
        elif command == "/score":
            self.score()
        elif command == "/new":
            self.turns, self.turns_before, self.question, self.last = [], [], "", []
        elif command == "/all":
            self.ask_all(rest)
        elif command.startswith("/"):
            print(f"there is no command {command}\n{HELP}")
        elif line:
            self.ask(line, [self.current])
        return True


def converse(session: Session) -> None:
    """Read lines until /quit or the end of the input."""
    going = True
    while going:
        try:
            line = input(f"[{session.current}] ")
            going = session.obey(line.encode(errors="replace").decode().strip())  # broken UTF-8 becomes ?
        except EOFError:
            print()
            going = False
        except KeyboardInterrupt:
            print("\n(stopped; /quit ends the chat)")
        except InputError as error:
            print(printable(f"error: {error}"))


def main() -> None:
    (args,) = parse_arguments((ChatArguments,), description="Talk to the base with any of several adapters.")
    if args.web:
        check_gradio()
    models = load_models(args)
    if args.web:
        serve(models, args.model_name_or_path, args.port)
    else:
        say(f"{args.model_name_or_path} with {', '.join(models.adapters)}; /help lists the commands")
        converse(Session(models, current=list(models.adapters)[1]))  # the first one behind the bare base


if __name__ == "__main__":
    run_script(main)
