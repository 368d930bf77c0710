"""XLM-R by hand, for packed sequences: no padding, no mask; every linear layer can carry one adapter per learner.

Source of the architecture: Conneau et al. 2020, arXiv 1911.02116; the arithmetic follows transformers' XLMRobertaModel. RoBERTa
and BERT are the same but for what `XLMRConfig` says of them.
"""

import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..files import read_json, write_json, write_tensors
from ..kernels import (
    AttentionTiles,
    BatchLists,
    Buckets,
    Dropout,
    Offsets,
    Segments,
    StepDropout,
    adapter_linear,
    add_norm_twice,
    apply_dropout,
    attention_lists,
    embed,
    gelu,
    layer_cpu,
    multi_lora_linear,
    packed_attention,
)
from ..kernels.feed_forward import LoraLinear, multi_lora_feed_forward
from ..kernels.layer_cpu import LayerAdapters, LayerWeights
from ..kernels.lists import positions
from ..kernels.lora_torch import row_linear
from .architecture import MODELS, XLMRConfig, from_config
from .checkpoint import PATTERNS, read_weights
from .convert import from_transformers, to_transformers
from .hub import model_folder


class Bank(Protocol):
    """What the model needs of a bank of adapters, such as `AdapterBank`.

    scaling: fp32 [G].
    ranks_if_mixed: int [G], or None if every adapter has the rank R.
    exact: base products have the same bits whoever shares the batch.
    head: weight [G, C, H] and bias [G, C] of the adapters' tagging heads, or None.
    """

    scaling: Tensor
    ranks_if_mixed: Tensor | None
    exact: bool

    @property
    def head(self) -> tuple[Tensor, Tensor] | None: ...

    def adapters_of(self, layer: int, name: str) -> tuple[Tensor, Tensor] | None:
        """lora_a [G, slices*R, K] and lora_b [G, N, R] of a layer's linear, or None."""
        ...

    def gradients_of(self, layer: int, name: str) -> tuple[Tensor, Tensor] | None:
        """Where backward writes the gradients of `adapters_of`; None: autograd gets them."""
        ...

    def linear(self, layer: int, name: str, x: Tensor, base: nn.Linear, segments: Segments) -> Tensor | None:
        """A layer's whole linear, of a method other than LoRA; None: `adapters_of` says what it is."""
        ...

    def attention(
        self, layer: int, qkv: Tensor, cu_seqlens: Tensor, heads: int, segments: Segments, dropout: Dropout | None
    ) -> Tensor | None:
        """A layer's attention, likewise; None: it is `packed_attention`."""
        ...


LINEARS = ("qkv", "out", "up", "down")  # of a layer


class Layer(nn.Module):
    """One encoder layer: attention and feed-forward, each followed by dropout, residual and LayerNorm."""

    SITES = {"qkv": 0, "attention": 1, "out": 2, "after_attention": 3, "up": 4, "down": 5, "after_feed_forward": 6}

    def __init__(self, config: XLMRConfig, index: int):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.index, self.heads, self.eps = index, config.num_attention_heads, config.layer_norm_eps
        self.qkv = nn.Linear(width, 3 * width, dtype=torch.float32)
        self.out = nn.Linear(width, width, dtype=torch.float32)
        self.norm_1 = nn.LayerNorm(width, config.layer_norm_eps, dtype=torch.float32)
        self.up = nn.Linear(width, inner, dtype=torch.float32)
        self.down = nn.Linear(inner, width, dtype=torch.float32)
        self.norm_2 = nn.LayerNorm(width, config.layer_norm_eps, dtype=torch.float32)

    @property
    def weights(self) -> LayerWeights:
        """The layer's own parameters."""
        linears = tuple((linear.weight, linear.bias) for linear in (self.qkv, self.out, self.up, self.down))
        norms = tuple((norm.weight, norm.bias) for norm in (self.norm_1, self.norm_2))
        return LayerWeights(linears, norms, self.heads, self.eps)

    def _all_adapters(self, bank: Bank) -> LayerAdapters | None:
        """The adapters of all four linears; None where one has none."""
        pairs = [bank.adapters_of(self.index, name) for name in LINEARS]
        places = [bank.gradients_of(self.index, name) for name in LINEARS]
        factors = tuple(factor for pair in pairs if pair is not None for factor in pair)
        into = tuple(place for pair in places if pair is not None for place in pair)
        if len(factors) < 2 * len(LINEARS):
            return None
        return LayerAdapters(factors, bank.scaling, bank.ranks_if_mixed, bank.exact, into or None)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        cu_seqlens: Tensor,
        tiles: Buckets | AttentionTiles | Offsets,
        segments: Segments | None,
        bank: Bank | None,
        dropout: StepDropout | None,
    ) -> tuple[Tensor, Tensor]:
        """x: [T, H]. residual: the same values, for x's second use (`add_norm_twice`). Returns both of the next layer."""
        adapters = None if bank is None else self._all_adapters(bank)
        if adapters is not None and segments is not None:
            call = x, self.weights, adapters, cu_seqlens, segments, dropout
            if layer_cpu.serves(*call):  # what follows as one function
                x = layer_cpu.encoder_layer(*call, self.index)
                return x, x

        def drop(kind: str, site: str) -> Dropout | None:
            return None if dropout is None else dropout.at(kind, len(self.SITES) * self.index + self.SITES[site])

        def adapted(name: str) -> LoraLinear | None:
            if bank is None or segments is None or (adapters := bank.adapters_of(self.index, name)) is None:
                return None
            base, into = getattr(self, name), bank.gradients_of(self.index, name)
            return LoraLinear(base.weight, base.bias, *adapters, drop("lora", name), into)

        def linear(x: Tensor, name: str, slices: int = 1) -> Tensor:
            base = getattr(self, name)
            if bank is None or segments is None:
                return F.linear(x, base.weight, base.bias)
            whole, layer = bank.linear(self.index, name, x, base, segments), adapted(name)
            if whole is not None or layer is None:
                return row_linear(x, base.weight, base.bias, backward=True) if whole is None else whole
            return multi_lora_linear(
                x,
                *layer[:4],
                bank.scaling,
                segments,
                slices=slices,
                ranks=bank.ranks_if_mixed,
                dropout=layer.dropout,
                exact=bank.exact,
                into=layer.into,
            )

        def norm(y: Tensor, residual: Tensor, norm: nn.LayerNorm, site: str) -> tuple[Tensor, Tensor]:
            return add_norm_twice(y, residual, norm.weight, norm.bias, self.eps, dropout=drop("hidden", site))

        qkv, keys = linear(x, "qkv", 3), drop("attention", "attention")
        attended = None
        if bank is not None and segments is not None:
            attended = bank.attention(self.index, qkv, cu_seqlens, self.heads, segments, keys)
        if attended is None:
            attended = packed_attention(qkv, cu_seqlens, self.heads, dropout=keys, lists=tiles)
        x, residual = norm(linear(attended, "out"), residual, self.norm_1, "after_attention")
        up, down = adapted("up"), adapted("down")
        if bank is None or segments is None or up is None or down is None:
            y = linear(gelu(linear(x, "up")), "down")
        else:
            y = multi_lora_feed_forward(x, up, down, bank.scaling, segments, ranks=bank.ranks_if_mixed, exact=bank.exact)
        return norm(y, residual, self.norm_2, "after_feed_forward")


def _embedding(rows: int, width: int) -> nn.Embedding:
    """An embedding without values: nn.Embedding draws them, which on the meta device imports torch's compiler."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width, dtype=torch.float32), freeze=False)


def _check_lengths(cu_seqlens: Tensor, longest: int | None, max_length: int) -> None:
    """Raises ValueError for a sequence longer than `max_length`; on a GPU an assertion stops the device.

    longest: what the host knows, of `BatchLists`.
    """
    if longest is not None:
        if longest > max_length:
            raise ValueError(f"a sequence has {longest} tokens, the model takes {max_length}")
        return
    measured = (cu_seqlens[1:] - cu_seqlens[:-1]).max() if cu_seqlens.numel() > 1 else cu_seqlens.new_zeros(())
    if cu_seqlens.device.type != "cpu":
        torch._assert_async(measured <= max_length, f"a sequence has more tokens than the {max_length} that the model takes")
    elif measured > max_length:
        raise ValueError(f"a sequence has {int(measured)} tokens, the model takes {max_length}")


class XLMRForTokenClassification(nn.Module):
    """XLM-R with a tagging head, over packed sequences.

    vocabulary: int64 [vocab_size], each id's row of the word embeddings, -1 for one that must not occur; None: each has its own.
    """

    vocabulary: Tensor | None

    def __init__(self, config: XLMRConfig, words: int | None = None):
        """The structure; `random` and `from_pretrained` give it weights. words: rows of the word embeddings; None: all."""
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.word_embeddings = _embedding(config.vocab_size if words is None else words, width)
        self.register_buffer("vocabulary", None, persistent=False)
        self.position_embeddings = _embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = _embedding(config.type_vocab_size, width)
        self.embedding_norm = nn.LayerNorm(width, config.layer_norm_eps, dtype=torch.float32)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.classifier = nn.Linear(width, config.num_labels, dtype=torch.float32)

    @property
    def num_sites(self) -> int:
        """Dropout sites of the network, for `StepDropout`: those of the layers, of the embeddings and of the last states."""
        return len(Layer.SITES) * len(self.layers) + 2

    @property
    def num_parameters(self) -> int:
        """Of the whole model, embeddings that are not kept included."""
        absent = self.config.vocab_size - self.word_embeddings.num_embeddings
        return sum(parameter.numel() for parameter in self.parameters()) + absent * self.config.hidden_size

    def encode(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        segments: Segments | None = None,
        bank: Bank | None = None,
        *,
        dropout: StepDropout | None = None,
        lists: BatchLists | None = None,
    ) -> Tensor:
        """Last hidden states [T, H] of packed token ids [T]; arguments and errors as in `forward`."""
        if bank is not None and segments is None:
            raise ValueError("a bank needs segments, which say which adapter each row has")
        _check_lengths(cu_seqlens, None if lists is None else lists.longest, self.config.max_length)
        position = positions(cu_seqlens, input_ids.shape[0]) if lists is None else lists.position
        x = embed(
            input_ids if self.vocabulary is None else self.vocabulary[input_ids],
            position,
            self.word_embeddings.weight,
            self.position_embeddings.weight,
            self.token_type_embeddings.weight[0],
            self.embedding_norm.weight,
            self.embedding_norm.bias,
            self.embedding_norm.eps,
            first_position=self.config.first_position,
            dropout=None if dropout is None else dropout.at("hidden", self.num_sites - 2),
        )
        tiles = attention_lists(cu_seqlens, x) if lists is None else lists.attention
        residual = x
        for layer in self.layers:
            x, residual = layer(x, residual, cu_seqlens, tiles, segments, bank, dropout)
        return apply_dropout(x, None if dropout is None else dropout.at("hidden", self.num_sites - 1))

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        segments: Segments | None = None,
        bank: Bank | None = None,
        *,
        dropout: StepDropout | None = None,
        lists: BatchLists | None = None,
    ) -> Tensor:
        """Label logits of packed tokens.

        input_ids: int [T].
        cu_seqlens: int32 [S+1].
        segments: which adapter each sequence has.
        bank: the adapters and their heads. Sequences without an adapter get the model's own head, as all do without a bank.
        dropout: the step's keys; None evaluates.
        lists: `batch_lists` of the same sequences, if already computed; segments are then its own.
        Returns [T, num_labels] in the model's dtype; rows behind the last sequence hold nothing of use.
        Raises ValueError for a sequence longer than the model's positions, and for a bank without segments.
        """
        segments = segments if lists is None else lists.segments
        x = self.encode(input_ids, cu_seqlens, segments, bank, dropout=dropout, lists=lists)
        if bank is None or segments is None or bank.head is None:
            return self.classifier(x)
        logits = adapter_linear(x, *bank.head, segments)
        covered = segments.runs and segments.runs[-1][2] == x.shape[0]
        if covered or (lists is not None and lists.all_adapted):  # the host knows that every sequence has an adapter
            return logits
        adapted = F.pad(segments.row_adapter >= 0, (0, x.shape[0] - segments.row_adapter.numel()))
        return torch.where(adapted[:, None], logits, self.classifier(x))

    def freeze_backbone(self) -> "XLMRForTokenClassification":
        """Stop all gradients of parameters. Returns the model."""
        return self.requires_grad_(False)

    @torch.no_grad()
    def draw_head_(self, seed: int) -> None:
        """Draw the tagging head anew: normal weights, zero biases. The numbers depend on the seed alone, not on the device."""
        weight, generator = self.classifier.weight, torch.Generator().manual_seed(seed)
        weight.copy_(
            torch.empty(weight.shape, dtype=torch.float32).normal_(0, self.config.initializer_range, generator=generator)
        )
        self.classifier.bias.zero_()

    @classmethod
    def random(cls, config: XLMRConfig, seed: int = 0, words: int | None = None) -> "XLMRForTokenClassification":
        """A model with XLM-R's initialisation: normal weights of deviation `initializer_range`, zero biases.

        words: as the constructor's.
        """
        with torch.device("meta"):
            model = cls(config, words)
        model.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                if name.endswith("bias"):
                    parameter.zero_()
                elif "norm" in name:
                    parameter.fill_(1)
                else:
                    parameter.normal_(0, config.initializer_range, generator=generator)
        return model

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        num_labels: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        words: Tensor | None = None,
    ) -> "XLMRForTokenClassification":
        """A checkpoint of transformers, of an XLM-R, RoBERTa or BERT, from a local folder or by its hub name.

        num_labels: width of the head; None takes the checkpoint's, 2 if it has none. A head of another width is replaced by a
            new one.
        dtype: of the parameters; the weights must be finite in it.
        words: int64, different ids; only these have embeddings, and no other may occur. Such a model is not saved. Ids beyond the
            checkpoint's vocabulary are left out. None: all.
        Raises UserError for a checkpoint that is missing or damaged, whose config.json says what kloss does not compute
        (`from_config`), or whose tensors are not those that it says. Which files count: `read_weights`.
        """
        name = str(name)
        folder = model_folder(name, "backbone", PATTERNS)
        if not (folder / "config.json").is_file():
            raise UserError(f"{name} has no config.json; a backbone is a folder in transformers' format or a hub name")
        config = from_config(read_json(folder / "config.json"), name)
        if num_labels is not None:
            config = replace(config, num_labels=num_labels)
        state = from_transformers(read_weights(folder), config, dtype, name)
        head = state.get("classifier.weight")
        if head is not None and num_labels in (None, len(head)):
            config = replace(config, num_labels=len(head))
        elif head is not None:
            warnings.warn(f"{name} has a head of {len(head)} labels, not {num_labels}: a new head is drawn", stacklevel=2)
            head = None
        words = None if words is None else words[words < config.vocab_size]
        model = cls.random(config, words=None if words is None else len(words))
        if head is None:
            state |= {f"classifier.{kind}": getattr(model.classifier, kind) for kind in ("weight", "bias")}
        if words is not None:
            state["word_embeddings.weight"] = state["word_embeddings.weight"][words]
            model.vocabulary = torch.full((config.vocab_size,), -1).index_copy(0, words, torch.arange(len(words)))
        model.load_state_dict(state)
        return model.to(device=device, dtype=dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, which transformers' class for token classification loads.

        Raises ValueError for a model that has not kept all embeddings.
        """
        if self.vocabulary is not None:
            raise ValueError(f"the model has kept {self.word_embeddings.num_embeddings} of {self.config.vocab_size} embeddings")
        config = {key.name: getattr(self.config, key.name) for key in fields(XLMRConfig)}
        labels = {str(i): f"LABEL_{i}" for i in range(config.pop("num_labels"))}
        config |= {
            "architectures": [MODELS[self.config.model_type][1]],
            "hidden_act": "gelu",
            "id2label": labels,
            "label2id": {v: int(k) for k, v in labels.items()},
        }
        if self.config.model_type != "bert":
            config |= {"bos_token_id": 0, "eos_token_id": 2}
        tensors = to_transformers(self.state_dict(), self.config.num_hidden_layers, self.config.prefix)
        write_tensors(Path(folder) / "model.safetensors", tensors, {"format": "pt"})
        write_json(Path(folder) / "config.json", config)
