"""The fast tokenizer against sentencepiece itself, on models trained here that have what Baichuan's have."""

import random

import pytest
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import normalizers
from tokenizers.models import BPE
from transformers import AutoTokenizer

from scripts.baichuan.bpe import check_tokenizer, fast_tokenizer, merges_by_score, read_sentencepiece
from tests.baichuan import shuffle_ids, train_sentencepiece
from utils.console import InputError

MODELS = {
    "Baichuan-7B": train_sentencepiece("nmt_nfkc", prefix=True),
    "Baichuan2-7B": shuffle_ids(train_sentencepiece("identity", prefix=False)),
    "spaces squeezed": train_sentencepiece("nmt_nfkc", prefix=True, remove_extra=True),
    "no symbols": train_sentencepiece("nmt_nfkc", prefix=False, user_defined_symbols=[]),
}
ATOMS = [
    *["你好", "苹果", "很好吃", "，", "。", "！", "？", "：", "“引用”", "…", "……", "不常见：龘", "𠮷", "\u3000"],
    *["the cat", " sat", "Paris", "didn't", "What is", "a", "é", "ﬁ", "Ａ", "①", "½", "Straße", "한국어", "العربية"],
    *["0", "7", "2023", "３", "１００％", "3.14", "-1e-5"],
    *["👍", "👍🏽", "👩‍👧", "🇨🇳", "❤️", "1️⃣", "½\u200d", "\u00a0\ufe0f"],
    *[" ", "  ", "       ", "\u00a0", "▁", "\t", "\t\t", "\n", "\n\n", "\n\n\n", "\r", "\r\n"],
    *["\x00", "\x01", "\x07", "\x1b", "\x7f", "\u200b", "\u200d", "\ufeff", "\ufffd", "\u2028"],
    *["<reserved_1>", "<reserved_10>", "<reserved_2>", "<0x41>", "问：", "答："],
]


def make_texts(count=1400):
    """Varied strings, the same in each run: the template with something in it, and mixtures of ATOMS of any length."""
    rng = random.Random(0)
    mixed = ["".join(rng.choices(ATOMS, k=rng.randrange(30))) for _ in range(count)]
    mixed[::3] = [f"问：{text}\n\n答：" for text in mixed[::3]]
    return [*ATOMS, "\u0301 starts with an accent", *mixed]


TEXTS = make_texts()


@pytest.fixture(scope="module", params=MODELS)
def models(request, tmp_path_factory):
    """(sentencepiece's own, the fast one as AutoTokenizer loads it, the fast one's source)."""
    folder = tmp_path_factory.mktemp("tokenizer")
    content = MODELS[request.param]
    (folder / "tokenizer.model").write_bytes(content)
    proto, _ = read_sentencepiece(str(folder / "tokenizer.model"))
    fast_tokenizer(proto).save_pretrained(folder / "fast")
    return SentencePieceProcessor(model_proto=content), AutoTokenizer.from_pretrained(folder / "fast"), proto


def test_the_strings_are_varied():
    assert len(set(TEXTS)) > 1000
    assert "问：…\n\n答：" in {f"问：{text}\n\n答：" for text in ATOMS}


def test_ids_are_those_of_sentencepiece(models):
    original, fast, _ = models
    wrong = [text for text in TEXTS if fast(text)["input_ids"] != original.encode(text)]
    assert not wrong, f"{len(wrong)} of {len(TEXTS)}, such as {wrong[0]!r}"


def test_decoding_gives_the_text_that_sentencepiece_gives(models):
    original, fast, _ = models
    for text in TEXTS:
        ids = original.encode(text)
        assert fast.decode(ids) == original.decode(ids), repr(text)


def test_a_batch_with_padding(models):
    """Padding is <unk>, not EOS, and changes no ids."""
    original, fast, _ = models
    batch = fast(["你好", "What is the capital of France?"], padding=True)
    assert (fast.pad_token_id, fast.eos_token_id) == (0, 2)
    lengths = [sum(mask) for mask in batch["attention_mask"]]
    assert batch["input_ids"][0][: lengths[0]] == original.encode("你好")
    assert set(batch["input_ids"][0][lengths[0] :]) == {0}


def test_special_tokens_are_ids_and_none_is_added(models):
    """As Baichuan's own class reads them, which cuts the text there; bare sentencepiece takes them for plain text."""
    original, fast, _ = models
    assert (fast.unk_token_id, fast.bos_token_id, fast.eos_token_id) == (0, 1, 2)
    assert fast("<s>你好</s>很好<unk>")["input_ids"] == [1, *original.encode("你好"), 2, *original.encode("很好"), 0]
    ids = [1, *original.encode("你好 Paris"), 2]
    assert fast.decode(ids, skip_special_tokens=True) == original.decode(ids)


def test_the_whole_vocabulary(models):
    original, fast, proto = models
    assert len(fast) == original.get_piece_size()
    assert check_tokenizer(fast, proto, original) == 0


def test_merges_go_by_score_and_not_by_id():
    """Baichuan2's ids are not in the order of its scores: the Llama tokenizer of transformers merges by id.

    Hand-made: "ab" is the later piece and has the better score, so "abc" is ab+c, not a+bc.
    """
    proto = sentencepiece_model_pb2.ModelProto()
    for piece, score in (("a", -9.0), ("b", -9.0), ("c", -9.0), ("bc", -2.0), ("ab", -1.0), ("abc", -3.0)):
        proto.pieces.add(piece=piece, score=score)
    assert merges_by_score(proto) == [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")]


# ---- The converter's own check ----


def break_normaliser(core):
    core.normalizer = normalizers.Replace(" ", "▁")


def break_merges(core):
    core.model = BPE(core.get_vocab(), [], unk_token="<unk>", byte_fallback=True)


def break_decoder(core):
    core.decoder = None


@pytest.mark.parametrize(
    ("change", "message"),
    [(break_normaliser, "gives"), (break_merges, "gives"), (break_decoder, "decodes")],
)
def test_the_check_sees_a_wrong_tokenizer(tmp_path, change, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(MODELS["Baichuan-7B"])
    proto, original = read_sentencepiece(str(path))
    fast = fast_tokenizer(proto)
    change(fast.backend_tokenizer)
    with pytest.raises(InputError, match=f"the fast tokenizer {message} .*cannot be converted"):
        check_tokenizer(fast, proto, original)


def test_the_check_counts_what_differs_in_rare_texts_only(tmp_path):
    """Here a merge is lost that none of the probes needs: the whole vocabulary as a text does."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(MODELS["Baichuan-7B"])
    proto, original = read_sentencepiece(str(path))
    fast = fast_tokenizer(proto)
    core = fast.backend_tokenizer
    merges = [pair for pair in merges_by_score(proto) if "".join(pair) != "▁dog"]
    assert len(merges) < len(merges_by_score(proto))
    core.model = BPE(core.get_vocab(), merges, unk_token="<unk>", byte_fallback=True)
    assert check_tokenizer(fast, proto, original) == 1
