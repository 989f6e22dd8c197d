"""What a Transformer is made of, as plain dataclasses. Zero means "derive it" where a comment says so."""

from dataclasses import dataclass, field


@dataclass
class NormConfig:
    kind: str = "rms"  # rms | layer | none
    epsilon: float = 1e-6
    bias: bool = False  # layer only
    plus_one: bool = False  # Gemma: the gain is 1 + w


@dataclass
class RopeConfig:
    theta: float = 10_000.0
    local_theta: float = 0.0  # theta of "local" layers (Gemma 3); 0: theta
    fraction: float = 1.0  # leading share of each head that is rotated (NeoX)
    scaling: str = "none"  # none | linear:FACTOR | llama3:FACTOR,LOW,HIGH,ORIGINAL_LENGTH


@dataclass
class AttentionConfig:
    num_heads: int = 4
    num_kv_heads: int = 0  # 0: num_heads; 1: MQA
    head_dim: int = 0  # 0: d_model / num_heads
    bias: bool = False  # of q, k, v
    out_bias: bool = False
    qk_norm: bool = False
    qk_norm_over: str = "head"  # head | projection (OLMoE: one norm over all heads together)
    scale: float = 0.0  # of the logits; 0: head_dim ** -0.5
    softcap: float = 0.0  # 0: off
    window: int = 0  # keys seen by a "local" layer, itself included
    backend: str = "auto"  # auto | blocked | xla | cudnn
    cache_format: str = "dense"  # how keys and values are kept: a number format, "int4:asym,token,zero=min", or dense


@dataclass
class FFNConfig:
    hidden: int = 0  # width F; 0: from `match` below
    match: str = "parameters"  # parameters | flops: what F is matched on when hidden is 0
    activation: str = "relu2"  # name in the registry of sparsejax.ops.activations; a GLU name makes the FFN gated
    bias: bool = False


@dataclass
class PositionConfig:
    kind: str = "rope"  # rope | learned | sinusoidal | relative | none
    offset: int = 0  # OPT: learned positions start here
    rope: RopeConfig = field(default_factory=RopeConfig)
    relative_buckets: int = 32  # T5
    relative_max_distance: int = 128


@dataclass
class VisionConfig:
    image_size: int = 8
    channels: int = 1
    patch_size: int = 2
    class_token: bool = True


@dataclass
class ModelConfig:
    kind: str = "decoder"  # decoder | encoder | encoder_decoder | vit
    num_layers: int = 4
    encoder_layers: int = 0  # encoder_decoder only; 0: num_layers
    d_model: int = 128
    vocab_size: int = 0  # 0: the tokenizer's
    num_classes: int = 0  # classification: 0: the data source's
    max_length: int = 0  # 0: data.sequence_length
    block: str = "pre"  # pre | post | parallel | sandwich
    attention_pattern: tuple[str, ...] = ("global",)  # per layer, repeated: global | local
    feed_pattern: tuple[str, ...] = ("ffn",)  # per layer, repeated: registry kind "feed", e.g. "moe:experts=4,k=2"
    tied_embeddings: bool = True
    embedding_scale: bool = False  # multiply embeddings by sqrt(d_model)
    token_types: int = 0
    embedding_norm: bool = False  # BERT: the sum of the embeddings is normalised
    layer_scale: float = 0.0  # initial value; 0: off
    head: bool = True  # False: the model ends with its hidden states (embedding models)
    head_transform: bool = False  # BERT: a D x D map, ffn.activation and a norm before the head
    head_scale: float = 1.0  # multiplies what the head reads (T5 with a tied head: d_model ** -0.5)
    head_softcap: float = 0.0  # of the output logits; 0: off
    head_bias: bool = False
    pool: str = "mean"  # classification: class (first token) | mean
    inputs: tuple[str, ...] = ()  # rules "SITE_GLOB=OP|OP": activation ops at the input of linear maps
    weights: tuple[str, ...] = ()  # rules "SITE_GLOB=OP|OP": weight ops of linear maps
    neurons: tuple[str, ...] = ()  # rules "SITE_GLOB=SELECTOR": which hidden units of an FFN (site `blocks.3.mlp`) are computed
    residuals: tuple[str, ...] = ()  # rules "SITE_GLOB=OP|OP": ops on the skip paths `blocks.3.residual.attn` and `.mlp`
    init: str = "fan_in"  # fan_in | normal:STD
    dtype: str = "float32"  # compute dtype: float32 | bfloat16; master weights stay float32
    residual_dtype: str = ""  # of what blocks add and of the FFN's entering maps; "": dtype. float32 halves bfloat16's error
    scan: bool = True
    unroll: int = 0  # layers per scan step; 0: up to six on CPU, 1 elsewhere
    remat: str = "none"  # none | full | dots | a name of sparsejax.layers.stack.REMAT_POLICIES
    norm: NormConfig = field(default_factory=NormConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    ffn: FFNConfig = field(default_factory=FFNConfig)
    positions: PositionConfig = field(default_factory=PositionConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)


