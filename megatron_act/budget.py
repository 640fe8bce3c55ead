"""Parameters and matmul FLOPs of a dense GPT as Megatron-Core builds it: exact counts from its shape alone.

Pure functions: no torch, no Megatron. With hidden size h, query size q = heads * head_dim, key/value size
k = groups * head_dim, MLP width F, L layers and padded vocabulary V, the weights that take part in matmuls are

    attention   L * (h * (q + 2k) + q * h)        linear_qkv, linear_proj
    MLP         L * m * h * F                     m = 3 with a gate (linear_fc1 is h x 2F), 2 without
    logits      h * V                             also when the output layer is tied to the embedding

FLOPs: one multiply-add is 2, the backward pass is twice the forward (gradients of inputs and of weights). Attention
scores and their product with the values cost 4 * S * q per token over the full S x S square, of which a causal kernel
needs half. Two conventions are in use, so both are given: ``causal`` (half; what Megatron logs as its throughput) and
``full`` (what `torch.utils.flop_counter` counts).
"""

from dataclasses import dataclass

from megatron_act.errors import UserError

GATED = ("swiglu", "geglu")
NORMALIZATIONS = {"RMSNorm": 1, "LayerNorm": 2}  # vectors per norm: LayerNorm has a bias
BACKWARD_PASSES = 2  # matmuls of a backward pass per one of the forward's: gradients of the input and of the weight


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What decides the size and cost of a dense GPT; sizes are counts of features, heads, layers or tokens.

    Attributes:
        vocab_size: rows of the embedding as built, i.e. after Megatron's padding; 0 leaves embeddings and logits out.
        num_query_groups: key/value heads; None means one per attention head.
        kv_channels: features per head; None means hidden_size / num_attention_heads.
        activation_scalars: trainable scalars per layer (xielu 2, crrelu 1, relu2 0, ...).
        bias: biases in all linear layers; ``qkv_bias`` alone adds them to linear_qkv only.
        learned_positions: rows of a learned position embedding, 0 for RoPE.

    Raises:
        UserError: a size that cannot be built.
    """

    hidden_size: int
    num_layers: int
    num_attention_heads: int
    ffn_hidden_size: int
    activation: str
    activation_scalars: int = 0
    vocab_size: int = 0
    seq_length: int = 4096
    num_query_groups: int | None = None
    kv_channels: int | None = None
    tied_embeddings: bool = True
    qk_layernorm: bool = False
    normalization: str = "RMSNorm"
    bias: bool = False
    qkv_bias: bool = False
    learned_positions: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size", "seq_length"):
            _at_least(name, getattr(self, name), 1)
        for name in ("activation_scalars", "vocab_size", "learned_positions"):
            _at_least(name, getattr(self, name), 0)
        if self.normalization not in NORMALIZATIONS:
            raise UserError(f"--normalization: expected one of {', '.join(NORMALIZATIONS)}, got {self.normalization!r}")
        if self.kv_channels is None:
            _divides("num_attention_heads", self.num_attention_heads, "hidden_size", self.hidden_size)
        _at_least("kv_channels", self.head_dim, 1)
        _at_least("num_query_groups", self.groups, 1)
        _divides("num_query_groups", self.groups, "num_attention_heads", self.num_attention_heads)

    @property
    def gated(self) -> bool:
        """Whether the MLP has a third matrix, the gate."""
        return self.activation in GATED

    @property
    def mlp_matrices(self) -> int:
        """How many hidden_size x ffn_hidden_size matrices an MLP holds: 3 with a gate, 2 without."""
        return 3 if self.gated else 2

    @property
    def groups(self) -> int:
        """Key/value heads."""
        return self.num_attention_heads if self.num_query_groups is None else self.num_query_groups

    @property
    def head_dim(self) -> int:
        """Features per head."""
        return self.hidden_size // self.num_attention_heads if self.kv_channels is None else self.kv_channels

    @property
    def query_size(self) -> int:
        """Features of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Output features of linear_qkv: queries, keys and values."""
        return self.query_size + 2 * self.groups * self.head_dim


@dataclass(frozen=True)
class Parameters:
    """Parameters of the whole model by kind; ``output_layer`` is 0 when it is tied to the embedding."""

    word_embeddings: int
    position_embeddings: int
    output_layer: int
    attention: int
    mlp: int
    biases: int
    norms: int
    activation_scalars: int
    logits_weight: int  # the matrix behind the logits, tied or not; counted above already, so not in the total

    @property
    def without_embeddings(self) -> int:
        """All parameters but the word and position embeddings and the output layer."""
        return self.attention + self.mlp + self.biases + self.norms + self.activation_scalars

    @property
    def total(self) -> int:
        """All trainable parameters; a tied matrix counts once."""
        return self.without_embeddings + self.word_embeddings + self.position_embeddings + self.output_layer

    @property
    def matmul(self) -> int:
        """Weights that take part in a matmul of every token: attention, MLP and logits (tied or not)."""
        return self.attention + self.mlp + self.logits_weight


@dataclass(frozen=True)
class Flops:
    """Matmul FLOPs per token of one forward pass; ``attention_scores`` over the full square of the sequence."""

    attention_projections: int
    attention_scores: int
    mlp: int
    logits: int

    def forward(self, *, causal: bool = True) -> int:
        """FLOPs per token of a forward pass; ``causal`` counts half of the attention square, as Megatron does."""
        scores = self.attention_scores // 2 if causal else self.attention_scores
        return self.attention_projections + scores + self.mlp + self.logits

    def training(self, *, causal: bool = True) -> int:
        """FLOPs per token of a forward and a backward pass without recomputation: three times the forward's."""
        return (1 + BACKWARD_PASSES) * self.forward(causal=causal)


def parameters(shape: Shape) -> Parameters:
    """Counts the trainable parameters of a model of this shape, as ``sum(p.numel() for p in model.parameters())``."""
    embedding = shape.vocab_size * shape.hidden_size
    return Parameters(
        word_embeddings=embedding,
        position_embeddings=shape.learned_positions * shape.hidden_size,
        output_layer=0 if shape.tied_embeddings else embedding,
        attention=shape.num_layers * (shape.qkv_size + shape.query_size) * shape.hidden_size,
        mlp=shape.num_layers * shape.mlp_matrices * shape.hidden_size * shape.ffn_hidden_size,
        biases=shape.num_layers * _layer_biases(shape),
        norms=_norms(shape),
        activation_scalars=shape.num_layers * shape.activation_scalars,
        logits_weight=embedding,
    )


def flops(shape: Shape) -> Flops:
    """Counts the matmul FLOPs per token of one forward pass over a sequence of ``shape.seq_length`` tokens."""
    weights = parameters(shape)
    return Flops(
        attention_projections=2 * weights.attention,
        attention_scores=4 * shape.num_layers * shape.seq_length * shape.query_size,
        mlp=2 * weights.mlp,
        logits=2 * weights.logits_weight,
    )


def padded_vocab_size(vocab_size: int, divisible_by: int = 128, tensor_parallel: int = 1) -> int:
    """The vocabulary that Megatron builds: the next multiple of ``divisible_by * tensor_parallel``."""
    _at_least("vocab_size", vocab_size, 0)
    _at_least("make_vocab_size_divisible_by", divisible_by, 1)
    _at_least("tensor_model_parallel_size", tensor_parallel, 1)
    multiple = divisible_by * tensor_parallel
    return -(-vocab_size // multiple) * multiple


def _layer_biases(shape: Shape) -> int:
    qkv = shape.qkv_size if shape.bias or shape.qkv_bias else 0
    if not shape.bias:
        return qkv
    fc1 = shape.ffn_hidden_size * (shape.mlp_matrices - 1)
    return qkv + fc1 + 2 * shape.hidden_size  # linear_proj and linear_fc2 write hidden_size features each


def _norms(shape: Shape) -> int:
    vectors = NORMALIZATIONS[shape.normalization]
    per_head = 2 * shape.head_dim if shape.qk_layernorm else 0  # one for queries, one for keys, shared by all heads
    return vectors * (shape.num_layers * (2 * shape.hidden_size + per_head) + shape.hidden_size)


def _at_least(name: str, value: object, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise UserError(f"--{name.replace('_', '-')}: expected an integer of at least {minimum}, got {value!r}")


def _divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    if value % divisor:
        flag, other = (text.replace("_", "-") for text in (name, divisor_name))
        raise UserError(f"--{flag}: expected a multiple of --{other} {divisor}, got {value}: change one of the two")
