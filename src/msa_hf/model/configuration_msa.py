"""`MSAConfig`: the configuration of a base decoder plus what its memory needs. Data only."""

import difflib
import inspect
from collections.abc import Collection, Iterable
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .compat_msa import CACHE_NAMES
from .peft_msa import teach_targets
from .positions_msa import reach, switching_rope
from .routing_msa import SCORINGS
from .types_msa import Arguments

# The files that travel with a checkpoint (`trust_remote_code=True`); flat, importing only each other.
AUTO_MAP = {
    "AutoConfig": "configuration_msa.MSAConfig",
    "AutoModel": "modeling_msa.MSAModel",
    "AutoModelForCausalLM": "modeling_msa.MSAForCausalLM",
}

CHOICES: dict[str, Collection[str]] = {
    "similarity": SCORINGS["similarity"],
    "training_similarity": SCORINGS["similarity"],  # or None
    "head_reduction": SCORINGS["heads"],
    "query_reduction": SCORINGS["tokens"],
    "chunk_reduction": SCORINGS["chunks"],
    "aux_loss": ("infonce_decoupled", "infonce", "infonce_decoupled_focal", "infonce_focal"),
}
COUNTS = ("chunk_size", "top_k")
FLAGS = ("shared_router", "score_bias")
WEIGHTS = ("lm_loss_weight", "aux_loss_weight", "answer_loss_weight")
FIELDS = (
    "base_model_type",
    "memory_layers",
    "prefix_token_ids",
    "aux_layers",
    "aux_temperature",
    "focal_gamma",
    *CHOICES,
    *COUNTS,
    *FLAGS,
    *WEIGHTS,
)
# With those that are left out where they say nothing: one is of bases whose position scheme switches by length alone,
# the other is lacking in older checkpoints.
OWN_FIELDS = (*FIELDS, "rope_length", "routers_trained")

# Class attributes by which transformers treats a base's config specially; an instance of ours answers the same.
BASE_CLASS_ATTRIBUTES = (
    "attribute_map",
    "base_model_tp_plan",
    "base_model_pp_plan",
    "base_model_ep_plan",
    "base_model_fsdp_plan",
    "default_theta",
    "ignore_keys_at_rope_validation",
)


class MSAConfig(PreTrainedConfig):
    """Configuration of a causal LM with a Memory Sparse Attention memory.

    Flat: the fields of the base model's own configuration lie beside these. Every field is saved in `config.json`.

    Args:
        base_model_type: `model_type` of the base decoder, for example `"qwen3"`.
        memory_layers: indices of the layers that route and attend to the memory, ascending. Default: the full-attention
            layers of the upper half.
        chunk_size: tokens pooled into one key and value (P; paper: 64).
        top_k: documents that each memory layer attends to (k; paper: 16).
        similarity: `"cosine"`, or `"dot"` (inner product times `head_dim ** -0.5`) of router query and router key.
        training_similarity: the same while training; None means `similarity`. Published checkpoints trained with
            `INFONCE_DECOUPLE` differ between the two.
        head_reduction: over the query heads: `"mean"` or `"max"`; first of the three reductions.
        query_reduction: over the routing tokens: `"max"`, `"mean"` or `"last"`.
        chunk_reduction: over the chunks of a document: `"max"` or `"mean"`.
        shared_router: route with the layer's own attention queries and keys (after norm and RoPE) instead of router
            projections. Such a memory has no router parameters.
        score_bias: add `beta * (s_i - max_j s_j) / aux_temperature` to the attention logits of the rows of document i,
            beta a learned scalar per memory layer. Off reproduces the paper.
        prefix_token_ids: tokens that open every prompt; they stand first in every context, at positions 0, 1, ... and
            are not part of `input_ids`.
        lm_loss_weight, aux_loss_weight, answer_loss_weight: weights of the training losses.
        aux_loss: form of the auxiliary loss. `"infonce_decoupled"` is the paper's Eq. 5 (positives do not compete).
        aux_temperature: tau of the auxiliary loss and of the score bias.
        aux_layers: memory layers that the auxiliary loss averages over. Default: those of the upper half of the model
            (paper), or all memory layers where none lies there.
        focal_gamma: exponent of the focal forms.
        rope_length: tokens of the longest text, for bases whose position scheme has other frequencies for longer texts
            (LongRoPE, dynamic NTK): documents and questions of a memory all have those of this length, whatever they
            are encoded beside. Default for such bases: all that the scheme reaches, which is `max_position_embeddings`,
            for dynamic NTK times its factor; less gives short texts the frequencies that the base gives them, and
            refuses longer ones. Other bases have none.
        routers_trained: whether anybody has trained the routers; None: not known. Says, changes nothing.
        msa_config: the dictionary in which published MSA checkpoints keep these fields; translated, not stored.
        kwargs: the fields of the base configuration.

    Raises:
        ValueError: for an unknown or contradictory value, naming the field.
    """

    model_type = "msa"
    # Trainer evaluates what is left of an output; it adds its own names, to a list.
    keys_to_ignore_at_inference = [*CACHE_NAMES, "lm_loss", "aux_loss", "answer_loss", "routing"]

    # Declared, so that transformers does not take `top_k` for an option of generate().
    base_model_type: str | None
    memory_layers: list[int]
    chunk_size: int
    top_k: int
    similarity: str
    training_similarity: str | None
    head_reduction: str
    query_reduction: str
    chunk_reduction: str
    shared_router: bool
    score_bias: bool
    prefix_token_ids: list[int]
    lm_loss_weight: float
    aux_loss_weight: float
    answer_loss_weight: float
    aux_loss: str
    aux_temperature: float
    aux_layers: list[int]
    focal_gamma: float
    rope_length: int | None
    routers_trained: bool | None

    def __init__(
        self,
        base_model_type: str | None = None,
        memory_layers: list[int] | None = None,
        chunk_size: int = 64,
        top_k: int = 16,
        similarity: str = "cosine",
        training_similarity: str | None = None,
        head_reduction: str = "mean",
        query_reduction: str = "max",
        chunk_reduction: str = "max",
        shared_router: bool = False,
        score_bias: bool = False,
        prefix_token_ids: list[int] | None = None,
        lm_loss_weight: float = 1.0,
        aux_loss_weight: float = 0.1,
        answer_loss_weight: float = 0.0,
        aux_loss: str = "infonce_decoupled",
        aux_temperature: float = 0.1,
        aux_layers: list[int] | None = None,
        focal_gamma: float = 2.0,
        rope_length: int | None = None,
        routers_trained: bool | None = None,
        msa_config: Arguments | None = None,
        **kwargs: Any,
    ) -> None:
        own = {name: value for name, value in locals().items() if name in OWN_FIELDS}
        if msa_config is not None:
            own = _with_published(own, msa_config, kwargs)
        if own["base_model_type"] is None:
            # Transformers makes a config without arguments to learn the defaults; no model can be made of it.
            if kwargs.keys() - {"attn_implementation"} or own != _DEFAULTS:
                raise ValueError(
                    "`base_model_type` is missing: it names the base decoder, for example 'qwen3'. "
                    "`MSAForCausalLM.from_base(model)` sets it for you."
                )
            super().__init__(**kwargs)
            for name, value in own.items():
                setattr(self, name, value)
            return
        known = isinstance(own["base_model_type"], str) and own["base_model_type"] in CONFIG_MAPPING
        if not known or own["base_model_type"] == self.model_type:
            raise ValueError(f"`base_model_type` is {own['base_model_type']!r}, which this transformers does not know.")
        kwargs.pop("model_type", None)
        base = CONFIG_MAPPING[own["base_model_type"]](**kwargs)
        has_defaults = not getattr(base, "has_no_defaults_at_init", False)
        _refuse_misspelt_fields(kwargs, set(type(base)().to_dict()) if has_defaults else set())
        # The base configuration has validated and standardized its fields; ours lie beside them.
        self.__dict__.update(base.__dict__)
        for name in BASE_CLASS_ATTRIBUTES:
            if hasattr(type(base), name):
                self.__dict__[name] = getattr(type(base), name)
        for name, value in own.items():
            setattr(self, name, value)
        self.validate_memory_fields()

    @classmethod
    def from_dict(cls, config_dict: Arguments, **kwargs: Any) -> "MSAConfig":
        """`PreTrainedConfig.from_dict`; overrides of the memory's fields are checked like arguments."""
        fields = dict(config_dict)
        if fields.get("model_type", cls.model_type) != cls.model_type:
            # A plain model's configuration, which PEFT reads where an adapter's base was retrofitted from a checkpoint.
            fields.setdefault("base_model_type", fields["model_type"])
        if (msa_config := fields.pop("msa_config", None)) is not None:
            fields = _with_published(fields, msa_config, fields)
        overrides = {name: kwargs.pop(name) for name in OWN_FIELDS if name in kwargs}
        if "memory_layers" in overrides and "aux_layers" not in overrides:
            overrides["aux_layers"] = _layers_that_stay(fields, overrides["memory_layers"])
        _refuse_misspelt_fields(kwargs, fields)
        return super().from_dict({**fields, **overrides}, **kwargs)

    def __eq__(self, other: object) -> bool:
        # Dataclasses would leave out the base's fields.
        if type(self) is not type(other):
            return NotImplemented
        mine, theirs = self.to_dict(), other.to_dict()  # type: ignore[attr-defined]
        return {**mine, "_name_or_path": None} == {**theirs, "_name_or_path": None}

    def validate_memory_fields(self) -> None:
        """Check and complete the memory's fields.

        Raises:
            ValueError: naming the first field that is unknown, out of range or contradicts another.
        """
        fields = vars(self)
        for name, names in CHOICES.items():
            choices = (None, *names) if name == "training_similarity" else tuple(names)
            if fields[name] not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {fields[name]!r}.")
        for name in COUNTS:
            value = fields[name]
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        for name in FLAGS:
            if not isinstance(fields[name], bool):
                raise ValueError(f"`{name}` must be true or false, got {fields[name]!r}.")
        for name in WEIGHTS:
            value = fields[name]
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
                raise ValueError(f"`{name}` must be a number of at least 0, got {value!r}.")
        for name in ("aux_temperature", "focal_gamma"):
            value = fields[name]
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise ValueError(f"`{name}` must be a number above 0, got {value!r}.")

        count = self.num_hidden_layers
        if self.memory_layers is None:
            self.memory_layers = default_memory_layers(self)
        self.memory_layers = self._layer_list("memory_layers", self.memory_layers, range(count))
        full = set(full_attention_layers(self))
        if sliding := [layer for layer in self.memory_layers if layer not in full]:
            raise ValueError(
                f"`memory_layers` names {sliding}, which are not full-attention layers; only {sorted(full)} are."
            )
        if self.aux_layers is None:
            self.aux_layers = _default_aux_layers(self.memory_layers, count)
        self.aux_layers = self._layer_list("aux_layers", self.aux_layers, self.memory_layers)

        if self.routers_trained not in (None, True, False) or type(self.routers_trained) is int:
            raise ValueError(f"`routers_trained` must be true, false or null, got {self.routers_trained!r}.")
        length = self.rope_length
        if length is not None and (type(length) is not int or length < 1):
            raise ValueError(f"`rope_length` must be an integer of at least 1, got {length!r}.")
        if switching_rope(self):
            self.rope_length = reach(self) if length is None else length
            if self.rope_length is None:
                raise ValueError(
                    f"Positions of this base ({self.base_model_type!r}) change with the length of a text, and its "
                    "configuration has no `max_position_embeddings`; choose one with `rope_length`."
                )
        elif length is not None:
            raise ValueError(
                f"`rope_length` is {length}, but positions of this base ({self.base_model_type!r}) do not change with "
                "the length of a text; leave it out."
            )

        prefix = [] if self.prefix_token_ids is None else self.prefix_token_ids
        vocabulary = range(self.vocab_size)
        if not isinstance(prefix, list | tuple) or any(
            type(item) is not int or item not in vocabulary for item in prefix
        ):
            raise ValueError(f"`prefix_token_ids` must be a list of token ids below {len(vocabulary)}, got {prefix!r}.")
        self.prefix_token_ids = list(prefix)

    @staticmethod
    def _layer_list(name: str, layers: object, allowed: Collection[int]) -> list[int]:
        if not isinstance(layers, list | tuple) or not layers:
            raise ValueError(f"`{name}` must be a non-empty list of layer indices, got {layers!r}.")
        bad = [layer for layer in layers if type(layer) is not int or layer not in allowed]
        if bad or len(set(layers)) != len(layers):
            raise ValueError(f"`{name}` must be distinct layers among {list(allowed)}, got {list(layers)}.")
        return sorted(layers)

    @property
    def prefix_length(self) -> int:
        """Tokens of the prefix."""
        return len(self.prefix_token_ids)

    @property
    def first_position(self) -> int:
        """Position of the first active token: `prefix_length + top_k`, however large the memory is (paper, 3.3)."""
        return self.prefix_length + self.top_k

    def base_config(self) -> PreTrainedConfig:
        """The configuration of the base model alone, as its own class."""
        fields = {name: value for name, value in self.to_dict().items() if name not in (*OWN_FIELDS, "auto_map")}
        fields.pop("model_type")
        if fields.get("architectures"):
            fields["architectures"] = [name.removeprefix("MSA") for name in fields["architectures"]]
        return CONFIG_MAPPING[self.base_model_type](**fields)

    def to_dict(self) -> Arguments:
        """The fields by name; the base's and the memory's side by side."""
        if self.base_model_type is not None:
            teach_targets(self.base_model_type)
        output = super().to_dict()
        for name in BASE_CLASS_ATTRIBUTES:
            output.pop(name, None)
        for name in ("rope_length", "routers_trained"):
            if vars(self).get(name) is None:
                output.pop(name, None)
        return output


_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(MSAConfig.__init__).parameters.items()
    if name in OWN_FIELDS
}


def _with_published(fields: Arguments, msa_config: object, base: Arguments) -> Arguments:
    """`fields` completed by those that `msa_config` sets; a field that both set differently is refused."""
    if not isinstance(msa_config, dict):
        raise ValueError(f"`msa_config` must be a dictionary, got {msa_config!r}.")
    translated = published_fields(msa_config, base.get("num_hidden_layers", 0))
    given = [name for name in translated if name in fields and fields[name] != _DEFAULTS[name]]
    if clash := sorted(name for name in given if fields[name] != translated[name]):
        raise ValueError(f"`msa_config` and {clash} both set the same thing; give one of them.")
    return {**fields, **translated}


def _refuse_misspelt_fields(names: Iterable[str], known: Collection[str]) -> None:
    for name in names:
        close = difflib.get_close_matches(name, OWN_FIELDS, n=1, cutoff=0.85)
        if close and name not in known and not name.startswith("_"):
            raise ValueError(f"`{name}` is not a field of MSAConfig; did you mean `{close[0]}`?")


def _default_aux_layers(memory_layers: list[int], count: int) -> list[int]:
    """Memory layers of the upper half of `count` layers, or all where none lies there."""
    return [layer for layer in memory_layers if layer >= count // 2] or list(memory_layers)


def _layers_that_stay(saved: Arguments, memory_layers: object) -> list[int] | None:
    """`aux_layers` for other memory layers than the saved ones.

    Fewer layers keep those that are still there; more, and fewer of which none is left, have the default (None) again,
    unless they were chosen. Layers that share none with the saved ones keep what contradicts them.
    """
    before, aux = saved.get("memory_layers"), saved.get("aux_layers")
    if not (isinstance(before, list) and isinstance(aux, list) and isinstance(memory_layers, list | tuple)):
        return aux
    stay = [layer for layer in aux if layer in memory_layers]
    if set(memory_layers) <= set(before) or set(before) <= set(memory_layers):
        usual = aux == _default_aux_layers(before, saved.get("num_hidden_layers", 0))
        return None if usual else stay or None
    return stay or aux


def full_attention_layers(config: PreTrainedConfig) -> list[int]:
    """Indices of the layers of `config` that attend to the whole sequence, ascending."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    # Configurations without layer_types have one kind of layer: all windowed (Mistral, Phi-3, Starcoder2) or none.
    if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        return []
    return list(range(config.num_hidden_layers))


def default_memory_layers(config: PreTrainedConfig) -> list[int]:
    """The full-attention layers of the upper half of the model (paper, 3.2).

    Raises:
        ValueError: where the model has no full-attention layer.
    """
    full = full_attention_layers(config)
    if not full:
        raise ValueError(
            "`memory_layers`: the base model has no full-attention layer, and a windowed layer cannot hold a memory. "
            "Where the window is not needed, set `sliding_window` of the base configuration to None."
        )
    return [layer for layer in full if layer >= config.num_hidden_layers // 2] or full[-1:]


def published_fields(msa_config: Arguments, num_hidden_layers: int) -> Arguments:
    """Translate the `msa_config` dictionary of published MSA checkpoints.

    Their inference routes by cosine only where `aux_loss_method` is exactly `"INFONCE"`, and by the scaled inner
    product for every other value, while their training always uses cosine; both are reproduced.

    Raises:
        ValueError: for a key that changes the computation and is not known, naming it.
    """
    known = dict(msa_config)

    def take(name: str, default: Any) -> Any:
        return known.pop(name, default)

    layers = take("router_layer_idx", None)
    if layers == "all":
        layers = list(range(num_hidden_layers))
    elif isinstance(layers, str):
        if not all(layer.strip().isdecimal() for layer in layers.split(",")):
            raise ValueError(f"`msa_config.router_layer_idx` must be layers separated by commas, got {layers!r}.")
        layers = [int(layer) for layer in layers.split(",")]
    method = str(take("aux_loss_method", "INFONCE"))
    fields: Arguments = {
        "base_model_type": "qwen3",
        "memory_layers": layers,
        "chunk_size": take("pooling_kernel_size", 64),
        "top_k": take("top_k_docs", 16),
        "similarity": "cosine" if method == "INFONCE" else "dot",
        "training_similarity": "cosine",
        "head_reduction": take("head_reduce_method", "mean"),
        "query_reduction": take("query_reduce_method", "max"),
        "chunk_reduction": take("chunk_reduce_method", "max"),
        "shared_router": not take("decouple_router", True),
        "lm_loss_weight": take("lmloss_weigth", take("lmloss_weight", 1.0)),
        "aux_loss_weight": take("auxloss_weight", 0.1),
        "answer_loss_weight": take("ansloss_weight", 1.0),
        "aux_loss": method.lower().replace("infonce_decouple", "infonce_decoupled"),
        "aux_temperature": take("infonce_loss_temp", 0.1),
    }
    if not take("aux_loss", True):
        fields["aux_loss_weight"] = 0.0
    if take("recloss_weight", 0.0):
        raise ValueError("`msa_config.recloss_weight` is not 0: the reconstruction loss is not part of the paper.")
    if take("decouple_pooling_mode", "mean") != "mean":
        raise ValueError("`msa_config.decouple_pooling_mode`: only 'mean' pooling of router keys is supported.")
    if not take("rewrite_position", True):
        raise ValueError("`msa_config.rewrite_position` is false: only document-wise positions are supported.")
    for harmless in ("doc_top_k", "lmloss_weight", "lmloss_weigth"):
        known.pop(harmless, None)
    if known:
        raise ValueError(f"`msa_config` has keys that are not known: {sorted(known)}.")
    return fields
