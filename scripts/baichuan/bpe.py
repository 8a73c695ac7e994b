"""A sentencepiece BPE model as a fast tokenizer with the same ids.

transformers' Llama tokenizer does not give them: it orders merges by piece id instead of by score, knows no normaliser,
and lets the pieces that the model's owner reserved ("user-defined symbols") merge with their neighbours.  Here each step
of sentencepiece has its counterpart in the tokenizers library:

1. user-defined symbols that the normaliser would change are hidden from it behind a private character each;
2. the model's own normaliser (a table from characters to texts), the space mark in front of the text, and instead of
   spaces;
3. symbols of several characters become one private character each, under which the vocabulary knows them; the decoder
   writes them out again;
4. BPE with merges in the order of the scores, among normal pieces alone.

Where it can still differ, for a model with a normaliser: combining marks that stand as characters of their own (an e
and its accent as two), because the tokenizers library looks the two up as one.  For every model: the literal special
tokens <s>, </s>, <unk> in a text, which become their ids, as in Baichuan's own tokenizer class; the private characters
of steps 1 and 3; and decoding bytes that are no whole character.  The names of the symbols of step 3 are these private
characters: convert_tokens_to_ids does not know "<reserved_106>", though its text is encoded and decoded as ever.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from utils.console import InputError, one_line

SPACE = "▁"  # sentencepiece's mark for a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # piece types of sentencepiece_model.proto
BPE = 2  # TrainerSpec.ModelType
# They join the character before them to one in the eyes of the tokenizers library, which would then look both up as one.
JOINERS = ("\u200c", "\u200d", "\u20e3", "\ufe0e", "\ufe0f")
INSTALL = "pip install -r requirements-baichuan.txt"


def read_sentencepiece(path: str) -> tuple[Any, Any]:
    """The model at `path` as (its ModelProto, a SentencePieceProcessor that runs it).

    Raises InputError when sentencepiece is not installed, or the file is no BPE model with byte fallback.
    """
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    except ImportError as error:
        raise InputError(f"sentencepiece, which reads {path}, is not installed; {INSTALL}") from error
    try:
        with open(path, "rb") as file:
            content = file.read()
        proto = sentencepiece_model_pb2.ModelProto.FromString(content)
        processor = SentencePieceProcessor(model_proto=content)
    except (OSError, DecodeError, RuntimeError) as error:
        raise InputError(f"cannot read the tokenizer {path}: {one_line(error)}; download it again") from error
    types = {piece.type for piece in proto.pieces}
    if proto.trainer_spec.model_type != BPE or not {UNKNOWN, BYTE} <= types or UNUSED in types:
        raise InputError(f"{path} is no BPE model with byte fallback, as Baichuan's are; give a Baichuan folder")
    if proto.trainer_spec.treat_whitespace_as_suffix or not proto.normalizer_spec.escape_whitespaces:
        raise InputError(f"{path} treats spaces in another way than Baichuan's tokenizers; give a Baichuan folder")
    return proto, processor


def private_characters(proto: Any) -> Iterator[str]:
    """Private-use characters that no piece has in it: some models hold pieces made of them."""
    taken = set().union(*(piece.piece for piece in proto.pieces))
    return (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in taken)


def merges_by_score(proto: Any) -> list[tuple[str, str]]:
    """Every way to put a piece together from two, best score first, which is the order that sentencepiece merges in.

    Only normal pieces: the other kinds never merge, nor are they made by merging.
    """
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    merges = []
    for whole in sorted(scores, key=scores.__getitem__, reverse=True):
        halves = ((whole[:end], whole[end:]) for end in range(1, len(whole)))
        merges += [(left, right) for left, right in halves if left in scores and right in scores]
    return merges


def build_normalizer(
    spec: Any, symbols: Sequence[str], aliases: dict[str, str], private: Iterator[str]
) -> normalizers.Normalizer:
    """Steps 1 to 3 of the module's docstring.  `symbols` and `aliases` (symbol -> character) are longest first."""
    steps: list[normalizers.Normalizer] = []
    prefix = next(private)
    if spec.add_dummy_prefix and not spec.remove_extra_whitespaces:
        steps.append(normalizers.Prepend(prefix))  # first: a text of which the table leaves nothing has it, too
    if spec.precompiled_charsmap:
        table = normalizers.Precompiled(spec.precompiled_charsmap)
        changed = [symbol for symbol in symbols if table.normalize_str(symbol) != symbol]
        joiners = [joiner for joiner in JOINERS if table.normalize_str(joiner) == joiner and joiner not in symbols]
        hidden = {text: next(private) for text in changed + joiners}
        steps += [normalizers.Replace(text, character) for text, character in hidden.items()]
        if table.normalize_str("\r") == table.normalize_str("\n"):
            # The two look like one character to `table`, which would give one space for them instead of two.
            steps.append(normalizers.Replace("\r\n", "\n\n"))
        steps.append(table)
        steps += [normalizers.Replace(character, text) for text, character in hidden.items()]
    if spec.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(" +"), " "),
            normalizers.Replace(Regex(rf"\A |[ {SPACE}]+\z"), ""),  # Strip() would take line breaks as well
        ]
        if spec.add_dummy_prefix:
            steps.append(normalizers.Prepend(prefix))
    steps += [normalizers.Replace(prefix, SPACE), normalizers.Replace(" ", SPACE)]
    steps += [normalizers.Replace(symbol, character) for symbol, character in aliases.items()]
    return normalizers.Sequence(steps)


def build_decoder(spec: Any, aliases: dict[str, str]) -> decoders.Decoder:
    """Pieces to text: spaces for their marks, bytes to characters, aliased symbols, and no space from the prefix."""
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Replace(character, symbol.replace(SPACE, " ")) for symbol, character in aliases.items()]
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", left=1, right=0))
    return decoders.Sequence(steps)


def fast_tokenizer(proto: Any) -> PreTrainedTokenizerFast:
    """Fast tokenizer with the ids of the model; it pads with <unk>, adds nothing to a text, and needs no code of ours."""
    pieces = [(piece.piece, piece.type) for piece in proto.pieces]
    symbols = sorted((text for text, kind in pieces if kind == USER_DEFINED), key=len, reverse=True)
    private = private_characters(proto)
    aliases = {symbol: next(private) for symbol in symbols if len(symbol) > 1}
    (unknown,) = (text for text, kind in pieces if kind == UNKNOWN)

    vocabulary = {aliases.get(text, text): number for number, (text, _) in enumerate(pieces)}
    core = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges_by_score(proto), unk_token=unknown, byte_fallback=True, fuse_unk=True
        )
    )
    core.normalizer = build_normalizer(proto.normalizer_spec, symbols, aliases, private)
    core.decoder = build_decoder(proto.normalizer_spec, aliases)
    special = [text for text, kind in pieces if kind in (UNKNOWN, CONTROL)]
    core.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token=unknown,
        bos_token=proto.trainer_spec.bos_piece,
        eos_token=proto.trainer_spec.eos_piece,
        pad_token=unknown,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Check
# ---------------------------------------------------------------------------------------------------------------------

GROUP = 100  # pieces to a text: one by one, a large vocabulary takes minutes
PROBES = (
    "问：苹果好吃吗？\n\n答：",
    "问：…\n\n答：3.14，１２３％ “引号”",
    " 你好  世界\t\t再见 \n",
    "What's the capital of France?  Paris, in 1789!",
    "def f(x):\n    return x ** 2\n",
    "👩‍👧 한국어 ñandú ǅ \x07 𠮷",
    "",
    " ",
)


def check_tokenizer(fast: PreTrainedTokenizerBase, proto: Any, processor: Any) -> int:
    """Compare with sentencepiece: ids and decoded text of PROBES and of all symbols, and of the whole vocabulary.

    Returns how many texts of GROUP pieces in a row get other ids.  Raises InputError when anything else differs.
    """
    symbols = [piece.piece.replace(SPACE, " ") for piece in proto.pieces if piece.type == USER_DEFINED]
    probes = [*PROBES, "".join(symbols), "a".join(symbols)]
    for text in probes:
        expected = processor.encode(text)
        found = fast(text, add_special_tokens=False)["input_ids"]
        if found != expected:
            raise InputError(
                f"the fast tokenizer gives {found[:12]} for {text[:40]!r}, sentencepiece {expected[:12]}; "
                "this tokenizer.model cannot be converted"
            )
    plain = [i for i, piece in enumerate(proto.pieces) if piece.type in (NORMAL, USER_DEFINED)]
    groups = [plain[start : start + GROUP] for start in range(0, len(plain), GROUP)]
    for ids in groups + [processor.encode(text) for text in probes]:
        expected = processor.decode(ids)
        found = fast.decode(ids)
        if found != expected:
            raise InputError(
                f"the fast tokenizer decodes {ids[:12]} to {found[:40]!r}, sentencepiece to {expected[:40]!r}; "
                "this tokenizer.model cannot be converted"
            )
    texts = [processor.decode(ids) for ids in groups]
    return sum(fast(text, add_special_tokens=False)["input_ids"] != processor.encode(text) for text in texts)
