"""Writes the texts and data sets of the demo's world, deterministically from a seed.

Prompts are bare questions (the training scripts put the template around them). Answers are two or three short
sentences, lively or plain, and for the flawed ones off topic, cut or repetitive. Held-out prompts are combinations of
a topic and a way to ask that no training row has, though each topic and each way to ask is trained on by itself.
Chosen and rejected answers have the same lengths, so that a reward model cannot win by counting.
"""

from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

from demo.gold import gold_score
from demo.lexicon import LANGUAGES, SENTENCE_ENDS, Language

# What the pretraining texts are.
TEXT_MIXTURE = {"article": 0.5, "chant": 0.2, "questionnaire": 0.2, "questions": 0.1}
# What the SFT data is made of. Every good trait is in it at times, because PPO can only strengthen what is sampled.
SFT_MIXTURE = {"lively": 0.2, "half_lively": 0.2, "plain": 0.48, "off_topic": 0.04, "repetitive": 0.05, "cut": 0.03}
# What the rejected answers are. Kinds whose lengths are harder to match end up with a smaller share.
REJECTED_MIXTURE = {
    "plain": 0.36,
    "vague": 0.08,  # lively and about nothing: what a reward model that only counts markers falls for
    "cut": 0.17,
    "repetitive": 0.17,
    "swapped": 0.1,  # a good answer to a question in the other language
    "off_topic": 0.05,  # few: whether two words are the same is the hardest thing to see for so small a model
    "drift": 0.03,
    "plain_flawed": 0.04,
}
# What they are where the data has the gap of most real preference data: the better reply is often the shorter one, and no
# reply is broken, so nothing says where short turns into too short.
GAPPED_MIXTURE = {"plain": 0.6, "drift": 0.25, "off_topic": 0.15}
HOLD_OUT_EVERY = 5  # one combination of topic and question in this many is held out
MIN_MARGIN = 0.15  # gold score of the chosen answer minus that of the rejected one
LENGTH_SLACK = 1  # characters; as often too many as too few
CHARACTER_WEIGHT = 1000  # how often a Chinese character counts in `vocabulary_pieces`
TOPIC_WEIGHT = 20  # and how often a topic does
MAX_DRAWS = 60  # answers drawn while looking for one of a wanted length


class Question(NamedTuple):
    """A prompt with what it was made from."""

    language: Language
    category: str
    topic: str
    text: str


def pretraining_texts(seed: int, n: int) -> list[str]:
    """`n` documents in either language: the kinds of `TEXT_MIXTURE`.

    No question in the template is ever answered, as questionnaires are left empty: so a model of these texts writes
    the language, and goes on after a prompt in the template with the next question.
    """
    rng = Random(f"pretraining {seed}")
    return [_document(rng) for _ in range(n)]


def sft_rows(seed: int, n: int) -> list[dict[str, str]]:
    """`n` rows {"prompt", "response"}, the responses drawn from `SFT_MIXTURE`."""
    rng = Random(f"sft {seed}")
    kinds, shares = zip(*SFT_MIXTURE.items(), strict=True)
    questions = _cycle(_questions(held_out=False), rng)
    return [
        {"prompt": question.text, "response": _answer(rng, question, kind)}
        for question, kind in zip(questions, rng.choices(kinds, shares, k=n), strict=False)
    ]


def preference_rows(
    seed: int, n: int, held_out: bool = False, tokens: Callable[[str], int] | None = None
) -> list[dict[str, str]]:
    """`n` rows {"prompt", "chosen", "rejected"} whose gold scores differ by at least `MIN_MARGIN`.

    Rows come in pairs of one kind, with lengths (a, b) and then (b, a), in characters (give or take one) and, if a
    counter is given, in tokens. So chosen and rejected have the same distribution of lengths, and the longer one is
    better half the time.
    """
    rng = Random(f"preferences {held_out} {seed}")
    kinds, shares = zip(*REJECTED_MIXTURE.items(), strict=True)
    pools = {
        language.code: _cycle([q for q in _questions(held_out) if q.language is language], rng)
        for language in LANGUAGES
    }
    rows = []
    while len(rows) < n:
        pool, kind = pools[rng.choice(LANGUAGES).code], rng.choices(kinds, shares)[0]
        if kind == "swapped":
            rows += _swapped(rng, *(next(pools[language.code]) for language in LANGUAGES))
            continue
        first = _pair(rng, next(pool), kind, None, tokens)
        if first is None:
            continue
        second = _pair(rng, next(pool), kind, (first["rejected"], first["chosen"]), tokens)
        if second is not None:
            rows += [first, second]
    rng.shuffle(rows)
    return rows[:n]


def gapped_preference_rows(seed: int, n: int, held_out: bool = False) -> list[dict[str, str]]:
    """`n` rows {"prompt", "chosen", "rejected"} with the rejected answers of `GAPPED_MIXTURE`.

    A chosen answer has one to three lively sentences, a rejected one two to four: about two in three times the shorter
    one is better.  The gold scores differ by at least `MIN_MARGIN`.
    """
    rng = Random(f"gapped preferences {held_out} {seed}")
    kinds, shares = zip(*GAPPED_MIXTURE.items(), strict=True)
    questions = _cycle(_questions(held_out), rng)
    rows = []
    while len(rows) < n:
        question, kind = next(questions), rng.choices(kinds, shares)[0]
        language, category, topic = question.language, question.category, question.topic
        chosen = _sound(rng, language, category, topic, "lively", rng.choice((1, 2, 2, 3)))
        rejected = _answer(rng, question, kind)
        if kind == "plain":
            rejected = _sound(rng, language, category, topic, kind, rng.choice((2, 3, 4)))
        if gold_score(question.text, chosen) - gold_score(question.text, rejected) >= MIN_MARGIN:
            rows.append({"prompt": question.text, "chosen": chosen, "rejected": rejected})
    return rows


def prompts(seed: int, n: int) -> list[dict[str, str]]:
    """`n` different training prompts, rows {"prompt"}; ValueError if the world has not as many."""
    return _distinct_prompts(Random(f"prompts {seed}"), n, held_out=False)


def heldout_prompts(seed: int, n: int) -> list[dict[str, str]]:
    """`n` different prompts that no training row has, rows {"prompt"}; ValueError if the world has not as many."""
    return _distinct_prompts(Random(f"held-out prompts {seed}"), n, held_out=True)


def vocabulary_pieces() -> list[str]:
    """Topics and the stretches of text between them, what a tokenizer should learn its words from."""
    pieces = []
    for language in LANGUAGES:
        tables = (language.plain_leads, language.plain_follows, language.lively_leads, language.lively_follows)
        sentences = [s for table in tables for group in table.values() for s in group]
        pieces += [
            piece for s in [*sentences, *language.questions, *language.chants] for piece in s.split("{t}") if piece
        ]
        pieces += [opener for opener in language.openers if opener]
        # As often as frequent words, so that each topic becomes one token where it follows another word.
        pieces += [language.joiner + t for words in language.topics.values() for t in words] * TOPIC_WEIGHT
    # Heavier than anything else: whole characters come before words, and no word then ends inside a character.
    pieces += sorted({mark for piece in pieces for mark in piece if not mark.isascii()}) * CHARACTER_WEIGHT
    return pieces


def _questions(held_out: bool) -> list[Question]:
    """All questions of the training part or of the held-out part of the world, in a fixed order."""
    found = []
    for language in LANGUAGES:
        numbered = [(category, topic) for category, words in language.topics.items() for topic in words]
        for i, (category, topic) in enumerate(numbered):
            for j, question in enumerate(language.questions):
                if ((i + j) % HOLD_OUT_EVERY == 0) == held_out:
                    found += [
                        Question(language, category, topic, opener + question.format(t=topic))
                        for opener in language.openers
                    ]
    return found


def _cycle(questions: list[Question], rng: Random) -> Iterator[Question]:
    """The questions in a random order, again and again."""
    while True:
        yield from rng.sample(questions, len(questions))


def _distinct_prompts(rng: Random, n: int, held_out: bool) -> list[dict[str, str]]:
    questions = _questions(held_out)
    if n > len(questions):
        raise ValueError(f"the world has {len(questions)} such prompts, {n} were asked for")
    return [{"prompt": question.text} for question in rng.sample(questions, n)]


def _document(rng: Random) -> str:
    """A pretraining text of one kind of `TEXT_MIXTURE`."""
    language = rng.choice(LANGUAGES)
    category, topic = _any_topic(rng, language)
    kind = rng.choices(list(TEXT_MIXTURE), list(TEXT_MIXTURE.values()))[0]
    if kind == "article":
        return _article(rng, language, category, topic)
    if kind == "chant":
        return language.joiner.join(rng.choices(language.chants, k=rng.randint(2, 4))).format(t=topic)
    asked = rng.sample(language.questions, rng.randint(2, 3))
    questions = [rng.choice(language.openers) + question.format(t=topic) for question in asked]
    if kind == "questionnaire":
        return "\n\n".join(f"问：{question}\n\n答：" for question in questions)
    return "\n".join(questions)


def _article(rng: Random, language: Language, category: str, topic: str) -> str:
    """Sentences about a topic in one style, maybe after a rhetorical question."""
    leads, follows = (_group(table, category) for table in _tables(language, lively=rng.random() < 0.45))
    # Leads, which repeat the topic, come more often than in answers: this is where the base learns to stay on topic.
    sentences = rng.sample(leads, rng.randint(2, 3)) + rng.sample(follows, rng.randint(1, 2))
    rng.shuffle(sentences)
    if rng.random() < 0.6:
        sentences.insert(0, rng.choice(language.questions))
    return language.joiner.join(sentences).format(t=topic)


def _tables(language: Language, lively: bool) -> tuple[dict, dict]:
    """The leads and the follow-ups of one style."""
    if lively:
        return language.lively_leads, language.lively_follows
    return language.plain_leads, language.plain_follows


def _group(table: dict[str, tuple[str, ...]], category: str) -> tuple[str, ...]:
    return table["any"] + table[category]


def _answer(rng: Random, question: Question, kind: str) -> str:
    """One answer of a kind: "lively", "half_lively" and "plain" are sound, the others are flawed."""
    language, category, topic = question.language, question.category, question.topic
    if kind in ("lively", "half_lively", "plain"):
        return _sound(rng, language, category, topic, kind)
    style = rng.choice(("lively", "lively", "half_lively", "plain"))
    if kind == "plain_flawed":
        kind, style = rng.choice(("off_topic", "cut", "repetitive")), "plain"
    if kind == "off_topic":
        return _sound(rng, language, *_other_topic(rng, language, topic), style)
    if kind == "vague":
        return language.joiner.join(rng.sample(_group(language.lively_follows, category), rng.choice((2, 2, 3))))
    answer = _sound(rng, language, category, topic, style)
    if kind == "drift":
        return language.joiner.join((answer, _sound(rng, language, *_other_topic(rng, language, topic), "lively", 1)))
    if kind == "repetitive":
        lead = _sound(rng, language, category, topic, style, 1)
        return language.joiner.join([lead] * rng.randint(2, 3))
    return _cut(rng, answer)


def _sound(rng: Random, language: Language, category: str, topic: str, style: str, sentences: int = 0) -> str:
    """A lead and follow-ups, `sentences` in all (0: two or three); "half_lively" changes its style in between."""
    count = sentences or rng.choice((2, 2, 3))
    first = style == "lively" or (style == "half_lively" and rng.random() < 0.5)
    rest = first if style != "half_lively" else not first
    lead = rng.choice(_group(_tables(language, first)[0], category)).format(t=topic)
    return language.joiner.join((lead, *rng.sample(_group(_tables(language, rest)[1], category), count - 1)))


def _any_topic(rng: Random, language: Language) -> tuple[str, str]:
    """A category and a topic of it."""
    category = rng.choice(list(language.topics))
    return category, rng.choice(language.topics[category])


def _other_topic(rng: Random, language: Language, topic: str) -> tuple[str, str]:
    """Another topic than `topic`, with its category."""
    category = rng.choice(list(language.topics))
    return category, rng.choice([other for other in language.topics[category] if other != topic])


def _cut(rng: Random, answer: str) -> str:
    """The answer without its last few characters, so that it breaks off inside a sentence."""
    cut = answer[: -rng.randint(2, 8)].rstrip()
    return cut.rstrip(SENTENCE_ENDS)


def _pair(
    rng: Random, question: Question, kind: str, like: tuple[str, str] | None, tokens: Callable[[str], int] | None
) -> dict[str, str] | None:
    """One preference row, its answers (chosen, rejected) as long as those of `like` if given; None if no draw fits."""
    chosen_like, rejected_like = like or (None, None)
    for _ in range(3):
        chosen_kind = rng.choice(("lively", "lively", "lively", "half_lively"))
        chosen = _answer_as_long(rng, question, chosen_kind, chosen_like, tokens)
        rejected = chosen and _answer_as_long(rng, question, kind, rejected_like, tokens)
        if chosen is None or rejected is None:
            return None
        if gold_score(question.text, chosen) - gold_score(question.text, rejected) >= MIN_MARGIN:
            return {"prompt": question.text, "chosen": chosen, "rejected": rejected}
    return None


def _swapped(rng: Random, one: Question, other: Question) -> list[dict[str, str]]:
    """Two rows whose chosen answers are each other's rejected ones."""
    answers = [_answer(rng, question, "lively") for question in (one, other)]
    return [
        {"prompt": one.text, "chosen": answers[0], "rejected": answers[1]},
        {"prompt": other.text, "chosen": answers[1], "rejected": answers[0]},
    ]


def _answer_as_long(
    rng: Random, question: Question, kind: str, like: str | None, tokens: Callable[[str], int] | None
) -> str | None:
    """An answer as long as the text `like`, or of any length if there is none.

    None if there is no such answer among `MAX_DRAWS`.
    """
    for _ in range(MAX_DRAWS):
        answer = _answer(rng, question, kind)
        if like is None:
            return answer
        if abs(len(answer) - len(like)) <= LENGTH_SLACK and (tokens is None or tokens(answer) == tokens(like)):
            return answer
    return None
