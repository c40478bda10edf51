"""Reads the shape of a model from its config.json: one class per family, with the defaults of transformers.

A missing key means the default of its class in transformers 5.23, not a guess.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qlora_api.model_config import MAX_CONFIG, MAX_PARAMETERS, TRACED
from qlora_api.untrusted_json import InvalidJsonError, parse_object
from qlora_planner.models.shapes import (
    SET_GPUS_EXPLICITLY,
    Attention,
    Block,
    Linear,
    Mlp,
    ModelShape,
    Module,
    StackedExperts,
    UnknownModelError,
    numbered_layers,
)
from qlora_planner.models.traced import TracedShape, read_traced

# Strict: 1.0, true and "1" are no numbers of layers.
Size = Annotated[int, Field(gt=0, le=1 << 24, strict=True)]
"""Dimension of a weight; the largest in use are vocabularies, of up to 2^18 tokens."""
Count = Annotated[int, Field(gt=0, le=1 << 12, strict=True)]
"""Layers, heads or experts; the largest models have hundreds."""
Window = Annotated[int, Field(gt=0, le=1 << 40, strict=True)]
"""Tokens that a sliding layer sees."""
Fraction = Annotated[float, Field(ge=0, le=1)]
Names = tuple[str, ...]


class _Config(BaseModel):
    """The keys of a config.json that affect the shape."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Rope(_Config):
    """rope_parameters; missing keys are at the top level (transformers 4) or have a default."""

    partial_rotary_factor: Fraction | None = None


class _Decoder(_Config):
    """Llama and the base of its descendants: separate projections, a gated MLP, RMS norms."""

    family: ClassVar[str] = "llama"
    norms: ClassVar[Names] = ("input_layernorm", "post_attention_layernorm")
    qk_norm: ClassVar[bool] = False
    root: ClassVar[str] = "model"

    vocab_size: Size = 32_000
    hidden_size: Size = 4096
    intermediate_size: Size = 11_008
    num_hidden_layers: Count = 32
    num_attention_heads: Count = 32
    num_key_value_heads: Count | None = None
    head_dim: Size | None = None
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False

    @property
    def size(self) -> int:
        """Return the dimension of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def activation(self) -> str:
        return self.hidden_act

    @property
    def biases(self) -> tuple[bool, bool]:
        """Return whether query, key and value projections have biases, and whether the output projection has."""
        return self.attention_bias, self.attention_bias

    @property
    def sliding(self) -> tuple[int | None, int]:
        """Return the window of sliding layers in tokens, and their number."""
        return None, 0

    def shape(self) -> ModelShape:
        hidden = self.hidden_size
        return ModelShape(
            family=self.family,
            hidden=hidden,
            tied=self.tie_word_embeddings,
            decoder=Block(
                numbered_layers(f"{self.root}.layers", self.num_hidden_layers),
                (*self.projections(), *self.mlp_linears()),
                self.others(),
                self.stacked(),
            ),
            attention=self.attention(),
            mlp=self.mlp(),
            norm="rms",
            embedding=Module(f"{self.root}.embed_tokens", self.vocab_size * hidden),
            head=Linear("lm_head", hidden, self.vocab_size, quantizable=False),
            outside=(Module(f"{self.root}.norm", hidden),),
            plain_head=self.plain_head(),
        )

    def projections(self) -> tuple[Linear, ...]:
        hidden, queries, keys = self.hidden_size, self.num_attention_heads * self.size, self.kv_heads * self.size
        bias, output_bias = self.biases
        return (
            Linear("self_attn.q_proj", hidden, queries, bias),
            Linear("self_attn.k_proj", hidden, keys, bias),
            Linear("self_attn.v_proj", hidden, keys, bias),
            Linear("self_attn.o_proj", queries, hidden, output_bias),
        )

    def mlp_linears(self) -> tuple[Linear, ...]:
        hidden, width = self.hidden_size, self.intermediate_size
        return (
            Linear("mlp.gate_proj", hidden, width, self.mlp_bias),
            Linear("mlp.up_proj", hidden, width, self.mlp_bias),
            Linear("mlp.down_proj", width, hidden, self.mlp_bias),
        )

    def others(self) -> tuple[Module, ...]:
        heads = ("self_attn.q_norm", "self_attn.k_norm") if self.qk_norm else ()
        return (
            *(Module(path, self.hidden_size) for path in self.norms),
            *(Module(path, self.size) for path in heads),
        )

    def stacked(self) -> tuple[StackedExperts, ...]:
        return ()

    def attention(self) -> Attention:
        window, layers = self.sliding
        return Attention(
            self.num_attention_heads,
            self.kv_heads,
            self.size,
            rotary=self.size,
            qk_norm=self.qk_norm,
            window=window,
            sliding_layers=layers,
        )

    def mlp(self) -> Mlp:
        return Mlp(self.intermediate_size, gated=True, activation=self.activation)

    def plain_head(self) -> bool:
        return True


class _Mistral(_Decoder):
    family = "mistral"

    intermediate_size: Size = 14_336
    num_key_value_heads: Count | None = 8
    sliding_window: Window | None = 4096
    # The class has no biases, whatever the config.json says.
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False

    @property
    def sliding(self) -> tuple[int | None, int]:
        return self.sliding_window, self.num_hidden_layers if self.sliding_window else 0


class _Mixtral(_Mistral):
    family = "mixtral"

    sliding_window: Window | None = None
    num_local_experts: Count = 8
    num_experts_per_tok: Count = 2

    def mlp_linears(self) -> tuple[Linear, ...]:
        return ()

    def others(self) -> tuple[Module, ...]:
        experts, hidden, width = self.num_local_experts, self.hidden_size, self.intermediate_size
        # transformers 5 stacks the experts in one parameter, not a module that bitsandbytes would replace.
        return (
            *super().others(),
            Module("mlp.gate", experts * hidden),
            Module("mlp.experts", experts * 3 * hidden * width),
        )

    def stacked(self) -> tuple[StackedExperts, ...]:
        experts, hidden, width = self.num_local_experts, self.hidden_size, self.intermediate_size
        return (
            StackedExperts("mlp.gate", 1, hidden, experts),
            StackedExperts("mlp.experts.gate_up_proj", experts, hidden, 2 * width, fused_projections=2),
            StackedExperts("mlp.experts.down_proj", experts, width, hidden),
        )

    def mlp(self) -> Mlp:
        return Mlp(self.intermediate_size, True, self.activation, self.num_local_experts, self.num_experts_per_tok)


class _Qwen2(_Decoder):
    family = "qwen2"

    vocab_size: Size = 151_936
    intermediate_size: Size = 22_016
    num_key_value_heads: Count | None = 32
    use_sliding_window: bool = False
    sliding_window: Window | None = 4096
    max_window_layers: Annotated[int, Field(ge=0)] = 28
    mlp_bias: Literal[False] = False

    @property
    def biases(self) -> tuple[bool, bool]:
        return True, False

    @property
    def sliding(self) -> tuple[int | None, int]:
        layers = max(0, self.num_hidden_layers - self.max_window_layers)
        if not self.use_sliding_window or self.sliding_window is None or layers == 0:
            return None, 0
        return self.sliding_window, layers


class _Qwen3(_Qwen2):
    family = "qwen3"
    qk_norm = True

    head_dim: Size | None = 128

    @property
    def biases(self) -> tuple[bool, bool]:
        return self.attention_bias, self.attention_bias


class _Gemma(_Decoder):
    family = "gemma"

    vocab_size: Size = 256_000
    hidden_size: Size = 3072
    intermediate_size: Size = 24_576
    num_hidden_layers: Count = 28
    num_attention_heads: Count = 16
    num_key_value_heads: Count | None = 16
    head_dim: Size | None = 256
    hidden_act: str = "gelu_pytorch_tanh"
    mlp_bias: Literal[False] = False
    tie_word_embeddings: bool = True

    @property
    def activation(self) -> str:
        # Old releases say gelu for the tanh approximation.
        return "gelu_pytorch_tanh" if self.hidden_act == "gelu" else self.hidden_act


class _Gemma2(_Gemma):
    family = "gemma2"
    norms = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )
    default_pattern: ClassVar[int] = 2
    """One in so many layers has full attention."""

    hidden_size: Size = 2304
    intermediate_size: Size = 9216
    num_hidden_layers: Count = 26
    num_attention_heads: Count = 8
    num_key_value_heads: Count | None = 4
    hidden_activation: str = "gelu_pytorch_tanh"
    sliding_window: Window | None = 4096
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0
    layer_types: tuple[str, ...] | None = None

    @property
    def activation(self) -> str:
        return self.hidden_activation

    @property
    def sliding(self) -> tuple[int | None, int]:
        if self.sliding_window is None:
            return None, 0
        if self.layer_types is not None:
            return self.sliding_window, self.layer_types.count("sliding_attention")
        return self.sliding_window, self.num_hidden_layers - self.num_hidden_layers // self.pattern

    @property
    def pattern(self) -> int:
        return self.default_pattern

    def attention(self) -> Attention:
        window, layers = self.sliding
        return Attention(
            self.num_attention_heads,
            self.kv_heads,
            self.size,
            rotary=self.size,
            qk_norm=self.qk_norm,
            softcapped=self.attn_logit_softcapping is not None,
            window=window,
            sliding_layers=layers,
        )

    def plain_head(self) -> bool:
        return self.final_logit_softcapping is None


class _Gemma3Text(_Gemma2):
    family = "gemma3_text"
    qk_norm = True

    vocab_size: Size = 262_208
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window_pattern: Count = 6

    @property
    def pattern(self) -> int:
        return self.sliding_window_pattern


class _Gemma3Language(_Gemma3Text):
    """The language model of a multimodal Gemma 3."""

    root = "model.language_model"


class _Siglip(_Config):
    """The vision tower of Gemma 3."""

    model_type: Literal["siglip_vision_model"] = "siglip_vision_model"
    hidden_size: Size = 768
    intermediate_size: Size = 3072
    num_hidden_layers: Count = 12
    num_channels: Count = 3
    image_size: Size = 224
    patch_size: Size = 16
    vision_use_head: Literal[False]
    """Must be false: the attention pool, transformers' default, is not modeled, and no Gemma 3 has one."""

    def block(self) -> Block:
        hidden, width = self.hidden_size, self.intermediate_size
        attention = (Linear(f"self_attn.{name}", hidden, hidden, True) for name in _SIGLIP_PROJECTIONS)
        mlp = (Linear("mlp.fc1", hidden, width, True), Linear("mlp.fc2", width, hidden, True))
        norms = (Module("layer_norm1", 2 * hidden), Module("layer_norm2", 2 * hidden))
        layers = numbered_layers("model.vision_tower.encoder.layers", self.num_hidden_layers)
        return Block(layers, (*attention, *mlp), norms)

    def outside(self) -> tuple[Module, ...]:
        hidden, patches = self.hidden_size, (self.image_size // self.patch_size) ** 2
        pixels = self.num_channels * self.patch_size**2
        return (
            Module("model.vision_tower.embeddings.patch_embedding", (pixels + 1) * hidden),
            Module("model.vision_tower.embeddings.position_embedding", patches * hidden),
            Module("model.vision_tower.post_layernorm", 2 * hidden),
        )


_SIGLIP_PROJECTIONS: Final = ("k_proj", "v_proj", "q_proj", "out_proj")


class _Gemma3(_Config):
    """Multimodal Gemma 3; text passes through its language model only."""

    text_config: _Gemma3Language = _Gemma3Language()
    vision_config: _Siglip
    tie_word_embeddings: bool = True

    def shape(self) -> ModelShape:
        language, vision = self.text_config.shape(), self.vision_config
        projector = (
            Module("model.multi_modal_projector", vision.hidden_size * language.hidden),
            Module("model.multi_modal_projector.mm_soft_emb_norm", vision.hidden_size),
        )
        return ModelShape(
            **vars(language)
            | {
                "family": "gemma3",
                "tied": self.tie_word_embeddings,
                "outside": (*language.outside, *vision.outside(), *projector),
                "vision_tower": vision.block(),
            }
        )


class _Phi(_Config):
    """Phi-1 and Phi-2: attention parallel to the MLP, biases everywhere, layer norms."""

    vocab_size: Size = 51_200
    hidden_size: Size = 2048
    intermediate_size: Size = 8192
    num_hidden_layers: Count = 24
    num_attention_heads: Count = 32
    num_key_value_heads: Count | None = None
    head_dim: Size | None = None
    hidden_act: str = "gelu_new"
    qk_layernorm: bool = False
    partial_rotary_factor: Fraction = 0.5
    rope_parameters: _Rope | None = None
    tie_word_embeddings: bool = False

    def shape(self) -> ModelShape:
        hidden, size = self.hidden_size, self.head_dim or self.hidden_size // self.num_attention_heads
        kv_heads = self.num_key_value_heads or self.num_attention_heads
        rotary_fraction = _rotary_fraction(self.rope_parameters, self.partial_rotary_factor)
        return ModelShape(
            family="phi",
            hidden=hidden,
            tied=self.tie_word_embeddings,
            decoder=Block(
                numbered_layers("model.layers", self.num_hidden_layers),
                self._linears(size, kv_heads),
                self._norms(hidden),
            ),
            attention=Attention(
                self.num_attention_heads, kv_heads, size, rotary=int(size * rotary_fraction), qk_norm=self.qk_layernorm
            ),
            mlp=Mlp(self.intermediate_size, gated=False, activation=self.hidden_act),
            norm="layer",
            embedding=Module("model.embed_tokens", self.vocab_size * hidden),
            head=Linear("lm_head", hidden, self.vocab_size, bias=True, quantizable=False),
            outside=(Module("model.final_layernorm", 2 * hidden),),
            parallel=True,
        )

    def _linears(self, size: int, kv_heads: int) -> tuple[Linear, ...]:
        hidden, width, queries = self.hidden_size, self.intermediate_size, self.num_attention_heads * size
        return (
            Linear("self_attn.q_proj", hidden, queries, True),
            Linear("self_attn.k_proj", hidden, kv_heads * size, True),
            Linear("self_attn.v_proj", hidden, kv_heads * size, True),
            Linear("self_attn.dense", queries, hidden, True),
            Linear("mlp.fc1", hidden, width, True),
            Linear("mlp.fc2", width, hidden, True),
        )

    def _norms(self, hidden: int) -> tuple[Module, ...]:
        paths = ("self_attn.q_layernorm", "self_attn.k_layernorm") if self.qk_layernorm else ()
        width = hidden // self.num_attention_heads
        return (Module("input_layernorm", 2 * hidden), *(Module(path, 2 * width) for path in paths))


class _Phi3(_Decoder):
    """Phi-3 and Phi-4: fused projections."""

    family = "phi3"

    vocab_size: Size = 32_064
    hidden_size: Size = 3072
    intermediate_size: Size = 8192
    sliding_window: Window | None = None
    partial_rotary_factor: Fraction = 1.0
    rope_parameters: _Rope | None = None

    @property
    def sliding(self) -> tuple[int | None, int]:
        return self.sliding_window, self.num_hidden_layers if self.sliding_window else 0

    def projections(self) -> tuple[Linear, ...]:
        queries, keys = self.num_attention_heads * self.size, self.kv_heads * self.size
        return (
            Linear("self_attn.o_proj", queries, self.hidden_size),
            Linear("self_attn.qkv_proj", self.hidden_size, queries + 2 * keys),
        )

    def mlp_linears(self) -> tuple[Linear, ...]:
        hidden, width = self.hidden_size, self.intermediate_size
        return (Linear("mlp.gate_up_proj", hidden, 2 * width), Linear("mlp.down_proj", width, hidden))

    def attention(self) -> Attention:
        window, layers = self.sliding
        rotary_fraction = _rotary_fraction(self.rope_parameters, self.partial_rotary_factor)
        return Attention(
            self.num_attention_heads,
            self.kv_heads,
            self.size,
            rotary=int(self.size * rotary_fraction),
            window=window,
            sliding_layers=layers,
        )


class _GptNeoX(_Config):
    """GPT-NeoX and Pythia: fused projections, layer norms."""

    vocab_size: Size = 50_432
    hidden_size: Size = 6144
    intermediate_size: Size = 24_576
    num_hidden_layers: Count = 44
    num_attention_heads: Count = 64
    hidden_act: str = "gelu"
    attention_bias: bool = True
    use_parallel_residual: bool = True
    rotary_pct: Fraction = 0.25
    rope_parameters: _Rope | None = None
    tie_word_embeddings: bool = False

    def shape(self) -> ModelShape:
        hidden, size = self.hidden_size, self.hidden_size // self.num_attention_heads
        rotary_fraction = _rotary_fraction(self.rope_parameters, self.rotary_pct)
        return ModelShape(
            family="gpt_neox",
            hidden=hidden,
            tied=self.tie_word_embeddings,
            decoder=Block(
                numbered_layers("gpt_neox.layers", self.num_hidden_layers),
                self._linears(),
                (Module("input_layernorm", 2 * hidden), Module("post_attention_layernorm", 2 * hidden)),
            ),
            attention=Attention(
                self.num_attention_heads, self.num_attention_heads, size, rotary=int(size * rotary_fraction)
            ),
            mlp=Mlp(self.intermediate_size, gated=False, activation=self.hidden_act),
            norm="layer",
            embedding=Module("gpt_neox.embed_in", self.vocab_size * hidden),
            head=Linear("lm_head", hidden, self.vocab_size, quantizable=False),
            outside=(Module("gpt_neox.final_layer_norm", 2 * hidden),),
            parallel=self.use_parallel_residual,
        )

    def _linears(self) -> tuple[Linear, ...]:
        hidden, width = self.hidden_size, self.intermediate_size
        return (
            Linear("attention.query_key_value", hidden, 3 * hidden, self.attention_bias),
            Linear("attention.dense", hidden, hidden, self.attention_bias),
            Linear("mlp.dense_h_to_4h", hidden, width, True),
            Linear("mlp.dense_4h_to_h", width, hidden, True),
        )


class _Falcon(_Config):
    """Falcon: grouped keys and values, and a linear layer class of its own, which is not quantized."""

    vocab_size: Size = 65_024
    hidden_size: Size = 4544
    num_hidden_layers: Count = 32
    num_attention_heads: Count = 71
    num_kv_heads: Count | None = None
    ffn_hidden_size: Size | None = None
    num_ln_in_parallel_attn: int | None = None
    new_decoder_architecture: bool = False
    multi_query: bool = True
    parallel_attn: bool = True
    bias: bool = False
    alibi: bool = False
    activation: str = "gelu"
    tie_word_embeddings: bool = True

    def shape(self) -> ModelShape:
        hidden, size = self.hidden_size, self.hidden_size // self.num_attention_heads
        return ModelShape(
            family="falcon",
            hidden=hidden,
            tied=self.tie_word_embeddings,
            decoder=Block(numbered_layers("transformer.h", self.num_hidden_layers), self._linears(size), self._norms()),
            attention=Attention(self.num_attention_heads, self._kv_heads(), size, rotary=0 if self.alibi else size),
            mlp=Mlp(self.ffn_hidden_size or 4 * hidden, gated=False, activation=self.activation),
            norm="layer",
            embedding=Module("transformer.word_embeddings", self.vocab_size * hidden),
            head=Linear("lm_head", hidden, self.vocab_size, quantizable=False),
            outside=(Module("transformer.ln_f", 2 * hidden),),
            parallel=self.new_decoder_architecture or self.parallel_attn,
            # transformers 5.23 builds its mask without position_ids, so packed rows would attend to each other.
            supports_packing=False,
        )

    def _kv_heads(self) -> int:
        if self.new_decoder_architecture or not self.multi_query:
            return self.num_kv_heads or self.num_attention_heads
        return 1

    def _linears(self, size: int) -> tuple[Linear, ...]:
        hidden, width = self.hidden_size, self.ffn_hidden_size or 4 * self.hidden_size
        fused = (self.num_attention_heads + 2 * self._kv_heads()) * size
        layers = (
            ("self_attention.query_key_value", hidden, fused),
            ("self_attention.dense", hidden, hidden),
            ("mlp.dense_h_to_4h", hidden, width),
            ("mlp.dense_4h_to_h", width, hidden),
        )
        return tuple(Linear(*layer, bias=self.bias, quantizable=False) for layer in layers)

    def _norms(self) -> tuple[Module, ...]:
        count = 2 if self.new_decoder_architecture else 1
        two = (count if self.num_ln_in_parallel_attn is None else self.num_ln_in_parallel_attn) == 2
        if not self.parallel_attn:
            paths: Names = ("post_attention_layernorm", "input_layernorm")
        else:
            paths = ("ln_attn", "ln_mlp") if two else ("input_layernorm",)
        return tuple(Module(path, 2 * self.hidden_size) for path in paths)


def _rotary_fraction(rope: _Rope | None, default: float) -> float:
    """Return the fraction of a head with rotary embeddings."""
    configured = None if rope is None else rope.partial_rotary_factor
    return default if configured is None else configured


_Family = _Decoder | _Gemma3 | _Phi | _GptNeoX | _Falcon
FAMILIES: Final[Mapping[str, type[_Family]]] = {
    "llama": _Decoder,
    "mistral": _Mistral,
    "mixtral": _Mixtral,
    "qwen2": _Qwen2,
    "qwen3": _Qwen3,
    "gemma": _Gemma,
    "gemma2": _Gemma2,
    "gemma3_text": _Gemma3Text,
    "gemma3": _Gemma3,
    "phi": _Phi,
    "phi3": _Phi3,
    "gpt_neox": _GptNeoX,
    "falcon": _Falcon,
}
"""By model_type; DeepSeek's dense models (deepseek-coder, deepseek-llm) and many others are llama."""
KNOWN_TYPES: Final = " (known types: "
"""What the list starts with in the message of a type that is not in it."""


def read_shape(config: Mapping[str, Any]) -> ModelShape:
    """Return the shape of the model that a config.json describes.

    Raises:
        UnknownModelError: The family is not known, or a value of the config.json is invalid.

    """
    kind = config.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise UnknownModelError(
            f"the size of a model of type '{kind}' is not known{KNOWN_TYPES}{known}); {SET_GPUS_EXPLICITLY}"
        )
    try:
        shape = family.model_validate(config).shape()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise UnknownModelError(f"config.json: {field}: {first['msg']}; {SET_GPUS_EXPLICITLY}") from None
    if shape.mlp.experts_per_token > shape.mlp.experts:
        raise UnknownModelError(f"config.json: more experts per token than experts; {SET_GPUS_EXPLICITLY}")
    if shape.attention.head_dim == 0 or shape.parameters > MAX_PARAMETERS:
        raise UnknownModelError(
            f"config.json: a model of {shape.parameters:,} weights with heads of size {shape.attention.head_dim} "
            f"cannot be; {SET_GPUS_EXPLICITLY}"
        )
    return shape


def read_recorded_shape(config: str) -> ModelShape | TracedShape:
    """Return the shape from what prepare recorded: part of the config.json, or the sizes of the modules; or nothing."""
    try:
        if not config:
            raise UnknownModelError(f"the model's config.json was not recorded; {SET_GPUS_EXPLICITLY}")
        content = parse_object(config, MAX_CONFIG)
        return read_traced(content) if TRACED in content else read_shape(content)
    except InvalidJsonError as error:
        raise UnknownModelError(f"config.json: {error}; {SET_GPUS_EXPLICITLY}") from error
