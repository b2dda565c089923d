"""Words that people bring from other trainers, and what to type here."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path

from ftrun import registry
from ftrun.config import recipes
from ftrun.config.place import place as where_is
from ftrun.config.recipes import DEFAULT_CHOICES
from ftrun.errors import ConfigError, nearest

# our key -> what others call it
KEYS = {
    "recipe": "method recipe_name",
    "out": "output output_dir output_path save_dir save_path run_dir",
    "resume": "resume_from resume_from_checkpoint checkpoint ckpt",
    "run": "run_id adapter_path adapter_name_or_path",
    "budget": "fraction ratio percent subset keep select_ratio",
    "seed": "random_seed random_state",
    "prompt": "text question",
    "model.path": "model_path model_name model_id model_name_or_path pretrained_model_name_or_path base_model hf_model",
    "model.dtype": "dtype torch_dtype precision compute_dtype bnb_4bit_compute_dtype",
    "model.attention": "attn_implementation attention flash_attention",
    "model.template": "template chat_template",
    "model.trust_remote_code": "trust_remote_code",
    "data.path": "dataset dataset_name dataset_path data_path data_file data_files train_file train_data train_dataset pool file",
    "data.max_length": "max_length max_seq_length max_seq_len seq_length seq_len sequence_len cutoff_len block_size "
    "model_max_length context_length",
    "data.heldout": "heldout val_size validation_split test_size eval_split",
    "data.heldout_path": "heldout_path validation_file val_file eval_file eval_dataset eval_data test_file",
    "data.limit": "limit max_samples max_train_samples num_samples",
    "data.system": "system system_prompt default_system",
    "data.columns": "columns column_mapping",
    "data.split": "split dataset_split",
    "train.max_steps": "max_steps steps num_steps iters max_iters",
    "train.epochs": "epochs epoch num_epochs n_epochs num_train_epochs max_epochs",
    "train.batch_size": "batch_size bs batch train_batch_size per_device_train_batch_size micro_batch_size "
    "global_batch_size effective_batch_size",
    "train.batch_tokens": "batch_tokens max_tokens_per_batch",
    "train.packing": "packing sample_packing",
    "train.gradient_checkpointing": "gradient_checkpointing grad_checkpointing activation_checkpointing",
    "train.max_grad_norm": "max_grad_norm grad_clip gradient_clip_val clip_grad_norm max_norm",
    "train.save_steps": "save_steps save_every checkpoint_every",
    "train.eval_steps": "eval_steps eval_every",
    "train.log_steps": "log_steps logging_steps log_every",
    "train.load_best": "load_best load_best_model_at_end",
    "train.trackers": "report_to trackers logger tracker",
    "train.merge": "merge_after save_merged",
    "optim": "optimizer optim_type",
    "optim.learning_rate": "lr learning_rate max_lr peak_lr eta",
    "optim.weight_decay": "weight_decay wd decay",
    "schedule": "scheduler lr_scheduler lr_scheduler_type",
    "schedule.warmup": "warmup warmup_ratio warmup_steps num_warmup_steps",
    "adapter": "peft peft_type peft_method adapter_type finetuning_type",
    "adapter.r": "r rank lora_r lora_rank",
    "adapter.lora_alpha": "alpha lora_alpha",
    "adapter.lora_dropout": "dropout lora_dropout",
    "adapter.target_modules": "target_modules lora_target lora_target_modules",
    "adapter.use_dora": "use_dora dora",
    "adapter.use_rslora": "use_rslora rslora",
    "quant": "quantization quantize quantization_bit load_in bits quant_type",
    "objective": "loss loss_type stage task_type",
    "eval": "evals evaluator evaluators metrics benchmark benchmarks",
    "launch.processes": "processes num_processes nproc nproc_per_node num_gpus gpus devices world_size",
    "launch.nodes": "nodes nnodes num_nodes num_machines",
    "launch.rendezvous": "rendezvous rdzv_endpoint",
    "launch.restarts": "restarts max_restarts",
    "launch.strategy": "strategy distributed_type distributed_strategy",
    "launch.context_parallel": "context_parallel context_parallel_size cp_size sequence_parallel_size",
    "launch.device": "device",
    "launch.threads": "threads num_threads",
}
# what other launchers want to be told, and ours finds out by itself
MEETING = [
    "node_rank",
    "machine_rank",
    "address",
    "master_addr",
    "main_process_ip",
    "port",
    "master_port",
    "main_process_port",
]
# words that stand for a choice, whatever their value
SWITCHES = {
    "load_in_4bit": "quant=nf4",
    "load_in_8bit": "quant=int8",
    "use_4bit": "quant=nf4",
    "qlora": "recipe=qlora_sft",
    "use_peft": "adapter=lora",
    "use_lora": "adapter=lora",
    "lora": "adapter=lora",
    "ddp": "launch.strategy=ddp",
    "fsdp": "launch.strategy=fsdp",
    "bf16": "model.dtype=bfloat16",
    "fp16": "model.dtype=float16",
    "fp32": "model.dtype=float32",
}
# choices of a slot that others call otherwise
CHOICES = {
    "adapter": {
        "adapter=lora adapter.use_dora=true": "dora",
        "adapter=lora adapter.use_rslora=true": "rslora",
        "adapter=lora adapter.init_lora_weights=pissa": "pissa",
        "adapter=lora adapter.init_lora_weights=olora": "olora",
        "adapter=lora quant=nf4": "qlora",
        "adapter=none": "full full_finetune full_finetuning fft sft null false no off",
        "adapter=prefix_tuning": "prefix",
        "adapter=bottleneck": "houlsby pfeiffer adapters",
    },
    "quant": {
        "quant=nf4": "4bit 4-bit int4 fp4 4 bnb bnb4 bnb_4bit bitsandbytes q4 true",
        "quant=int8": "8bit 8-bit 8 llm_int8 bnb_8bit q8",
        "quant=none": "null false no off 0 16 32 fp16 bf16 fp32",
    },
    "optim": {
        "optim=adamw": "adam adamw_torch adamw_hf adamw_torch_fused null",
        "optim=adamw_8bit": "adam8bit adamw8bit adamw_bnb_8bit",
        "optim=paged_adamw": "paged_adamw_32bit paged_adamw_8bit",
    },
    "schedule": {"schedule=constant": "null none false no off const", "schedule=wsd": "warmup_stable_decay"},
    "objective": {
        "objective=sft": "null causal clm lm cross_entropy ce nll instruction",
        "objective=text": "pretrain pretraining pt cpt continued_pretraining",
        "objective=classify": "classification seq_cls sequence_classification",
        "objective=dpo": "preference pairs",
    },
    "eval": {"'eval=[heldout]'": "loss perplexity ppl nll", "'eval=[]'": "null none false no off 0"},
    "select": {"select=none": "null false no off all full everything 0"},
    "picker": {"picker=own": "null none false no off"},
    "tokens": {"tokens=none": "null false no off all 0"},
}
DATA_ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz", ".zst")


def _turned(table: dict[str, str]) -> dict[str, str]:
    return {word: ours for ours, words in table.items() for word in words.split()}


_OUR_KEY = _turned(KEYS)
_OUR_CHOICE = {slot: _turned(table) for slot, table in CHOICES.items()}


def our_words(key: str, value: str = "...") -> str | None:
    """What to type for ``key=value`` of another trainer; None where the key says nothing to us."""
    section, _, last = key.lower().replace("-", "_").rpartition(".")
    if last in ("gradient_accumulation_steps", "grad_accum", "accumulate_grad_batches"):
        return "train.batch_size=16, the rows of one step in all; how many fit at once follows from train.batch_tokens"
    if last in MEETING and section in ("", "launch"):
        return "launch.rendezvous=HOST:PORT, the same on all machines: where they meet, each is given its number"
    ours = _OUR_KEY.get(last)
    if section and (section in registry.SLOTS or section == "launch") and (ours or "").split(".")[0] != section:
        return None  # adapter.alpha is lora_alpha, tokens.alpha is not
    if last in SWITCHES:
        return SWITCHES[last]
    if ours is None or ours == key:
        return None
    return (our_choice(ours, value) if ours in _OUR_CHOICE else None) or f"{ours}={value}"


def our_choice(slot: str, name: str) -> str | None:
    """What to type for a choice that goes by another name here, or lies in another slot."""
    word = name.lower().replace("llm.", "llm_")
    if word in _OUR_CHOICE.get(slot, {}):
        return _OUR_CHOICE[slot][word]
    for other in registry.SLOTS:
        if other not in (slot, "picker") and name in registry.specs(other) and name != "none":
            return f"{other}={name}"
    if name in recipes.catalogue():
        return f"recipe={name}"
    return None


def wrong_choice(slot: str, name: str) -> ConfigError:
    """For a name that ``slot`` does not have: the nearest one, or the words for what was meant."""
    what = f'{slot} has no choice "{name}"'
    if reason := registry.left_out(slot, name):
        return ConfigError(
            f"{slot}={name} is not offered: it {reason}", f"{slot}={name}", f"Run: ftrun recipes --slot {slot}"
        )
    known = registry.specs(slot)
    ours = our_choice(slot, name)
    recipe = f"{name}_sft"
    if ours:
        also = f", or recipe={recipe}" if slot == "adapter" and recipe in recipes.catalogue() else ""
        return ConfigError(what, f"{slot}={name}", f"Write {ours}{also}")
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if slot != "eval" or not name[:1].isalpha():
        return ConfigError(what, f"{slot}={name}", nearest(name, known))
    task = f"'eval=[lm_eval]' 'eval.lm_eval.tasks=[{name}]'"
    if close:
        return ConfigError(what, f"{slot}={name}", f'Did you mean "{close[0]}"? For a task of lm-eval: {task}')
    return ConfigError(what, f"{slot}={name}", f"Is it a task of lm-eval? Write {task}")


def bare_word(verb: str, word: str, followers: Collection[str] = ()) -> ConfigError:
    """For a word without ``=``: what it was meant to be."""
    where = " ".join(["ftrun", verb, word, *followers])
    typed = f"ftrun {verb}"
    if word.startswith("=") or any(follower.startswith("=") for follower in followers):
        return ConfigError("there are spaces around an =", where, "Write key=value without them.")
    if word in recipes.catalogue():
        return ConfigError(f'"{word}" is the name of a recipe', where, f"Write {typed} recipe={word}")
    if word.endswith((".yaml", ".yml")):
        return ConfigError(f'"{word}" names a recipe file', where, f"Write {typed} recipe={word}")
    try:
        place = where_is(word, "it")
    except ConfigError:
        place = Path()
    if (place / "config.yaml").is_file() or (verb == "merge" and place.is_dir()):
        return ConfigError(f'"{word}" is the folder of a run', where, f"Write {typed} run={word}")
    if word.endswith(DATA_ENDINGS):
        return ConfigError(f'"{word}" names a file of rows', where, f"Write {typed} data.path={word}")
    if (place / "config.json").is_file() or word.endswith(".gguf"):
        return ConfigError(f'"{word}" is a model', where, f"Write {typed} model.path={word}")
    for slot in registry.SLOTS:
        if word in registry.specs(slot) and word != "none":
            return ConfigError(f'"{word}" is a choice of {slot}', where, f"Write {typed} {slot}={word}")
    if verb in ("merge", "generate", "eval"):
        return ConfigError(f'"{word}" is not of the form key=value', where, f"For a run: {typed} run={word}")
    close = difflib.get_close_matches(word, recipes.catalogue(), n=1, cutoff=0.7)
    todo = f"Did you mean recipe={close[0]}?" if close else f"Write it as key=value. See `{typed} --help`."
    return ConfigError(f'"{word}" is not of the form key=value', where, todo)


def dashed(verb: str, word: str, value: str | None, flags: Collection[str]) -> ConfigError:
    """For a flag that there is not: a key with dashes in front, or a misspelt flag."""
    name, equals, given = word.lstrip("-").partition("=")
    given = given if equals else value or "..."
    close = difflib.get_close_matches(word, flags, n=1, cutoff=0.8)
    sections = {*DEFAULT_CHOICES, "recipe", "train", "launch", "budget", "seed", "out", "resume", "stages"}
    key = name.replace("-", "_")
    ours = our_words(key, given) or (f"{name}={given}" if key.split(".")[0] in sections or equals else None)
    if ours and (equals or not close or key in sections):
        return ConfigError(
            f"keys take no dashes, {word.partition('=')[0]} has some", f"ftrun {verb} {word}", f"Write {ours}"
        )
    todo = f'Did you mean "{close[0]}"?' if close else f"See `ftrun {verb} --help`."
    return ConfigError(f"there is no flag {word}", f"ftrun {verb} {word}", todo)
