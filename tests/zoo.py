"""Tiny random models of many architectures, made from configurations, with batches for them. No dropout, no hub."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, WIDTH, LENGTH, LABELS = 50, 32, 7, 5
Batch = dict[str, Tensor]


class Zoo(NamedTuple):
    """An architecture.

    make: a model. batch: random rows, from their number.
    task: what a loss comes of: classify (rows), tag (positions), next (tokens), decode (tokens of a decoder) or match (pairs).
    targets: what `attach` gets.
    fp32: whether it computes parts in fp32, such as norms, whatever its weights are.
    alone: whether a batch is of one adapter, since some inputs are no batch.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    task: str
    targets: str | tuple[str, ...] = "all-linear"
    fp32: bool = False
    alone: bool = False


def text(rows: int) -> Batch:
    """Tokens, the later rows shorter, padding at the right."""
    lengths = LENGTH - torch.arange(rows) % 3
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    ids = torch.randint(5, VOCABULARY, (rows, LENGTH))
    return {"input_ids": torch.where(mask == 1, ids, 1), "attention_mask": mask}


def padded_left(rows: int) -> Batch:
    """A prompt of each row, the later ones shorter."""
    batch = text(rows)
    return {"input_ids": batch["input_ids"].flip(1), "attention_mask": batch["attention_mask"].flip(1)}


def pairs(rows: int) -> Batch:
    return text(rows) | {"decoder_input_ids": torch.randint(5, VOCABULARY, (rows, LENGTH - 2))}


def pixels(rows: int) -> Batch:
    return {"pixel_values": torch.randn(rows, 3, 16, 16)}


def captions(rows: int) -> Batch:
    return text(rows) | pixels(rows)


def speech(rows: int) -> Batch:
    return {"input_features": torch.randn(rows, 8, 24), "decoder_input_ids": torch.randint(5, VOCABULARY, (rows, LENGTH))}


def waves(rows: int) -> Batch:
    return {"input_values": torch.randn(rows, 200)}


def vectors(rows: int) -> Batch:
    return {"src": torch.randn(rows, LENGTH, WIDTH)}


SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=40,
)  # fmt: skip
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
FEW_HEADS = dict(num_attention_heads=4, num_key_value_heads=2)
TINY_IMAGES = dict(
    hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8,
)  # fmt: skip
EAGER = dict(experts_implementation="eager")  # the other products of experts take no fp64
EXPERTS = EAGER | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


def of(kind: str, task: str, **settings) -> Callable[[], nn.Module]:
    """A function that makes a model of transformers. kind: of configuration. task: what its model's name ends in."""

    def make() -> nn.Module:
        sizes = {name: value for name, value in settings.items() if value is not None}
        return getattr(transformers, kind + task)(getattr(transformers, kind + "Config")(**sizes))

    return make


def bert_like(kind: str, task: str = "ForTokenClassification", **more) -> Callable[[], nn.Module]:
    return of(kind, task, **SIZES, **NO_DROPOUT, initializer_range=0.2, num_labels=LABELS, **more)


def llama_like(kind: str, **more) -> Callable[[], nn.Module]:
    return of(kind, "ForCausalLM", **SIZES | FEW_HEADS | dict(initializer_range=0.2, pad_token_id=1, eos_token_id=2) | more)


def distilbert() -> nn.Module:
    sizes = dict(vocab_size=VOCABULARY, dim=WIDTH, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=40)
    none = dict(dropout=0.0, attention_dropout=0.0, initializer_range=0.2, num_labels=LABELS)
    return of("DistilBert", "ForTokenClassification", **sizes, **none)()


def modernbert() -> nn.Module:
    tokens = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2)
    return of("ModernBert", "ForMaskedLM", **SIZES, **tokens, initializer_range=0.2, global_attn_every_n_layers=2)()


def vit() -> nn.Module:
    return of("ViT", "ForImageClassification", **TINY_IMAGES, **NO_DROPOUT, num_labels=LABELS, initializer_range=0.2)()


def t5() -> nn.Module:
    sizes = dict(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
    return of("T5", "ForConditionalGeneration", **sizes, decoder_start_token_id=0, initializer_factor=1.0)()


def bart() -> nn.Module:
    sizes = dict(vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=1, decoder_layers=1, max_position_embeddings=40)
    sizes |= dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64)
    return of("Bart", "ForConditionalGeneration", **sizes, dropout=0.0, init_std=0.2, forced_eos_token_id=None)()


def gpt2() -> nn.Module:
    sizes = dict(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=40, bos_token_id=0, eos_token_id=2)
    return of("GPT2", "LMHeadModel", **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2)()


def gpt_neox() -> nn.Module:
    return of("GPTNeoX", "ForCausalLM", **SIZES, hidden_dropout=0.0, attention_dropout=0.0, initializer_range=0.2)()


def falcon() -> nn.Module:
    none = dict(hidden_dropout=0.0, attention_dropout=0.0, initializer_range=0.2, bos_token_id=0, eos_token_id=2)
    return of("Falcon", "ForCausalLM", **SIZES, **none)()


def clip() -> nn.Module:
    config = transformers.CLIPConfig(
        text_config=SIZES | dict(bos_token_id=0, eos_token_id=2),
        vision_config=TINY_IMAGES,
        projection_dim=16,
        initializer_factor=5.0,
    )
    return transformers.CLIPModel(config)


def whisper() -> nn.Module:
    sizes = dict(vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=1, decoder_layers=1, num_mel_bins=8)
    sizes |= dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64)
    sizes |= dict(max_source_positions=12, max_target_positions=40, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    return of("Whisper", "ForConditionalGeneration", **sizes, decoder_start_token_id=0, dropout=0.0, init_std=0.2)()


def wav2vec2() -> nn.Module:
    sizes = {name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    sizes |= dict(conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 4), num_conv_pos_embeddings=4)
    sizes |= dict(num_conv_pos_embedding_groups=2, num_labels=LABELS, layerdrop=0.0, apply_spec_augment=False)
    none = dict(hidden_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, activation_dropout=0.0)
    return of("Wav2Vec2", "ForSequenceClassification", **sizes, **none, final_dropout=0.0, initializer_range=0.1)()


def mamba() -> nn.Module:
    sizes = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, state_size=4, time_step_rank=4)
    return of("Mamba", "ForCausalLM", **sizes, initializer_range=0.2)()


def switch() -> nn.Module:
    sizes = dict(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4)
    sizes |= dict(num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, initializer_factor=1.0)
    none = dict(dropout_rate=0.0, router_jitter_noise=0.0)
    return of("SwitchTransformers", "ForConditionalGeneration", **sizes, **none, decoder_start_token_id=0)()


class Encoder(nn.Module):
    """torch's own encoder, with a head."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 64, dropout=0.0, batch_first=True)
        self.encoder, self.classifier = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(WIDTH, LABELS)

    def forward(self, src: Tensor) -> Tensor:
        return self.classifier(self.encoder(src))


def deberta() -> nn.Module:
    relative = dict(relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=8)
    return bert_like("DebertaV2", **relative)()


def qwen2_moe() -> nn.Module:
    return llama_like("Qwen2Moe", shared_expert_intermediate_size=16, **EXPERTS)()


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ZOO = {
    "XLM-R": Zoo(bert_like("XLMRoberta"), text, "tag"),
    "BERT": Zoo(bert_like("Bert", "ForSequenceClassification"), text, "classify"),
    "RoBERTa": Zoo(bert_like("Roberta"), text, "tag"),
    "DistilBERT": Zoo(distilbert, text, "tag"),
    "DeBERTa-v2": Zoo(deberta, text, "tag", ("value_proj", "dense")),
    "DeBERTa-v2, its relative positions too": Zoo(deberta, text, "tag", alone=True),
    "ELECTRA": Zoo(bert_like("Electra", embedding_size=16), text, "tag"),
    "ModernBERT": Zoo(modernbert, text, "tag"),
    "T5": Zoo(t5, pairs, "decode", fp32=True),
    "BART": Zoo(bart, pairs, "decode"),
    "GPT-2": Zoo(gpt2, text, "next"),
    "Llama": Zoo(llama_like("Llama"), text, "next", fp32=True),
    "Qwen2": Zoo(llama_like("Qwen2"), text, "next", fp32=True),
    "Qwen3": Zoo(llama_like("Qwen3", head_dim=8), text, "next", fp32=True),
    "Gemma": Zoo(llama_like("Gemma", head_dim=8), text, "next", fp32=True),
    "Mistral": Zoo(llama_like("Mistral", sliding_window=4), text, "next", fp32=True),
    "Phi-3": Zoo(llama_like("Phi3"), text, "next", fp32=True),
    "GPT-NeoX": Zoo(gpt_neox, text, "next"),
    "Falcon": Zoo(falcon, text, "next"),
    "ViT": Zoo(vit, pixels, "classify"),
    "CLIP": Zoo(clip, captions, "match"),
    "Whisper": Zoo(whisper, speech, "decode"),
    "wav2vec2": Zoo(wav2vec2, waves, "classify"),
    "Mamba": Zoo(mamba, text, "next", fp32=True),
    "Mixtral": Zoo(llama_like("Mixtral", num_local_experts=4, **EAGER), text, "next", fp32=True),
    "Qwen3-MoE": Zoo(llama_like("Qwen3Moe", head_dim=8, **EXPERTS), text, "next", fp32=True),
    "Qwen2-MoE": Zoo(qwen2_moe, text, "next", ATTENTION, fp32=True),
    "Qwen2-MoE, its shared expert too": Zoo(qwen2_moe, text, "next", fp32=True, alone=True),
    "Switch Transformers": Zoo(switch, pairs, "decode", ("q", "k", "v", "o"), fp32=True),
    "Switch Transformers, its linear experts too": Zoo(switch, pairs, "decode", fp32=True, alone=True),
    "nn.TransformerEncoder": Zoo(Encoder, vectors, "tag"),
}


def labels_of(task: str, batch: Batch) -> Tensor | None:
    """Random labels: of rows, of positions, or the tokens themselves; -100 at padding."""
    first = next(iter(batch.values()))
    if task == "match":
        return None
    if task == "classify":
        return torch.randint(LABELS, (len(first),))
    if task == "decode":
        return torch.randint(VOCABULARY, batch["decoder_input_ids"].shape)
    labels = torch.randint(LABELS if task == "tag" else VOCABULARY, first.shape[:2])
    return labels.where(batch["attention_mask"] == 1, -100) if "attention_mask" in batch else labels


def logits_of(task: str, model: nn.Module, batch: Batch) -> Tensor:
    """The model's logits; for pairs the loss of each row."""
    out = model(**batch)
    if task == "match":  # CLIP's own loss compares rows with each other
        return 1 - (out.image_embeds * out.text_embeds).sum(1)
    return out if isinstance(out, Tensor) else out.logits
