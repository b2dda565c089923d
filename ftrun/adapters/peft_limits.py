"""What the types of peft cannot do, and which of their options are no knobs: the one table, verified by the tests.

What stands here fails or differs when it is tried; what does not, works and is equal. It was found by running peft 0.21.
"""

from __future__ import annotations

from typing import Any

HAND_WRITTEN = {"lora", "ia3", "prefix_tuning"}  # have a file of their own below ftrun/adapters

# types that do not train a causal language model by supervised fine-tuning alone, and why
LEFT_OUT: dict[str, str] = {
    "cpt": "weighs the loss of its own context's tokens inside peft, and moves them against the gradient's sign there",
    "lily": "mixes its experts by the mean over all tokens of a batch, padding, other rows and later tokens included",
    "multitask_prompt_tuning": "needs the number of its task with every row",
    "poly": "needs the number of its task with every row",
    "shadow": "runs a second network beside the model, whose loss peft adds inside its own forward",
    "xlora": "mixes LoRAs that are trained already",
}

# fields that are no knobs, and why; "*" is every type
NO_KNOBS: dict[str, dict[str, str]] = {
    "*": {
        "fan_in_fan_out": "peft tells from the layer how it stores its weight",
        "inference_mode": "a run trains",
        "token_dim": "the model says it",
        "num_transformer_submodules": "the model says it",
        "num_attention_heads": "the model says it",
        "num_layers": "the model says it",
        "tokenizer_name_or_path": "it is the model's",
        "tokenizer_kwargs": "it is the model's",
        "save_projection": "what a file needs is in the file",
        "save_indices": "what a file needs is in the file",
        "save_precomputed_indices": "what a file needs is in the file",
        "save_only_topk_weights": "such a file cannot be trained on",
        "progressbar": "ftrun has its own",
        "use_effective_conv2d": "language models have no such layers",
        "prompt_tuning_init_state_dict_path": "weights are read from safetensors only",
        "runtime_offload_base_weight": "where weights lie is not the adapter's to decide",
    },
    "adalora": dict.fromkeys(
        (
            *("r", "use_rslora", "use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern", "lora_bias"),
            *("megatron_config", "megatron_core", "layer_replication", "use_qalora", "qalora_group_size"),
            *("alora_invocation_tokens", "target_parameters", "trainable_token_indices", "ensure_weight_tying"),
            *("eva_config", "corda_config", "lora_ga_config", "kasa_config", "monteclora_config", "velora_config"),
            *("loftq_config", "arrow_config", "use_bdlora", "runtime_config"),
        ),
        "is LoRA's: AdaLoRA passes over it",
    )
    | {"total_step": "the run says it"},
    "delora": {"modules_to_save": "peft fails with it"},
    "hira": {"rank_pattern": "peft passes over it"},
    "osf": {"target_svd_config": "peft makes it itself"},
    "oft": {"module_dropout": "peft passes over it"},
    "psoft": {"psoft_alpha": "it cancels out"},
    "pvera": {"generator_seed": "draws follow the seed of the run, step by step"},
}

# defaults that differ from peft's own, which are none or do not fit a decoder
KNOBS: dict[str, dict[str, Any]] = {
    "adaption_prompt": {"target_modules": None, "adapter_len": 10},
    "beft": {"target_modules": "v"},
    "cartridge": {"num_virtual_tokens": 20},
    "ln_tuning": {"target_modules": "norms"},
    "p_tuning": {"num_virtual_tokens": 20},
    "prompt_tuning": {"num_virtual_tokens": 20},
    "trainable_tokens": {"target_modules": None},
}

# fields that are no knobs and not peft's default either
SET: dict[str, Any] = {"save_indices": True, "progressbar": False}

# knobs that count decoder layers: null is all of them
LAYERS = {"adaption_prompt": "adapter_layers"}

# knobs that have to be set
NEEDED: dict[str, dict[str, str]] = {"trainable_tokens": {"token_indices": "the ids of the tokens that train"}}

# type -> knob -> the other knob without which peft passes over it, and that one's value; null is any but null
ONLY_WITH: dict[str, dict[str, tuple[str, Any]]] = {
    "adamss": dict.fromkeys(
        (
            *("asa_target_subspaces", "init_warmup", "final_warmup", "mask_interval", "asa_importance_beta"),
            *("asa_uncertainty_beta", "asa_schedule_exponent"),
        ),
        ("use_asa", True),
    )
    | {"svd_threshold": ("use_dynamic_rank", True)},
    "deft": {"init_scale": ("init_weights", False)},
    "lokr": {"rank_dropout_scale": ("rank_dropout", None)},
    "miss": {"mini_r": ("init_weights", "mini")},
    "oft": {"eps": ("coft", True)},
    "p_tuning": dict.fromkeys(("encoder_num_layers", "encoder_dropout"), ("encoder_reparameterization_type", "LSTM")),
    "prompt_tuning": {"prompt_tuning_init_text": ("prompt_tuning_init", "TEXT")},
    "psoft": {"random_seed": ("psoft_svd", "lowrank")},
    "supertuning": {"lora_dropout": ("r", None)},
    "tinylora": {"init_v_bound": ("init_weights", "uniform")},
}

# type -> knob -> a value that cannot be meant, and why
NOT_THAT: dict[str, dict[str, tuple[Any, str]]] = {"tinylora": {"init_weights": (False, "starts from memory as it is")}}

# knobs that only act on linears that have a bias
NEEDS_BIAS: dict[str, tuple[str, ...]] = {"glora": ("config_C", "config_D_E")}

# the knob that is a rank, where a rank above a layer's width adds nothing
RANKS = {
    "adalora": "init_r",
    "adamss": "r",
    "deft": "r",
    "delora": "r",
    "glora": "r",
    "gralora": "r",
    "hira": "r",
    "hra": "r",
    "loha": "r",
    "lora": "r",
    "miss": "r",
    "psoft": "r",
    "tinylora": "r",
}

# words of a warning that peft takes another value than it was given
PASSED_OVER = ("Adjusted", "ignored", "no effect", "only used when")

# what they keep beside their parameters is a function of the base's weights, and as large
MADE_OF_BASE = {"osf"}

WAYS_OUT = {
    "quant=nf4": "Use quant=none, or adapter=lora.",
    "quant=int8": "Use quant=none, or adapter=lora.",
    "train.gradient_checkpointing=true": "Use train.gradient_checkpointing=false, or adapter=lora.",
    "train.packing=true": "Use train.packing=false, or adapter=lora.",
    "train.merge=true": "Use train.merge=false: adapter/ is loaded beside the base model.",
    "task=classify": "Use adapter=lora.",
    "run=RUN": "Start from a model: model.path=...",
}

READS = "computes with the base's weights in full precision, and these are rounded and packed"
VIRTUAL = "puts its tokens in front of a row, and a packed row holds several documents"
UNMERGED = "is no change of the weights"
CACHED = "feeds its prefix through the key-value cache, which gradient checkpointing cannot recompute"
UNSLICED = "has not been tried on slices of weights"
# trained in two processes with a slice of every weight in each, they are what they are in one; so tests say
SLICED = (
    *("adaption_prompt", "beft", "boft", "c3a", "cartridge", "deft", "delora", "fourierft", "glora", "gralora", "hira"),
    *("hra", "ln_tuning", "loha", "lokr", "miss", "oft", "p_tuning", "peanut", "prompt_tuning", "psoft", "road"),
    *("trainable_tokens", "waveft"),
)
# why a type needs whole weights; one that is in neither list was not tried
WHOLE = {
    **dict.fromkeys(("pvera", "randlora", "tinylora", "unilora", "vblora", "vera"), "shares parameters between layers"),
    "adalora": "ranks the parts of all layers against each other after every step",
    "adamss": "ranks the parts of all layers against each other",
    "frod": "decomposes the weights of all layers together",
    "osf": "projects the gradients of whole weights",
    "shira": "trains entries of whole weights",
    "supertuning": "trains entries of whole weights",
}

# setting -> adapter -> why it cannot; adapters with a file of their own refuse it there, too. Every entry fails or differs when it is tried; tests/adapters/test_every_adapter.py does.
CANNOT: dict[str, dict[str, str]] = {
    "quant=nf4": dict.fromkeys(
        (
            *("adamss", "deft", "delora", "frod", "glora", "hra", "loha", "lokr", "osf", "peanut", "psoft"),
            *("supertuning", "tinylora"),
        ),
        READS,
    )
    | {"unilora": "has no effect on quantised layers"},
    "quant=int8": dict.fromkeys(
        (
            *("adamss", "deft", "delora", "frod", "glora", "hra", "osf", "peanut", "psoft", "shira"),
            *("supertuning", "tinylora"),
        ),
        READS,
    )
    | {"unilora": "has no effect on quantised layers"},
    "train.gradient_checkpointing=true": dict.fromkeys(("cartridge", "prefix_tuning"), CACHED),
    "train.packing=true": dict.fromkeys(("cartridge", "p_tuning", "prefix_tuning", "prompt_tuning"), VIRTUAL),
    "train.merge=true": {
        "adaption_prompt": UNMERGED,
        "beft": "adds a bias where the linears have none",
        "cartridge": UNMERGED,
        "bottleneck": UNMERGED,
        "p_tuning": UNMERGED,
        "prefix_tuning": UNMERGED,
        "prompt_tuning": UNMERGED,
    },
    "run=RUN": {
        "adalora": "has shared out its ranks and cannot go on",
        "p_tuning": "leaves the trained prompts, not the network that made them",
    },
}

# the types that were tried for this table: nothing is promised of one that a later release of peft brings
TRIED = frozenset(
    [
        "adalora",
        "adamss",
        "adaption_prompt",
        "beft",
        "boft",
        "c3a",
        "cartridge",
        "deft",
        "delora",
        "fourierft",
        "frod",
        "glora",
        "gralora",
        "hira",
        "hra",
        "ln_tuning",
        "loha",
        "lokr",
        "miss",
        "oft",
        "osf",
        "p_tuning",
        "peanut",
        "prompt_tuning",
        "psoft",
        "pvera",
        "randlora",
        "road",
        "shira",
        "supertuning",
        "tinylora",
        "trainable_tokens",
        "unilora",
        "vblora",
        "vera",
        "waveft",
    ]
)


def cannot(name: str, setting: str) -> str:
    """Why a type cannot be run with a setting; empty where it can."""
    if setting == "task=classify":
        return "is tried on causal language models only"
    if name not in TRIED:
        return "is a type of peft that this ftrun has not been tried with"
    return CANNOT[setting].get(name, "")
