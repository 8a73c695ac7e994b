"""Talk to the base with an adapter in the terminal, and switch the adapter on the fly; or to all of them on a page.

    python chat.py --base_model_name BASE --adapters SFT=output/sft PPO=output/ppo --reward_model_lora_path output/reward
    python chat.py --web ...    the same at http://127.0.0.1:7860, side by side; pip install -r requirements-web.txt

Replies appear while they are sampled.  The dialogue is remembered, in the prompt template that the adapters were trained
with, and loses its oldest turns when it outgrows the base.  The same --seed and the same input give the same replies.
"""

import contextlib
from dataclasses import dataclass, field
from typing import NamedTuple

from transformers import TextStreamer

from inference.side_by_side import (
    AnswerArguments,
    Talkers,
    answer_samplings,
    check_lineup,
    choose_device,
    load_side_by_side,
    longest_query,
    read_lineup,
)
from inference.web_chat import check_gradio, serve
from utils.arguments import parse_arguments
from utils.base_model import load_base, load_tokenizer
from utils.console import InputError, printable, run_script, say
from utils.data import Message, check_template

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
class ChatArguments(AnswerArguments):
    """Where the talking is done."""

    web: bool = field(
        default=False, metadata={"help": "A page at 127.0.0.1, with all models side by side, in place of the terminal."}
    )
    port: int = field(default=7860, metadata={"help": "Port of that page."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.port < 65536:
            raise InputError(f"--port is {self.port}; give a number from 1 to 65535")


class Answer(NamedTuple):
    """A reply with what it answers."""

    name: str  # of the model
    query: list[int]
    reply: list[int]


class TerminalStreamer(TextStreamer):
    """Prints a reply while it is sampled."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(printable(text), end="\n" if stream_end else "", flush=True)


@dataclass
class Session:
    """A running chat: the models, who answers, and what was said."""

    talkers: Talkers
    current: str
    turns: list[Message] = field(default_factory=list)  # the dialogue so far; ends with a reply
    before: list[Message] = field(default_factory=list)  # the dialogue in front of the last question
    question: str = ""  # the last one
    last: list[Answer] = field(default_factory=list)  # the last reply, or several after /all
    asked: int = 0  # questions so far: one that is asked twice gets two replies

    def ask(self, question: str, names: list[str]) -> None:
        """Let these models answer; the current one, which is among them, has its reply go into the dialogue."""
        self.turns, query = self.talkers.encode(self.turns, question)
        self.asked += 1
        self.question, self.before, self.last = question, self.turns, []
        for name in names:
            if len(names) > 1:
                print(f"--- {name}")
            self.last.append(Answer(name, query, self.reply(name, query)))
        own = next(answer for answer in self.last if answer.name == self.current)
        reply: Message = {"role": "assistant", "content": self.talkers.text(own.reply)}
        self.turns = [*self.turns, {"role": "user", "content": question}, reply]

    def ask_all(self, question: str) -> None:
        """Let every model answer; without a question the last one again, as if it had not been asked before."""
        if not question and not self.question:
            print("ask something first, or write /all TEXT")
            return
        if not question:
            question, self.turns = self.question, self.before
            self.asked -= 1
        self.ask(question, list(self.talkers.adapters))

    def reply(self, name: str, query: list[int]) -> list[int]:
        """Sample one reply and print it meanwhile."""
        streamer = TerminalStreamer(self.talkers.tokenizer, skip_prompt=True, skip_special_tokens=True)
        return self.talkers.reply(name, query, self.question, self.asked, streamer)

    def score(self) -> None:
        """Print the reward model's opinion of the last replies."""
        if not self.talkers.can_score:
            print("there is no reward model; start with --reward_model_lora_path FOLDER")
            return
        if not self.last:
            print("nothing to score yet; ask something first")
        for name, query, reply in self.last:
            print(f"{name}: {self.talkers.score(query, reply):.3f}")

    def switch(self, name: str) -> None:
        """Make `name` the one that answers; without a name, or with an unknown one, list them."""
        if name in self.talkers.adapters:
            self.current = name
            return
        if name:
            print(f"there is no {name}")
        known = [f"{known} (now)" if known == self.current else known for known in self.talkers.adapters]
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
            self.turns, self.before, self.question, self.last = [], [], "", []
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
    # ---- Arguments ----
    (args,) = parse_arguments((ChatArguments,), description="Talk to the base with any of several adapters.")
    if args.web:
        check_gradio()
    lineup = read_lineup(args)
    device, dtype = choose_device(args)

    # ---- Tokenizer ----
    tokenizer = load_tokenizer(args)
    check_template(lineup.template, tokenizer)
    samplings = answer_samplings(lineup.adapters, tokenizer, args.output_max_length, args.temperature)

    # ---- Model ----
    base = load_base(args, dtype)
    check_lineup(lineup, base)
    longest = longest_query(base, args.output_max_length)
    model, active = load_side_by_side(base.to(device), lineup.adapters, lineup.reward)

    # ---- Chat ----
    talkers = Talkers(model, tokenizer, lineup.template, samplings, longest, active, args.seed)
    if args.web:
        serve(talkers, args.model_name_or_path, args.port)
    else:
        say(f"{args.model_name_or_path} with {', '.join(active)}; /help lists the commands")
        converse(Session(talkers, current=next(iter(lineup.adapters))))


if __name__ == "__main__":
    run_script(main)
