"""The gold preference of the demo's world: how good a reply is, by rules on the text alone.

A reward model only imitates a preference; this one is the preference itself, so that a better reply can be told from a
reply that fools the reward model. Nothing here is learnt and no training stage reads it.

    gold = substance * fluency * freshness * completeness * topicality * (0.4 + 0.6 * liveliness)

Every factor lies in [0, 1]. They multiply, so that no strength makes up for a missing one, and a good but dry answer
gets 0.4, a good and lively one 1.0.

    substance     distinct words that are neither markers nor the prompt's own: 1 from 8 (zh characters; en words: 5) on
    fluency       share of neighbouring words that occur side by side in the language of answers, squared
    freshness     share of sentences that are no copy, squared, times the share of distinct neighbouring words
    completeness  1 if the reply ends as a statement ends, else 0.4
    topicality    1 if it names the prompt's topic and no other, 0.5 if others too, 0.1 if it does not name it
    liveliness    share of sentences with a lively marker, times min(1, kinds of markers / 3)
"""

import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from demo.lexicon import LANGUAGES, SENTENCE_ENDS, Language

TOPIC_SLOT = "□"
CONTENT_WANTED = {"zh": 8, "en": 5}
CUT_FACTOR = 0.4
MIXED_TOPICS_FACTOR = 0.5
OFF_TOPIC_FACTOR = 0.1
PLAIN_SHARE = 0.4
KINDS_WANTED = 3

_WORD = re.compile(rf"{TOPIC_SLOT}|[\u4e00-\u9fff]|[A-Za-z']+|[^\s\u4e00-\u9fffA-Za-z]")
_SENTENCE = re.compile(rf"[^{SENTENCE_ENDS}？?]*[{SENTENCE_ENDS}？?]|[^{SENTENCE_ENDS}？?]+$")


class GoldScore(NamedTuple):
    """The factors of one gold score, each in [0, 1], and their product as described above."""

    substance: float
    fluency: float
    freshness: float
    completeness: float
    topicality: float
    liveliness: float
    total: float


def gold_score(prompt: str, response: str) -> float:
    """How good `response` is as a reply to `prompt`, in [0, 1].

    Raises:
        ValueError: if the prompt names no topic of the world.
    """
    return gold_details(prompt, response).total


def gold_details(prompt: str, response: str) -> GoldScore:
    """The gold score of one reply with its factors; raises as `gold_score` does."""
    language, topic = topic_of(prompt)
    response = response.strip()
    sentences = [sentence.strip() for sentence in _SENTENCE.findall(_mask_topics(response)) if sentence.strip()]
    substance = _substance(prompt, response, language)
    if substance == 0.0:  # an empty reply, or one that says nothing: nothing else can be judged
        return GoldScore(*[0.0] * len(GoldScore._fields))
    fluency = _fluency(sentences, language)
    freshness = _freshness(sentences)
    completeness = 1.0 if response[-1] in SENTENCE_ENDS else CUT_FACTOR
    topicality = _topicality(topic, response)
    liveliness = _liveliness(sentences, language)
    style = PLAIN_SHARE + (1.0 - PLAIN_SHARE) * liveliness
    total = substance * fluency * freshness * completeness * topicality * style
    return GoldScore(substance, fluency, freshness, completeness, topicality, liveliness, total)


def topic_of(prompt: str) -> tuple[Language, str]:
    """The language of a prompt and the topic that it asks about; ValueError if it names no topic of the world."""
    named = _topics_in(prompt)
    if not named:
        raise ValueError(f"this prompt names no topic of the demo's world: {prompt!r}")
    topic = named[0]
    language = next(language for language in LANGUAGES if any(topic in words for words in language.topics.values()))
    return language, topic


@cache
def _topic_pattern() -> re.Pattern:
    """Any topic of either language; an English one only as a whole word, as "rice" is not in "price"."""
    chinese, english = ("|".join(t for words in language.topics.values() for t in words) for language in LANGUAGES)
    return re.compile(rf"{chinese}|\b(?:{english})\b", re.IGNORECASE)


def _topics_in(text: str) -> list[str]:
    return [match.group() for match in _topic_pattern().finditer(text)]


def _mask_topics(text: str) -> str:
    return _topic_pattern().sub(TOPIC_SLOT, text)


def _words(text: str) -> list[str]:
    """Chinese characters, English words and punctuation marks, in lower case."""
    return [word.lower() for word in _WORD.findall(text)]


def _pairs(sentence: str) -> Iterator[tuple[str, str]]:
    """Neighbouring words of one sentence; its first word is the neighbour of its start."""
    words = ["^", *_words(sentence)]
    return pairwise(words)


@cache
def _known_pairs(code: str) -> frozenset[tuple[str, str]]:
    """Every pair of neighbouring words in the answer sentences of a language."""
    language = next(language for language in LANGUAGES if language.code == code)
    tables = (language.plain_leads, language.plain_follows, language.lively_leads, language.lively_follows)
    sentences = (sentence for table in tables for group in table.values() for sentence in group)
    return frozenset(pair for sentence in sentences for pair in _pairs(sentence.replace("{t}", TOPIC_SLOT)))


def _substance(prompt: str, response: str, language: Language) -> float:
    text = _mask_topics(response)
    for marker in language.markers.values():
        text = marker.sub(" ", text)
    own = {word for word in _words(text) if word.isalpha()} - set(_words(prompt))
    return min(1.0, len(own) / CONTENT_WANTED[language.code])


def _fluency(sentences: list[str], language: Language) -> float:
    known = _known_pairs(language.code)
    pairs = [pair for sentence in sentences for pair in _pairs(sentence)]
    return (sum(pair in known for pair in pairs) / len(pairs)) ** 2


def _freshness(sentences: list[str]) -> float:
    pairs = [pair for sentence in sentences for pair in _pairs(sentence) if pair[0] != "^"]
    distinct_pairs = len(set(pairs)) / len(pairs) if pairs else 1.0
    return (len(set(sentences)) / len(sentences)) ** 2 * distinct_pairs


def _topicality(topic: str, response: str) -> float:
    named = {name.lower() for name in _topics_in(response)}
    if topic.lower() not in named:
        return OFF_TOPIC_FACTOR
    return 1.0 if len(named) == 1 else MIXED_TOPICS_FACTOR


def _liveliness(sentences: list[str], language: Language) -> float:
    kinds = [{kind for kind, marker in language.markers.items() if marker.search(text)} for text in sentences]
    return sum(map(bool, kinds)) / len(sentences) * min(1.0, len(set().union(*kinds)) / KINDS_WANTED)
