"""Sizes of an encoder, and which config.json of transformers says an encoder that kloss computes."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import UserError

# model_type -> transformers' prefix of the encoder's tensors, and its class with a tagging head.
MODELS = {
    "xlm-roberta": ("roberta.", "XLMRobertaForTokenClassification"),
    "roberta": ("roberta.", "RobertaForTokenClassification"),
    "bert": ("bert.", "BertForTokenClassification"),
}
# What transformers takes where a config.json leaves a size out; RoBERTa and BERT differ from XLM-R in one each.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 30_522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
    "pad_token_id": 1,
}
DEFAULTS_OF: dict[str, dict[str, int]] = {"xlm-roberta": {}, "roberta": {"vocab_size": 50_265}, "bert": {"pad_token_id": 0}}
# Fields that change the function, with the value that kloss computes, which is also what a missing field means.
# The last five are no fields of the three classes today: older versions, other libraries and all models have them.
COMPUTED: dict[str, object] = {
    "hidden_act": "gelu",
    "is_decoder": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "per_layer_config": None,
    "position_embedding_type": "absolute",
    "pruned_heads": {},
    "embedding_size": None,
    "quantization_config": None,
    "auto_map": None,
}
# Fields that leave the last hidden states of an encoder in evaluation as they are, whatever their value. Dropout is here:
# a learner's settings decide it.
HARMLESS = frozenset({
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "use_cache", "tie_word_embeddings",
    "bos_token_id", "eos_token_id", "chunk_size_feed_forward", "output_hidden_states", "output_attentions", "return_dict",
    "tie_last_hidden_states", "num_labels", "id2label", "label2id", "problem_type", "dtype", "torch_dtype", "architectures",
    "model_type", "transformers_version", "name_or_path", "_name_or_path",
})  # fmt: skip
LARGEST = 1000.0  # epsilon and deviation of the initial weights, which are finite so in fp16
FROM_ZERO = ("layer_norm_eps", "initializer_range", "pad_token_id")


@dataclass(frozen=True)
class XLMRConfig:
    """Sizes of an encoder of XLM-R's kind; the defaults are XLM-R base's. Names are those of transformers' config.json.

    model_type: a key of `MODELS`. RoBERTa and XLM-R count positions from pad_token_id + 1, BERT from 0.
    Raises UserError for a value of another type or out of range.
    """

    vocab_size: int = 250_002
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 514
    type_vocab_size: int = 1
    num_labels: int = 2
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    pad_token_id: int = 1
    model_type: str = "xlm-roberta"

    def __post_init__(self) -> None:
        if self.model_type not in MODELS:
            raise UserError(f"model_type must be one of {', '.join(MODELS)}, got {self.model_type!r}")
        for field in fields(self)[:-1]:
            value, least = getattr(self, field.name), 0 if field.name in FROM_ZERO else 1
            if type(value) not in ((int, float) if isinstance(field.default, float) else (int,)):
                raise UserError(f"{field.name} must be a number like {field.default}, got {repr(value)[:200]}")
            if not value >= least or isinstance(field.default, float) and value > LARGEST:
                limit = f" and at most {LARGEST:g}" if isinstance(field.default, float) else ""
                raise UserError(f"{field.name} must be at least {least}{limit}, got {repr(value)[:200]}")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(f"hidden size {self.hidden_size} does not divide into {self.num_attention_heads} heads")
        if self.max_length < 1:
            counted = f"{self.max_position_embeddings} of max_position_embeddings, counted from {self.first_position}"
            raise UserError(f"no position is left for a token: {counted}")

    @property
    def first_position(self) -> int:
        """The position of a sequence's first token."""
        return 0 if self.model_type == "bert" else self.pad_token_id + 1

    @property
    def max_length(self) -> int:
        """The most tokens that a sequence may have."""
        return self.max_position_embeddings - self.first_position

    @property
    def prefix(self) -> str:
        """What the names of the encoder's tensors start with in transformers' files."""
        return MODELS[self.model_type][0]


BASE = XLMRConfig()
TINY = XLMRConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512)


def from_config(stored: Mapping[str, Any], source: str) -> XLMRConfig:
    """The sizes that a config.json of transformers says. A size that it leaves out is transformers' default for its model_type.

    source: the checkpoint's name, for messages.
    Raises UserError, with the field's name and value, for another model and for a field of `COMPUTED` with a value that kloss
    does not compute. Fields that no table here knows are left aside, as transformers does.
    """
    kind = stored.get("model_type")
    if not isinstance(kind, str) or kind not in MODELS:
        raise UserError(f"{source} holds a {repr(kind)[:200]} model; kloss loads {', '.join(MODELS)}")
    for key, value in COMPUTED.items():
        given = stored.get(key, value)
        if given != value and not (key == "embedding_size" and given == stored.get("hidden_size")):
            raise UserError(f"{source}: {key} is {repr(given)[:200]}, only {value!r} is supported")
    sizes = {key: stored.get(key, value) for key, value in (DEFAULTS | DEFAULTS_OF[kind]).items()}
    if kind == "bert" and sizes["pad_token_id"] is None:
        sizes["pad_token_id"] = 0  # BERT's positions do without it
    try:
        return XLMRConfig(model_type=kind, **sizes)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
