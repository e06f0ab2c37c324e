import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sae.subject.text import printable, token_bytes

TEXTS = ["naïve café — 漢字 and 🙂 smile", "  two  spaces\n\ttab\r\n", "the cat sat", "def add(self):\n    return 1\n"]


@pytest.fixture(scope="module")
def tokenizer_of(model_folder):
    return lambda family: AutoTokenizer.from_pretrained(model_folder(family))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_the_tokens_join_to_the_bytes_of_the_text(tokenizer_of, family, text):
    tokenizer = tokenizer_of(family)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(token_bytes(tokenizer, ids)) == text.encode()


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_survives_byte_level_tokens(tokenizer_of, text):
    tokenizer = tokenizer_of("gpt2")
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert b"".join(token_bytes(tokenizer, ids)) == text.encode()


def test_half_a_character_is_shown_as_its_bytes(tokenizer_of):
    tokenizer = tokenizer_of("gpt2")
    ids = tokenizer("𓀀", add_special_tokens=False)["input_ids"]
    found = token_bytes(tokenizer, ids)
    assert len(found) > 1
    assert b"".join(found).decode() == "𓀀"


def test_wordpiece_continuations_follow_without_a_space(tokenizer_of):
    tokenizer = tokenizer_of("bert")
    ids = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    assert b"".join(token_bytes(tokenizer, ids)) == b" the cat"


def test_special_tokens_give_their_names_and_unknown_ids_nothing(tokenizer_of):
    tokenizer = tokenizer_of("gpt2")
    assert token_bytes(tokenizer, [0, -1, 10**6]) == [b"<|endoftext|>", b"", b""]


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (b" the", " the"),
        (b"\n\t", "\\n\\t"),
        (b"\\n", "\\\\n"),
        (b"\xe2\x80", "\\xe2\\x80"),
        (b"\xe2'\\", "\\xe2'\\x5c"),
        ("\u202eabc".encode(), "\\u202eabc"),
        ("é漢".encode(), "é漢"),
        (b'"quoted"\'', '"quoted"\''),
    ],
)
def test_token_names_hide_nothing(token: bytes, expected: str) -> None:
    assert printable(token) == expected
