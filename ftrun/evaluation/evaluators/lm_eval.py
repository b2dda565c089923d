"""Benchmarks of the Language Model Evaluation Harness."""

from __future__ import annotations

import copy
import fnmatch
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftrun.errors import ComponentError, ConfigError, FtrunError, nearest
from ftrun.evaluation.base import Evaluation, Evaluator, Metric
from ftrun.registry import register

if TYPE_CHECKING:
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context


@register("eval", "lm_eval")
@dataclass
class LmEval(Evaluator):
    """Tasks of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), on the model in memory.

    Every metric of a task is reported as ``task.metric``, with the filter's name behind it where the task filters.
    Tasks of one's own are YAML files in ``include_path``, and need no network when their data are local. With several
    processes the first one evaluates and the others wait.
    """

    tasks: list[str] = field(default_factory=list)  # task, group or tag names, patterns such as mmlu_*, or YAML files
    num_fewshot: int | None = None  # examples in the prompt; null: what the task says
    limit: int | None = None  # at most this many rows of each task
    include_path: str | None = None  # folder with YAML tasks of one's own
    batch_size: int = 8  # rows in one batch
    chat: bool = False  # put prompts into the chat template

    def evaluate(self, bundle: Bundle, ctx: Context) -> Evaluation:
        alone = ctx.team.rank == 0 or not ctx.team.splits  # a model in slices is run by all
        found = self._run(bundle, ctx) if alone else None
        result = ctx.team.gather_object(found)[0]
        assert result is not None
        return result

    def _run(self, bundle: Bundle, ctx: Context) -> Evaluation:
        try:
            from lm_eval import evaluator
            from lm_eval.models.huggingface import HFLM
        except ImportError:
            todo = "Install it: pip install lm-eval"
            raise ConfigError("eval=lm_eval needs the package lm-eval", "eval=lm_eval", todo) from None
        names: list[Any]
        manager, names = self.index()
        # a copy, because lm-eval sets the padding side and token of the tokenizer it is given
        tokenizer = copy.deepcopy(bundle.tokenizer)
        with ctx.report.task(f"lm-eval {' '.join(self.tasks)}", None):
            try:
                wrap: Any = HFLM  # its decorator hides its signature
                model = wrap(
                    pretrained=bundle.model,
                    tokenizer=tokenizer,
                    batch_size=self.batch_size,
                    max_length=bundle.context_length,
                )
                results: Any = evaluator.simple_evaluate(
                    model,
                    tasks=names,
                    num_fewshot=self.num_fewshot,
                    limit=self.limit,
                    task_manager=manager,
                    apply_chat_template=self.chat,
                    bootstrap_iters=1000,
                )
            except FtrunError:
                raise
            except Exception as error:
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise ComponentError(
                    f"lm-eval failed: {reason}",
                    f"eval.lm_eval.tasks=[{','.join(self.tasks)}]",
                    "Tasks that are not local load their data from the hub; see FTRUN_DEBUG=1 for the traceback.",
                ) from error
        return Evaluation(dict(_metrics(results)), list(_predictions(results)))

    def index(self) -> tuple[Any, list[str]]:
        """lm-eval's index of tasks, as small as ours allow, and our tasks with patterns spelt out.

        Raises ConfigError for an unknown task.
        """
        from lm_eval.tasks import TaskManager

        if not self.tasks:
            todo = "Set eval.lm_eval.tasks=[hellaswag,...]."
            raise ConfigError("eval=lm_eval has no tasks", "eval.lm_eval.tasks", todo)
        if self.include_path is not None and not Path(self.include_path).is_dir():
            where = f"eval.lm_eval.include_path={self.include_path}"
            raise ConfigError(f"there is no folder {self.include_path}", where)
        # the index of lm-eval's own tasks takes many seconds: only if they are asked for
        for defaults in (False, True):
            manager = TaskManager(include_path=self.include_path, include_defaults=defaults)
            found = {task: _matches(task, manager.all_tasks) for task in self.tasks}
            if all(found.values()):
                return manager, [name for names in found.values() for name in names]
        unknown = next(task for task, names in found.items() if not names)
        close = nearest(unknown, manager.all_tasks)
        # without a near one it would list thousands of names
        todo = close if close.startswith("Did you mean") else "`lm-eval ls tasks` lists all names."
        raise ConfigError(f'lm-eval has no task "{unknown}"', f"eval.lm_eval.tasks=[{','.join(self.tasks)}]", todo)


def _matches(task: str, known: list[str]) -> list[str]:
    return [task] if task in known or Path(task).is_file() else sorted(fnmatch.filter(known, task))


def _metrics(results: Any) -> list[tuple[str, Metric]]:
    found = []
    for task, values in results["results"].items():
        directions = results.get("higher_is_better", {}).get(task, {})
        rows = results.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in values.items():
            name, _, filtered = key.partition(",")
            if not filtered or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{name}_stderr,{filtered}")
            label = f"{task}.{name}" if filtered == "none" else f"{task}.{name}.{filtered}"
            stderr = float(error) if isinstance(error, int | float) else None
            found.append((label, Metric(float(value), stderr, rows, directions.get(name) is not False)))
    return found


def _predictions(results: Any) -> list[dict[str, Any]]:
    found = []
    for task, samples in results.get("samples", {}).items():
        for sample in samples:
            scores = {name: sample[name] for name in sample.get("metrics", ()) if name in sample}
            found.append(
                {
                    "id": sample["doc_id"],
                    "task": task,
                    "output": sample["filtered_resps"],
                    "gold": sample["target"],
                    **scores,
                }
            )
    return found
