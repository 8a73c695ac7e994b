"""Broken replies: made from ordinary data to train and probe a reward model, and found again among a policy's replies.

A reward model sees whole replies only, so nothing tells it what an empty, cut or looping one is worth, and PPO goes and
finds out.  Each kind below turns a good reply into one that nobody wants, in any language and with no label but "worse
than the reply it was made from".  Where a good reply is so short that the broken one could pass for a good short one
(a cut at the end of its only sentence, three tokens out of four), there is none: short by itself is no fault.

Sources for the kinds: arXiv:2409.13156 (another prompt's reply), arXiv:2507.08794 (openers and punctuation that fool
judges, cured with truncated replies), and the failures that people report from PPO: empty, tiny and looping replies.
"""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from utils.data import encode_prompt, encode_reply, preference_reader

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
# Kinds that are worse than whatever reply they were made from.
OF_ANY_REPLY = tuple(kind for kind in KINDS if kind not in ("off_topic", "stock", "wrong_language"))
# Training pairs of a kind, others have 1: the harder ones to learn have more. For two the prompt has to be read, and the
# others hold good words or whole good sentences, in very many ways.
TRAIN_WEIGHT = {
    "cut_50": 3,
    "repeated": 3,
    "sentence_loop": 3,
    "token_loop": 3,
    "shuffled": 3,
    "off_topic": 3,
    "wrong_language": 3,
}
SHORTEST_CUT = 6  # tokens: shorter replies are neither cut nor made tiny
SHORTEST_SHUFFLE = 5  # words
DONORS = 8  # replies looked at for one that has as little to do with the prompt as possible
SECOND_LANGUAGE = 0.02  # share of the replies in another script from which the data counts as bilingual
LOOP_WORDS = 8  # from so many words on a reply can be called a loop
LOOP_DISTINCT = 0.6  # and it is one when fewer of its runs of three words than this share are different ones

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


class GoodReply(NamedTuple):
    """A reply that somebody preferred, with its prompt."""

    prompt: str  # what was asked last, without the template
    reply: str
    ids: list[int]  # the reply's tokens, without EOS


# ---------------------------------------------------------------------------------------------------------------------
# Making them
# ---------------------------------------------------------------------------------------------------------------------


class ReplyBreaker:
    """Makes broken replies of every kind out of a set of good ones.  The same seed gives the same replies.

    held_out: take stock phrases and blanks that a breaker for training never uses.
    """

    def __init__(
        self, replies: Sequence[GoodReply], tokenizer: PreTrainedTokenizerBase, seed: int, held_out: bool = False
    ) -> None:
        self.replies = replies
        self.tokenizer = tokenizer
        self.seed = seed
        self.half = int(held_out)
        self.words = [(set(words_of(good.prompt)), set(words_of(good.reply))) for good in replies]
        self.scripts = [script_of(good.reply) for good in replies]
        counts = Counter(self.scripts)
        self.languages = {script for script, count in counts.items() if count >= SECOND_LANGUAGE * len(replies)}

    def break_reply(self, kind: str, index: int) -> list[int] | None:
        """Tokens, without EOS, of a broken reply to the prompt of reply `index`; None where the kind does not apply."""
        rng = Random(f"{self.seed} {self.half} {kind} {index}")
        good = self.replies[index]
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
        if text is None or text.strip() == good.reply.strip():
            return None
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _text(self, kind: str, index: int, rng: Random) -> str | None:
        good = self.replies[index]
        joiner = " " if " " in good.reply.strip() else ""
        if kind == "blank":
            return joiner.join([rng.choice(BLANKS[self.half :: 2])] * rng.randint(1, 3))
        if kind == "repeated":
            return joiner.join([good.reply] * rng.randint(2, 3))
        if kind == "sentence_loop":
            last = SENTENCE.findall(good.reply.strip())[-1].strip()
            return joiner.join([good.reply, *[last] * rng.randint(2, 5)])
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
        """The first one to three tokens of this reply or of another one."""
        source = self.replies[rng.choice((index, rng.randrange(len(self.replies))))]
        return self._cut(source, rng.randint(1, 3)) if len(self.replies[index].ids) >= SHORTEST_CUT else None

    def _cut(self, good: GoodReply, length: int) -> list[int] | None:
        """The first `length` tokens, at least one; fewer where that would end a sentence, as it may be a good reply."""
        if len(good.ids) < SHORTEST_CUT:
            return None
        length = max(1, length)
        while length and self.tokenizer.decode(good.ids[:length]).rstrip(" ").endswith(tuple(SENTENCE_END)):
            length -= 1
        return good.ids[:length] or None

    def _shuffled(self, good: GoodReply, joiner: str, rng: Random) -> str | None:
        words = words_of(good.reply, lower=False)
        if len(words) < SHORTEST_SHUFFLE:
            return None
        rng.shuffle(words)
        return joiner.join(words) + good.reply.strip()[-1]

    def _donor(self, index: int, rng: Random, fits: Callable[[str], bool]) -> str | None:
        """Of a few other prompts' replies that fit, the one with the fewest of this prompt's words.

        None where even that one has as many as the good reply: it may be an answer to this prompt too.
        """
        asked = self.words[index][0]
        own = len(asked & self.words[index][1])
        drawn = (rng.randrange(len(self.replies)) for _ in range(10 * DONORS))
        found = [other for other in drawn if other != index and fits(self.scripts[other])][:DONORS]
        if not found:
            return None
        best = min(found, key=lambda other: len(asked & self.words[other][1]))
        shared = len(asked & self.words[best][1])
        return self.replies[best].reply if shared < own or shared == 0 else None


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


def distinct_runs(text: str, length: int) -> float:
    """Share of different ones among the runs of `length` neighbouring words; 1 where there are none."""
    words = words_of(text)
    runs = [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def find_broken(prompt: str, reply: str) -> str | None:
    """What is plainly wrong with a reply, whatever the prompt asks: "empty", "blank", "loop", "echo", else None.

    blank: no letter, digit or symbol in it.  loop: at least `LOOP_WORDS` words, and fewer than `LOOP_DISTINCT` of its runs
    of three words are different ones.  echo: the prompt again and nothing else.  Short is not broken.
    """
    if not reply.strip():
        return "empty"
    if all(unicodedata.category(mark)[0] in "PZC" for mark in reply):
        return "blank"
    words, asked = words_of(reply), words_of(prompt)
    if len(words) >= LOOP_WORDS and distinct_runs(reply, 3) < LOOP_DISTINCT:
        return "loop"
    if asked and len(words) >= len(asked) and words == (asked * len(words))[: len(words)]:
        return "echo"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Pairs
# ---------------------------------------------------------------------------------------------------------------------


def broken_pairs(
    rows: Dataset,
    counts: dict[str, int],
    limits: tuple[str, PreTrainedTokenizerBase, int],
    seed: int,
    held_out: bool = False,
) -> list[dict[str, Any]]:
    """Pairs of a reply and a broken one to the same prompt, with the columns of `tokenize_preferences` and their `kind`.

    rows: preference data; counts: kind -> how many pairs, fewer where the data gives no more; limits: prompt template,
    tokenizer, and the longest prompt + reply in tokens.  A reply that does not fit is left out; a broken one is cut to fit
    and then has no EOS.

    For training, every second pair of the kinds in `OF_ANY_REPLY` is made from a rejected reply: what is left of a poor
    reply is still worse than the reply, and a policy starts from poor ones.  held_out: from chosen ones only, with stock
    phrases and blanks that no training pair has.
    """
    template, tokenizer, max_length = limits
    read = preference_reader(rows)
    queries, chosen_replies, rejected_replies = [], [], []
    for row in rows:
        prompt, *texts = read(row)
        if not prompt or not all(text and text.strip() for text in texts):
            continue
        query = encode_prompt(prompt, template, tokenizer)
        ids = [encode_reply(text, tokenizer) for text in texts]
        if len(query) + max(map(len, ids)) < max_length:
            asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            queries.append(query)
            chosen_replies.append(GoodReply(asked, texts[0], ids[0]))
            rejected_replies.append(GoodReply(asked, texts[1], ids[1]))
    of_chosen = ReplyBreaker(chosen_replies, tokenizer, seed, held_out)
    of_rejected = of_chosen if held_out else ReplyBreaker(rejected_replies, tokenizer, seed)
    pairs = []
    for kind, count in counts.items():
        order = list(range(len(queries)))
        # the probes of all kinds are about the same prompts, so each good reply has to be scored once
        Random(f"{seed} order" if held_out else f"{seed} {kind} order").shuffle(order)
        made = 0
        for index in order:
            if made == count:
                break
            breaker = of_rejected if made % 2 and kind in OF_ANY_REPLY else of_chosen
            broken = breaker.break_reply(kind, index)
            if broken is None:
                continue
            made += 1
            query = queries[index]
            better = [*query, *breaker.replies[index].ids, tokenizer.eos_token_id]
            worse = [*query, *broken, tokenizer.eos_token_id][:max_length]
            extra = {"query_length": len(query), "length": max(len(better), len(worse)), "margin": 0.0, "kind": kind}
            pairs.append({"chosen_ids": better, "rejected_ids": worse, **extra})
    return pairs
