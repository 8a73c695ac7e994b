"""Talk to the base with an adapter in the terminal, and switch the adapter on the fly.

    python chat.py --base_model_name BASE --adapters SFT=output/sft PPO=output/ppo --reward_model_lora_path output/reward

Replies appear while they are sampled.  The dialogue is remembered, in the prompt template that the adapters were trained
with, and loses its oldest turns when it outgrows the base.  The same --seed and the same input give the same replies.
"""

import contextlib
import unicodedata
from dataclasses import dataclass, field
from typing import NamedTuple

from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TextStreamer

from utils.adapters import REWARD, load_base, load_tokenizer, use_adapter
from utils.answers import (
    AnswerArguments,
    answer_sampling,
    check_lineup,
    choose_device,
    load_side_by_side,
    longest_query,
    read_lineup,
    reply_seed,
    score_replies,
)
from utils.arguments import InputError, parse_arguments, run_script, say
from utils.data import Message, check_template, encode_prompt
from utils.rollout import Sampling, sample_replies

with contextlib.suppress(ImportError):  # not every Python has it
    import readline  # noqa: F401  arrow keys and history in input()

HELP = """/adapter NAME   answer with this adapter from now on; without a name: list them
/all [TEXT]     let every model answer TEXT, or your last question
/score          the reward model's score of the last reply, or of all of them after /all
/new            forget the dialogue
/help           this list
/quit           end (so does Ctrl-D); Ctrl-C stops a reply
Anything else is said to the model."""


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

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    template: str
    sampling: Sampling
    longest: int  # tokens of a dialogue
    adapters: dict[str, list[str]]  # name -> adapters that act under it
    current: str
    seed: int
    turns: list[Message] = field(default_factory=list)  # the dialogue so far; ends with a reply
    before: list[Message] = field(default_factory=list)  # the dialogue in front of the last question
    question: str = ""  # the last one
    last: list[Answer] = field(default_factory=list)  # the last reply, or several after /all
    asked: int = 0  # questions so far: one that is asked twice gets two replies

    def ask(self, question: str, names: list[str]) -> None:
        """Let these models answer; the current one, which is among them, has its reply go into the dialogue."""
        query = self.encode(question)
        self.asked += 1
        self.question, self.before, self.last = question, self.turns, []
        for name in names:
            if len(names) > 1:
                print(f"--- {name}")
            self.last.append(Answer(name, query, self.reply(name, query)))
        own = next(answer for answer in self.last if answer.name == self.current)
        text = self.tokenizer.decode(own.reply, skip_special_tokens=True).strip()
        self.turns = [*self.turns, {"role": "user", "content": question}, {"role": "assistant", "content": text}]

    def ask_all(self, question: str) -> None:
        """Let every model answer; without a question the last one again, as if it had not been asked before."""
        if not question and not self.question:
            print("ask something first, or write /all TEXT")
            return
        if not question:
            question, self.turns = self.question, self.before
            self.asked -= 1
        self.ask(question, list(self.adapters))

    def encode(self, question: str) -> list[int]:
        """Ids of the dialogue with this question at its end, without the oldest turns where it is too long.

        Raises InputError when the question alone is.
        """
        while True:
            turns = [*self.turns, {"role": "user", "content": question}]
            query = encode_prompt(turns, self.template, self.tokenizer)
            if len(query) <= self.longest:
                return query
            if not self.turns:
                raise InputError(
                    f"that is {len(query)} tokens, more than the {self.longest} that fit; ask a shorter one"
                )
            self.turns = self.turns[2:]

    def reply(self, name: str, query: list[int]) -> list[int]:
        """Sample one reply and print it meanwhile."""
        streamer = TerminalStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        seed = reply_seed(self.seed, f"{self.asked} {self.question}")
        with use_adapter(self.model, *self.adapters[name]):
            return sample_replies(self.model, [query], [seed], self.sampling, streamer)[0]

    def score(self) -> None:
        """Print the reward model's opinion of the last replies."""
        if REWARD not in self.model.peft_config:
            print("there is no reward model; start with --reward_model_lora_path FOLDER")
            return
        if not self.last:
            print("nothing to score yet; ask something first")
        for name, query, reply in self.last:
            (score,) = score_replies(self.model, [query], [reply], self.tokenizer.pad_token_id)
            print(f"{name}: {score:.3f}")

    def switch(self, name: str) -> None:
        """Make `name` the one that answers; without a name, or with an unknown one, list them."""
        if name in self.adapters:
            self.current = name
            return
        if name:
            print(f"there is no {name}")
        print("models: " + ", ".join(f"{known} (now)" if known == self.current else known for known in self.adapters))

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


def printable(text: str) -> str:
    """Text without control characters, which could drive the terminal; line ends and tabs stay."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


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
            print(f"error: {error}")


def main() -> None:
    # ---- Arguments ----
    (args,) = parse_arguments((AnswerArguments,), description="Talk to the base with any of several adapters.")
    lineup = read_lineup(args)
    device, dtype = choose_device(args)

    # ---- Tokenizer ----
    tokenizer = load_tokenizer(args)
    check_template(lineup.template, tokenizer)
    sampling = answer_sampling(tokenizer, args.output_max_length, args.temperature)

    # ---- Model ----
    base = load_base(args, dtype)
    check_lineup(lineup, base)
    longest = longest_query(base, args.output_max_length)
    model, active = load_side_by_side(base.to(device), lineup.adapters, lineup.reward)

    # ---- Chat ----
    say(f"{args.model_name_or_path} with {', '.join(active)}; /help lists the commands")
    first = next(iter(lineup.adapters))
    converse(Session(model, tokenizer, lineup.template, sampling, longest, active, first, args.seed))


if __name__ == "__main__":
    run_script(main)
