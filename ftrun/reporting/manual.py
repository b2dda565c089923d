"""``ftrun --help`` and ``ftrun VERB --help``. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ftrun import registry
from ftrun.config.cluster import cluster_knobs
from ftrun.config.recipes import DEFAULT_CHOICES
from ftrun.config.settings import SECTIONS, root_knobs, section_knobs, shared_select_knobs
from ftrun.errors import ConfigError, nearest
from ftrun.registry import Knob
from ftrun.reporting.catalogue import plain

WIDTH = 100  # columns


@dataclass(frozen=True)
class Page:
    """What one verb does, the keys that it reads first of all, and lines to paste."""

    line: str  # its line in `ftrun --help`
    about: str
    keys: tuple[str, ...]
    examples: tuple[str, ...]


RUN_KEYS = ("recipe", "model.path", "data.path", "out", "seed")
PAGES = {
    "train": Page(
        "select, attach, train, evaluate",
        "Runs the whole chain of a recipe: selects rows where the recipe selects, attaches the adapter, trains, and "
        "evaluates before and after. Everything goes into one run folder. Ctrl-C finishes the step and saves; "
        "resume=RUN goes on.",
        (
            *(*RUN_KEYS, "budget", "stages", "resume", "data.max_length", "train.max_steps", "train.epochs"),
            *("train.batch_size", "optim.learning_rate", "adapter", "quant", "tokens", "eval", "launch.processes"),
        ),
        (
            "ftrun train recipe=lora_sft data.path=my.jsonl model.path=FOLDER",
            "ftrun train recipe=qlora_sft data.path=my.jsonl adapter.r=32 train.epochs=3",
            "ftrun train -m recipe=lora_sft data.path=my.jsonl optim.learning_rate=1e-4,3e-4 seed=0,1",
        ),
    ),
    "select": Page(
        "score rows and keep the best",
        "Scores the rows of a pool, keeps the best within the budget, and writes every score and the chosen rows to "
        "selection/ in the run folder. Several recipes share one pool and their passes over it. "
        "`ftrun select explain run=RUN id=17` tells why a row was kept or left out.",
        (*RUN_KEYS, "budget", "select", "select.picker", "select.model.path", "select.unscored", "select.dedup"),
        (
            "ftrun select recipe=superfiltering data.path=pool.jsonl budget=0.1",
            "ftrun select recipe=superfiltering,longest,random data.path=pool.jsonl budget=500",
            "ftrun select explain run=RUN id=17",
        ),
    ),
    "preview": Page(
        "rows exactly as they are trained",
        "Shows rows as the recipe would train them: template, tokens coloured by their weight in the loss, what is "
        "cut or left out, and what is refused.",
        (*RUN_KEYS[:3], "data.format", "data.columns", "data.max_length", "data.train_on", "model.template"),
        (
            "ftrun preview recipe=lora_sft data.path=my.jsonl",
            "ftrun preview recipe=talr data.path=my.jsonl --html",
        ),
    ),
    "plan": Page(
        "memory and time before the run",
        "Counts what trains, and estimates memory and time of every stage, without loading weights.",
        (*RUN_KEYS[:3], "adapter", "quant", "train.batch_size", "train.batch_tokens", "data.max_length"),
        ("ftrun plan recipe=qlora_sft data.path=my.jsonl model.path=FOLDER",),
    ),
    "eval": Page(
        "evaluators on a run or a model",
        "Evaluates a finished run, or any model, with the evaluators of eval=.",
        ("run", "model.path", "data.path", "data.heldout", "data.heldout_path", "eval", "out"),
        (
            "ftrun eval run=RUN",
            "ftrun eval model.path=FOLDER data.path=my.jsonl 'eval=[heldout,generation]'",
            "ftrun eval run=RUN 'eval=[lm_eval]' 'eval.lm_eval.tasks=[hellaswag]' eval.lm_eval.limit=100",
        ),
    ),
    "generate": Page(
        "try a trained model",
        "Answers one prompt with the model of a run, or with any model.",
        ("run", "model.path", "prompt", "data.system"),
        ('ftrun generate run=RUN prompt="What is 2 + 2?"',),
    ),
    "merge": Page(
        "fold the adapter into plain weights",
        "Folds the adapter of a run into the full-precision base, and writes a model that loads anywhere.",
        ("run", "out"),
        ("ftrun merge run=RUN",),
    ),
    "submit": Page(
        "the same command as a job",
        "Checks the command here, and submits it to Slurm: one agent a machine starts the processes there, and they meet "
        "by themselves. Before the time limit the run saves, the job queues itself again, and the run goes on; so it "
        "does when it is preempted or a machine fails. A sweep becomes one array. cluster=FILE.yaml holds a site's own "
        "values; docs/cluster.md has files for machines without Slurm.",
        tuple(f"cluster.{name}" for name in cluster_knobs()),
        (
            "ftrun submit train recipe=lora_sft data.path=my.jsonl cluster.gpus_per_node=8",
            "ftrun submit train recipe=lora_sft cluster.nodes=2 cluster.time=04:00:00 cluster.dry_run=true",
            "ftrun submit -m train recipe=lora_sft seed=0,1,2 cluster=site.yaml",
        ),
    ),
    "status": Page(
        "how runs and jobs are",
        "Tells state, step, loss, time left and the last lines of the log of a run, by its folder or by the id of its "
        "job; of an array, a table of what its runs gave. Without an argument, of all runs below runs/ and all jobs "
        "that were submitted from here. --json prints the same as JSON.",
        (),
        ("ftrun status", "ftrun status RUN", "ftrun status 1234_7 --json"),
    ),
    "cancel": Page(
        "end a run or a job",
        "Tells a job, or a run on this machine, to save and stop. A run that was stopped goes on with resume=RUN.",
        (),
        ("ftrun cancel RUN", "ftrun cancel 1234"),
    ),
    "recipes": Page(
        "what there is",
        "Lists recipes by what they are for. A pattern is a part of a name, a title or a description; the exact name "
        "of one recipe, or --long, tells more. --slot keeps those that choose something in that slot; --json prints "
        "everything as JSON; --recipes DIR looks there too.",
        (),
        ("ftrun recipes", "ftrun recipes lora", "ftrun recipes --slot tokens --json"),
    ),
    "show": Page(
        "paper, differences, every knob",
        "Prints what a recipe is made of: its paper, how it departs from it, and every key with its value, where that "
        "comes from, and what it means. It takes the overrides of `ftrun train`.",
        ("recipe",),
        ("ftrun show tshirt", "ftrun show recipe=qlora_sft adapter.r=32", "ftrun show adapter=lora"),
    ),
    "doctor": Page(
        "what this machine can do",
        "Lists versions, processors, memory, disk and kernels, and says what will be slow here and why.",
        (),
        ("ftrun doctor", "ftrun doctor --json"),
    ),
}
START = {
    "train": "recipe=NAME data.path=FILE",
    "select": "recipe=NAME budget=0.1",
    "preview": "recipe=NAME data.path=FILE",
    "plan": "recipe=NAME",
    "eval": "run=RUN | model.path=DIR",
    "generate": 'run=RUN prompt="..."',
    "merge": "run=RUN",
    "submit": "train recipe=NAME ...",
    "status": "[RUN | JOB]",
    "cancel": "RUN | JOB",
    "recipes": "[PATTERN] [--slot SLOT]",
    "show": "NAME",
    "doctor": "",
}
FLAGS = """
Any key can be set: optim.learning_rate=1e-4 adapter.r=16 train.max_steps=50.
A slot takes another component: adapter=lisa.
`ftrun VERB --help` tells of one verb.

  -m              sweep over values: ftrun train -m recipe=lora_sft seed=0,1
  --json          print the summary as the last line of standard output
  --html          ftrun preview: write a page instead of printing
  --recipes DIR   look for recipes there too
  --cfg job       print the composed config; all Hydra flags work
  --completion S  print the tab completion for bash, zsh or fish
"""


def print_help(verb: str | None = None) -> None:
    """The page of a verb, or of them all. Raises ConfigError for an unknown verb."""
    if verb is None or verb.startswith("-"):
        print("ftrun: fine-tune language models, one recipe a published method\n")
        for name, page in PAGES.items():
            print(f"  ftrun {name:<8} {START[name]:<26} {page.line}")
        print(FLAGS, end="")
        return
    if verb not in PAGES:
        raise ConfigError(f'there is no verb "{verb}"', f"ftrun help {verb}", nearest(verb, PAGES))
    page = PAGES[verb]
    console = Console(highlight=False)
    console = Console(highlight=False, width=min(console.width, WIDTH) if console.is_terminal else WIDTH)
    console.print(f"[bold]ftrun {verb}[/]  {page.line}\n")
    console.print(page.about, markup=False)
    if page.keys:
        console.print("\n[bold]keys[/]")
        console.print(Padding(_keys(page), (0, 0, 0, 2)))
        console.print("\nftrun show recipe=NAME lists every key with its value.", style="dim")
    console.print("\n[bold]examples[/]")
    for example in page.examples:
        console.print(f"  {example}", markup=False, style="green", soft_wrap=True)


def _keys(page: Page) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for key in page.keys:
        told, default = describe_key(key)
        table.add_row(key, Text.assemble(told, (f"  [{default}]", "dim")))
    return table


def describe_key(key: str) -> tuple[str, str]:
    """What a key means, and its default as one types it."""
    section, _, name = key.partition(".")
    if key in ("select.picker", *registry.SLOTS):
        slot = key.removeprefix("select.")
        names = ", ".join(registry.specs(slot))
        return (names if len(names) < 60 else SLOT_MEANINGS[slot]), plain(DEFAULT_CHOICES[slot])
    if section == "cluster" and name:
        knob = cluster_knobs()[name]
        return knob.help, plain(knob.default)
    if section in SECTIONS and name:
        knob: Knob = section_knobs(section)[name]
    elif section == "select":
        knob = shared_select_knobs()[name]
    elif section in registry.SLOTS:
        knob = registry.find(section, DEFAULT_CHOICES[section]).knobs[name]
    else:
        knob = root_knobs()[key]
    return knob.help, plain(knob.default)


SLOT_MEANINGS = {
    "select": "how rows are scored; `ftrun recipes --slot select`",
    "picker": "how rows are picked from their scores",
    "tokens": "which tokens train, and how much; `ftrun recipes --slot tokens`",
    "adapter": "what trains: bottleneck, ia3, lisa, lora, prefix_tuning; none: all weights",
    "objective": "what is minimised",
    "optim": "the optimiser",
    "schedule": "how the learning rate moves",
    "eval": "evaluators, such as [heldout,generation]; a list",
    "quant": "how the base weights are stored",
}
