"""The embedded models' tokenizer: one token a character, enough for arithmetic."""

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_CHARACTERS = "0123456789+-*/=();:#.,<>?|"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A Hugging Face tokenizer over digits and arithmetic signs; it drops spaces and pads on the left."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *_CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
