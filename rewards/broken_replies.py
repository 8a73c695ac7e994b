"""Broken replies: made from ordinary data to train and probe a reward model, and found again among a policy's replies.

People's data hold whole replies only, so a reward model does not learn that an empty, cut or looping one is bad, and PPO
exploits that.  Each kind below turns a good reply into one that nobody wants, in any language, and says no more than that
it is worse than the reply it was made from.  Where a good reply is so short that the broken one could pass for a good short
one (a cut at the end of its only sentence, three tokens out of four), none is made: a reply is not bad for being short.

Sources for the kinds: arXiv:2409.13156 (another prompt's reply), arXiv:2507.08794 (openers and punctuation that fool
judges, cured with truncated replies), and the failures that people report from PPO: empty, tiny and looping replies.
"""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from random import Random
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from corpus.tokens import Source, is_blank

KINDS = (
    "empty",
    "blank",
    "tiny",
    "cut_5",
    "cut_10",
    "cut_25",
    "cut_50",
    "repeated",
    "sentence_loop",
    "token_loop",
    "shuffled",
    "echo",
    "off_topic",
    "stock",
    "wrong_language",
)
# Kinds that are worse than the response they were made from, even where that is a poor one.
OF_ANY_RESPONSE = tuple(kind for kind in KINDS if kind not in ("off_topic", "stock", "wrong_language"))
# Kinds with more than one share of the training pairs, because they are harder to learn: for two of them the prompt has to
# be read, and the others hold good words or whole good sentences in very many ways.
TRAIN_WEIGHT = {
    "cut_50": 3,
    "repeated": 3,
    "sentence_loop": 3,
    "token_loop": 3,
    "shuffled": 3,
    "off_topic": 3,
    "wrong_language": 3,
}
SHORTEST_CUT = 6  # tokens: a shorter response is neither cut nor made tiny
SHORTEST_SHUFFLE = 5  # words
DONORS = 8  # responses to other prompts, of which the one that has least to do with the prompt is taken
SECOND_LANGUAGE = (
    0.02  # a script that at least this share of the responses is written in counts as a language of the data
)
LOOP_WORDS = 8  # a response of fewer words is never called a loop
LOOP_DISTINCT = 0.6  # it is a loop when less than this share of its runs of three words are different ones

SENTENCE = re.compile(r"[^.!?。！？…～।؟\n]*[.!?。！？…～।؟\n]+|[^.!?。！？…～।؟\n]+$")
SENTENCE_END = ".!?。！？…～।؟\n"
# Scripts without spaces between words are taken a character at a time.
WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0eff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
)
BLANKS = (
    " ",
    "\n",
    "。",
    ".",
    "…",
    "\n\n",
    "!",
    "？",
    "，",
    "...",
    ":",
    "-",
    "、",
    "~",
    "?!",
    "\t",
    "！",
    '"',
    ";",
    "——",
)
STOCK = {  # by script; every second one is kept for the probes
    "CJK": (
        "对不起，我不明白您的意思。",
        "抱歉，我无法回答这个问题。",
        "好的，没问题。",
        "这是一个很好的问题。",
        "作为一个人工智能助手，我很乐意帮助您。",
        "作为一个语言模型，我没有个人的看法。",
        "我不知道。",
        "我不太清楚。",
        "当然可以！让我们一步一步来看。",
        "好的，下面是我的回答：",
        "希望这对你有帮助！",
        "如果还有其他问题，请随时告诉我。",
    ),
    "LATIN": (
        "I'm sorry, but I can't help with that.",
        "Sorry, I am not able to answer this question.",
        "Sure, no problem.",
        "That's a great question!",
        "As an AI assistant, I am happy to help you.",
        "As a language model, I have no opinion of my own.",
        "I don't know.",
        "I'm not sure about that.",
        "Of course! Let's solve this step by step.",
        "Okay, here is my answer:",
        "I hope this helps!",
        "Let me know if you have any other questions.",
    ),
}


class GoodResponse(NamedTuple):
    """A response to break, with its prompt."""

    prompt: str  # the last turn, without the template
    response: str
    ids: list[int]  # the response's tokens, without its end


# ---------------------------------------------------------------------------------------------------------------------
# Making them
# ---------------------------------------------------------------------------------------------------------------------


class ResponseBreaker:
    """Makes broken responses of every kind out of a set of good ones.  The same seed gives the same responses.

    held_out: take stock phrases and blanks that a breaker for training never uses.
    """

    def __init__(
        self, responses: Sequence[GoodResponse], tokenizer: PreTrainedTokenizerBase, seed: int, held_out: bool = False
    ) -> None:
        self.responses = responses
        self.tokenizer = tokenizer
        self.seed = seed
        self.half = int(held_out)
        self.words = [(set(words_of(good.prompt)), set(words_of(good.response))) for good in responses]
        self.scripts = [script_of(good.response) for good in responses]
        counts = Counter(self.scripts)
        self.languages = {script for script, count in counts.items() if count >= SECOND_LANGUAGE * len(responses)}

    def break_response(self, kind: str, index: int) -> list[int] | None:
        """Tokens, without its end, of a broken response to prompt `index`; None where the kind does not apply.

        Raises ValueError for an unknown kind.
        """
        rng = Random(f"{self.seed} {self.half} {kind} {index}")
        good = self.responses[index]
        if kind == "empty":
            return []
        if kind == "tiny":
            return self._tiny(index, rng)
        if kind.startswith("cut_"):
            return self._cut(good, round(len(good.ids) * int(kind.removeprefix("cut_")) / 100))
        if kind == "token_loop":
            if not good.ids:
                return None
            start = good.ids[: rng.randint(0, len(good.ids) // 2)]
            return start + [rng.choice(good.ids)] * rng.randint(6, max(12, len(good.ids)))
        text = self._text(kind, index, rng)
        if text is None or text.strip() == good.response.strip():
            return None
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _text(self, kind: str, index: int, rng: Random) -> str | None:
        good = self.responses[index]
        joiner = " " if " " in good.response.strip() else ""
        if kind == "blank":
            return joiner.join([rng.choice(BLANKS[self.half :: 2])] * rng.randint(1, 3))
        if kind == "repeated":
            return joiner.join([good.response] * rng.randint(2, 3))
        if kind == "sentence_loop":
            last = SENTENCE.findall(good.response.strip())[-1].strip()
            return joiner.join([good.response, *[last] * rng.randint(2, 5)])
        if kind == "shuffled":
            return self._shuffled(good, joiner, rng)
        if kind == "echo":
            return joiner.join([good.prompt] * rng.randint(1, 2))
        if kind == "stock":
            phrases = STOCK.get(self.scripts[index])
            return rng.choice(phrases[self.half :: 2]) if phrases else None
        if kind == "off_topic":
            return self._donor(index, rng, lambda script: script == self.scripts[index])
        if kind == "wrong_language":
            return self._donor(index, rng, lambda script: script != self.scripts[index] and script in self.languages)
        raise ValueError(f"there is no kind {kind!r}; the kinds are {', '.join(KINDS)}")

    def _tiny(self, index: int, rng: Random) -> list[int] | None:
        """The first one to three tokens of this response or of another one."""
        source = self.responses[rng.choice((index, rng.randrange(len(self.responses))))]
        return self._cut(source, rng.randint(1, 3)) if len(self.responses[index].ids) >= SHORTEST_CUT else None

    def _cut(self, good: GoodResponse, length: int) -> list[int] | None:
        """The first `length` tokens, at least one; fewer where they would end a sentence and so might be a good response."""
        if len(good.ids) < SHORTEST_CUT:
            return None
        length = max(1, length)
        while length and self.tokenizer.decode(good.ids[:length]).rstrip(" ").endswith(tuple(SENTENCE_END)):
            length -= 1
        return good.ids[:length] or None

    def _shuffled(self, good: GoodResponse, joiner: str, rng: Random) -> str | None:
        words = words_of(good.response, lower=False)
        if len(words) < SHORTEST_SHUFFLE:
            return None
        rng.shuffle(words)
        return joiner.join(words) + good.response.strip()[-1]

    def _donor(self, index: int, rng: Random, fits: Callable[[str], bool]) -> str | None:
        """Of a few other prompts' responses that fit, the one with the fewest of this prompt's words.

        None where even that one has as many as the good response: it may answer this prompt too.
        """
        asked = self.words[index][0]
        own = len(asked & self.words[index][1])
        drawn = (rng.randrange(len(self.responses)) for _ in range(10 * DONORS))
        found = [other for other in drawn if other != index and fits(self.scripts[other])][:DONORS]
        if not found:
            return None
        best = min(found, key=lambda other: len(asked & self.words[other][1]))
        shared = len(asked & self.words[best][1])
        return self.responses[best].response if shared < own or shared == 0 else None


def words_of(text: str, lower: bool = True) -> list[str]:
    """The words of a text; of scripts that put no spaces between words, the characters."""
    return WORD.findall(text.lower() if lower else text)


def script_of(text: str) -> str:
    """The script that most letters of the text are written in, as Unicode names it ("LATIN", "CJK"), "" without letters."""
    scripts = Counter(_script(mark) for mark in text if mark.isalpha())
    return scripts.most_common(1)[0][0] if scripts else ""


@functools.cache
def _script(mark: str) -> str:
    return unicodedata.name(mark, "UNKNOWN").split()[0]


# ---------------------------------------------------------------------------------------------------------------------
# Finding them
# ---------------------------------------------------------------------------------------------------------------------


def distinct_share(sequences: Iterable[Sequence[Hashable]], length: int) -> float | None:
    """Different runs of `length` neighbours as a share of all such runs in the sequences together; None without any.

    Of words or tokens it is distinct-n (Li et al. 2016, arXiv:1510.03055, section 5).
    """
    runs = [tuple(sequence[i : i + length]) for sequence in sequences for i in range(len(sequence) - length + 1)]
    return len(set(runs)) / len(runs) if runs else None


def find_broken(prompt: str, response: str) -> str | None:
    """What is plainly wrong with a response, whatever the prompt asks: "empty", "blank", "loop", "echo", else None.

    blank: no letter, digit or symbol in it.  loop: at least `LOOP_WORDS` words, and fewer than `LOOP_DISTINCT` of its runs
    of three words are different ones.  echo: the prompt again and nothing else.  Short is not broken.
    """
    if is_blank(response):
        return "empty"
    if all(unicodedata.category(mark)[0] in "PZC" for mark in response):
        return "blank"
    words, asked = words_of(response), words_of(prompt)
    if len(words) >= LOOP_WORDS and distinct_share([words], 3) < LOOP_DISTINCT:
        return "loop"
    if asked and len(words) >= len(asked) and words == (asked * len(words))[: len(words)]:
        return "echo"
    return None


def empty_share(faults: Sequence[str | None]) -> float:
    """Share of the responses that hold no letter, digit or symbol.  faults: what `find_broken` says of each."""
    return sum(fault in ("empty", "blank") for fault in faults) / len(faults)


# ---------------------------------------------------------------------------------------------------------------------
# Pairs
# ---------------------------------------------------------------------------------------------------------------------


def broken_pairs(
    sources: Sequence[Source],
    counts: dict[str, int],
    tokenizer: PreTrainedTokenizerBase,
    end_id: int,
    max_length: int,
    seed: int,
    held_out: bool = False,
) -> list[dict[str, Any]]:
    """Pairs of a response and a broken one to the same prompt, with the columns of `tokenize_preferences`.

    sources: from `tokenize_preferences`; counts: kind -> how many pairs, fewer where the sources give no more.  end_id: what
    closes a response, see `reply_end_id`.  A broken response that with its prompt is longer than `max_length` tokens is cut,
    and then has no such end.

    For training, every second pair of the kinds in `OF_ANY_RESPONSE` is made from a rejected response: what is left of a
    poor response is still worse than the response, and a policy starts from poor ones.  held_out: from chosen ones only,
    with stock phrases and blanks that no training pair has.
    """
    of_chosen = ResponseBreaker(
        [GoodResponse(source.prompt, source.chosen, source.chosen_ids) for source in sources], tokenizer, seed, held_out
    )
    of_rejected = of_chosen
    if not held_out:
        rejected = [GoodResponse(source.prompt, source.rejected, source.rejected_ids) for source in sources]
        of_rejected = ResponseBreaker(rejected, tokenizer, seed)
    pairs = []
    for kind, count in counts.items():
        order = list(range(len(sources)))
        # the probes of all kinds are about the same prompts, so each good response has to be scored once
        Random(f"{seed} order" if held_out else f"{seed} {kind} order").shuffle(order)
        made = 0
        for index in order:
            if made == count:
                break
            breaker = of_rejected if made % 2 and kind in OF_ANY_RESPONSE else of_chosen
            broken = breaker.break_response(kind, index)
            if broken is None:
                continue
            made += 1
            query = sources[index].query
            better = [*query, *breaker.responses[index].ids, end_id]
            worse = [*query, *broken, end_id][:max_length]
            extra = {"query_length": len(query), "length": max(len(better), len(worse)), "margin": 0.0, "kind": kind}
            pairs.append({"chosen_ids": better, "rejected_ids": worse, **extra})
    return pairs
