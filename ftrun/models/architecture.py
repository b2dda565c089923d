"""Where things are inside a transformers model, and how to run it up to its head.

Names are found by structure: the layers are the largest list of blocks, embeddings and head are what the model says
they are. A table is needed only for what structure cannot tell: which projection of an attention is which.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ftrun.errors import ConfigError
from ftrun.models.head import Head
from ftrun.models.packing import Way, find_way, masked_inputs, packed_inputs, require_masks
from ftrun.models.precision import products_of
from ftrun.models.wrappers import adds_virtual_tokens, kept_output, own_logits, unwrap

if TYPE_CHECKING:
    from ftrun.data.batches import Batch

# last part of a linear's name -> what it projects; "qkv" and "gate_up" are fused
ATTENTION_KINDS = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "out_proj": "o", "qkv_proj": "qkv",
    "query_key_value": "qkv", "c_attn": "qkv", "c_proj": "o", "dense": "o", "query": "q", "key": "k", "value": "v",
}  # fmt: skip
MLP_KINDS = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "gate_up_proj": "gate_up", "c_fc": "up", "c_proj": "down",
    "fc1": "up", "fc2": "down", "dense_h_to_4h": "up", "dense_4h_to_h": "down", "intermediate.dense": "up", "output.dense": "down",
}  # fmt: skip
FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
ATTENTION, MLP = ("q", "k", "v", "qkv", "o"), ("gate", "up", "gate_up", "down")


@dataclass(frozen=True)
class Linear:
    name: str  # full name in the base model: "model.layers.0.self_attn.q_proj"
    kind: str  # one of ATTENTION or MLP, or "attention" or "mlp" where the table does not know it
    block: int  # its layer


@dataclass(frozen=True)
class Architecture:
    """Names of the parts of one base model; ``describe`` makes it, before peft or anything else wraps the model.

    Methods take the model to act on: the same, wrapped, or a copy. All names are dotted, as in ``named_modules``.
    """

    family: str  # config.model_type
    causal: bool
    backbone: str  # the model without its head
    layers_name: str
    # decoder (or encoder) layers; peft changes them in place
    layers: list[nn.Module] = field(repr=False, compare=False)
    linears: tuple[Linear, ...]  # of all layers
    norms: tuple[str, ...]  # inside the layers
    embeddings: tuple[str, ...]  # token embedding first; then learned positions and their like
    final_norm: str | None
    head_name: str | None  # the language-model head or the classifier
    tied: bool  # head and token embedding share one weight
    width: int
    vocabulary: int  # rows of the token embedding
    context_length: int
    scale: float = 1.0
    cap: float | None = None
    plain_head: bool = True  # the formula of Head was compared with the model's own logits and holds
    packing: dict[str, Way] = field(default_factory=dict, repr=False, compare=False)  # found when first packed

    # ---- where things are ----

    def block_of(self, parameter: str) -> int | None:
        """Layer that a parameter or module name belongs to, with any wrapper's prefix; None for embeddings, final norm and head."""
        found = re.search(rf"(?:^|\.){re.escape(self.layers_name)}\.(\d+)(?:\.|$)", parameter)
        return int(found[1]) if found else None

    def layers_of(self, copy: nn.Module) -> list[nn.Module]:
        """The layers of a copy of this model."""
        return list(unwrap(copy).get_submodule(self.layers_name).children())

    def linear_names(self, kinds: Iterable[str] = ("all",)) -> list[str]:
        """Shortest names that mean exactly the linears of these kinds, as peft's ``target_modules`` reads them.

        Kinds: q k v o gate up down, or attention, mlp, all. A fused projection stands for its parts: q on Phi-3 is
        ``qkv_proj``. Raises ConfigError where the family has none of a kind.
        """
        wanted: set[str] = set()
        for kind in kinds:
            wanted |= self._names_of(kind)
        short = {_shortest(name, wanted, self.linears, self.head_name) for name in wanted}
        return sorted(short)

    def _names_of(self, kind: str) -> set[str]:
        groups = {
            "all": (*ATTENTION, *MLP, "attention", "mlp"),
            "attention": (*ATTENTION, "attention"),
            "mlp": (*MLP, "mlp"),
        }
        kinds = groups.get(kind, (kind, FUSED.get(kind, kind)))
        names = {linear.name for linear in self.linears if linear.kind in kinds}
        if not names:
            known = sorted({linear.kind for linear in self.linears})
            raise ConfigError(f'a {self.family} model has no "{kind}" linears', todo=f"It has: {', '.join(known)}.")
        return names

    # ---- running it ----

    def packing_way(self, model: nn.Module) -> Way:
        """How this model keeps packed documents apart, tried once on a few tokens. Raises ConfigError where it cannot."""
        if "way" not in self.packing:
            base = unwrap(model)
            self.packing["way"] = find_way(base, base.get_submodule(self.backbone))
        return self.packing["way"]

    def check_masks(self, model: nn.Module) -> None:
        """Raise ConfigError where the model cannot be told which token sees which; tried once on a few tokens."""
        if "own" not in self.packing:
            base = unwrap(model)
            require_masks(base, base.get_submodule(self.backbone))
            self.packing["own"] = "mask"

    def hidden_states(self, model: nn.Module, batch: Batch) -> Tensor:
        """States after the last norm, (rows, time, width): what the head turns into logits.

        Padding is on the right and the mask is causal, so real tokens never see padding and no mask is passed; in a
        packed batch the restarting positions tell transformers where documents end. A batch with ``attention`` of its
        own is run with that and its positions. Raises ConfigError where the model cannot keep packed documents apart,
        or does not take such a mask.
        """
        base = unwrap(model)
        inputs: dict[str, Any] = {"input_ids": batch.input_ids}
        if not self.causal:
            if batch.packed:
                raise ConfigError(
                    f"a {self.family} encoder cannot keep packed rows apart",
                    "train.packing=true",
                    "Use train.packing=false.",
                )
            inputs["attention_mask"] = batch.attention_mask
            return base.get_submodule(self.backbone)(**inputs).last_hidden_state
        inputs["use_cache"] = False
        if (batch.attention is not None or batch.packed) and adds_virtual_tokens(model):
            packed = batch.attention is None
            raise ConfigError(
                "virtual tokens stand before a row, and "
                + (
                    "a packed row holds several documents"
                    if packed
                    else "this method says which token of it sees which"
                ),
                "train.packing=true with a prompt or prefix adapter" if packed else "a prompt or prefix adapter",
                "Use train.packing=false." if packed else "Use adapter=lora.",
            )
        if batch.attention is not None:
            self.check_masks(model)
            inputs |= masked_inputs(batch, base)
        elif batch.packed:
            inputs |= packed_inputs(batch, self.packing_way(model), base)
        if base is model:
            return base.get_submodule(self.backbone)(**inputs).last_hidden_state
        # a wrapper (peft, DDP) may act before the backbone runs: go through it and keep what the backbone gives
        with kept_output(base.get_submodule(self.backbone)) as kept:
            model(**inputs, logits_to_keep=1)
        return kept[0].last_hidden_state[:, -batch.input_ids.shape[1] :]  # virtual tokens come first

    def head(self, model: nn.Module) -> Head:
        """The language-model head as it is now, for ``token_nll``."""
        if not self.causal or self.head_name is None:
            raise ConfigError(
                f"this {self.family} model is a classifier: it has no token losses", todo="Use objective=classify."
            )
        base = unwrap(model)
        module = base.get_submodule(self.head_name)
        if self.plain_head and type(module) is nn.Linear:
            narrow = products_of(base)
            return Head(
                module.weight, module.bias, self.scale, self.cap, vocabulary=module.out_features, products=narrow
            )
        return Head(
            None, vocabulary=getattr(module, "out_features", self.vocabulary), forward=own_logits(base, self.backbone)
        )


def describe(model: nn.Module) -> Architecture:
    """The architecture of a freshly loaded transformers model (causal language model or sequence classifier)."""
    base: Any = unwrap(model)
    config = base.config.get_text_config(decoder=True)
    names = {module: name for name, module in base.named_modules()}
    token_embedding = base.get_input_embeddings()
    head = base.get_output_embeddings()
    causal = head is not None
    backbone = base.get_decoder() if causal else base.base_model
    layers_name, layers = _layers(backbone, names)
    if backbone is base:  # the model does not say which part is its body
        backbone = base.get_submodule(layers_name.partition(".")[0])
    parent = layers_name.rpartition(".")[0]
    outside = [name for name in names.values() if name and not name.startswith(layers_name)]
    embeddings = [names[token_embedding]]
    embeddings += [n for n in outside if isinstance(base.get_submodule(n), nn.Embedding) and n not in embeddings]
    width = token_embedding.weight.shape[1]
    norms = [n for n in outside if n.rpartition(".")[0] == parent and _is_norm(base.get_submodule(n), width)]
    found = Architecture(
        family=config.model_type,
        causal=causal,
        backbone=names[backbone],
        layers_name=layers_name,
        layers=list(layers),
        linears=tuple(_linears(layers, layers_name)),
        norms=tuple(
            name for name, module in base.named_modules() if _is_norm(module) and name.startswith(layers_name + ".")
        ),
        embeddings=tuple(embeddings),
        final_norm=norms[-1] if norms else None,
        head_name=names[head] if causal else _classifier(base, names[backbone]),
        tied=causal and head.weight is token_embedding.weight,
        width=width,
        vocabulary=token_embedding.weight.shape[0],
        context_length=context_length(config),
        scale=_scale(config),
        cap=getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None),
    )
    return replace(found, plain_head=_formula_holds(found, base)) if causal else found


# ---- finding the parts ----


def _layers(backbone: nn.Module, names: dict[nn.Module, str]) -> tuple[str, nn.ModuleList]:
    """The list of equal blocks that holds most parameters."""
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    if not lists:
        raise ConfigError(
            f"{type(backbone).__name__} has no list of layers", todo="ftrun trains transformers made of equal layers."
        )
    largest = max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))
    return names[largest], largest


def _linears(layers: nn.ModuleList, layers_name: str) -> Iterator[Linear]:
    for block, layer in enumerate(layers):
        for name, module in layer.named_modules():
            if not isinstance(module, (nn.Linear, Conv1D)):
                continue
            last, last_two = name.rpartition(".")[2], ".".join(name.split(".")[-2:])
            if re.search(r"(^|\.)[^.]*attn|(^|\.)[^.]*attention", name):
                kind = ATTENTION_KINDS.get(last, "attention")
            elif last == "gate" or "router" in name or last == "shared_expert_gate":
                continue  # routers of mixtures of experts are no projections of the stream
            else:
                kind = MLP_KINDS.get(last, MLP_KINDS.get(last_two, "mlp"))
            yield Linear(f"{layers_name}.{block}.{name}", kind, block)


def _shortest(name: str, wanted: set[str], linears: tuple[Linear, ...], head: str | None) -> str:
    """The shortest ending of ``name`` that no unwanted linear shares."""
    others = [linear.name for linear in linears if linear.name not in wanted] + ([head] if head else [])
    parts = name.split(".")
    for start in range(len(parts) - 1, 0, -1):
        ending = ".".join(parts[start:])
        if not any(other == ending or other.endswith("." + ending) for other in others):
            return ending
    return name


def _classifier(base: nn.Module, backbone: str) -> str | None:
    outside = [
        name for name, module in base.named_children() if name != backbone and any(True for _ in module.parameters())
    ]
    return outside[-1] if outside else None


def _is_norm(module: nn.Module, width: int | None = None) -> bool:
    sizes = [parameter.numel() for parameter in module.parameters(recurse=False)]
    return "Norm" in type(module).__name__ and bool(sizes) and (width is None or sizes[0] == width)


def context_length(config: Any) -> int:
    """Tokens that a model of this (text) config can attend to."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return 2**31 - 1  # no limit of its own (recurrent models, ALiBi)


def _scale(config: Any) -> float:
    """What the head's output is multiplied with: Cohere and Falcon-H1 multiply, Granite divides."""
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        if isinstance(getattr(config, name, None), (int, float)):
            scale *= getattr(config, name)
    return scale / (getattr(config, "logits_scaling", None) or 1.0)


@torch.no_grad()
def _formula_holds(found: Architecture, base: nn.Module) -> bool:
    """Whether Head's formula gives what the model's own forward makes of some hidden states."""
    assert found.head_name is not None
    module = base.get_submodule(found.head_name)
    if type(module) is not nn.Linear or module.weight.is_meta:
        return True
    shape = (3, module.in_features)
    hidden = (
        torch.linspace(-3, 3, shape[0] * shape[1], device=module.weight.device)
        .sin()
        .reshape(shape)
        .to(module.weight.dtype)
    )
    ours = Head(module.weight, module.bias, found.scale, found.cap).logits(hidden).float()
    own = own_logits(base, found.backbone)(hidden).float()
    tolerance = 1e-5 if module.weight.dtype == torch.float32 else 2e-2
    return ours.shape == own.shape and bool((ours - own).abs().max() <= tolerance * (1 + own.abs().max()))
