"""report.html: one self-contained page from nothing but the run folder."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ftrun.reporting.choice import selection_section
from ftrun.reporting.curves import training_section
from ftrun.reporting.markup import Markup, escape, tag
from ftrun.reporting.results import key_numbers, predictions_section
from ftrun.reporting.run import Run
from ftrun.reporting.tokenchoice import moved_section
from ftrun.reporting.weights import weights_section
from ftrun.runs import numbers
from ftrun.runs.artifacts import write_text

SLOTS = ("select", "tokens", "adapter", "quant", "objective", "optim", "schedule")
FIDELITY = {
    "reference-checked": "checked against the authors' reference",
    "from-paper": "written from the paper",
    "reconstruction": "a reconstruction: the paper leaves parts open",
}
LAST_LINES = 20  # of the log, in the report of a run that did not finish


def write_report(run: Path) -> Path:
    """Write ``report.html`` into a run folder and return its path. Whatever the folder lacks is left out."""
    path = Path(run) / "report.html"
    write_text(path, render(Run(Path(run))))
    return path


def render(run: Run) -> str:
    """The page as text."""
    sections = [
        ("Key numbers", key_numbers(run)),
        ("Training", training_section(run)),
        ("Selection", _selection(run)),
        ("Token weights", weights_section(run)),
        ("Token weights over the steps", moved_section(run)),
        ("Predictions", predictions_section(run)),
        ("Differences from the paper", _listed(run.config.get("differences"))),
        ("Run it again", _again(run)),
        ("Environment", _environment(run)),
    ]
    made = [tag("section", tag("h2", title), content) for title, content in sections if content]
    # warnings are read first, but some of them are only known when everything has been read
    body = [_header(run), _failure(run), _warnings(run), *made, _footer(run)]
    return page(f"{_recipe(run)} · ftrun", *body)


def page(title: str, *body: Markup | None) -> str:
    """A whole document with the style sheet inside."""
    style = resources.files("ftrun.reporting").joinpath("style.css").read_text(encoding="utf-8")
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(style)),
    ]
    return "<!DOCTYPE html>\n" + tag("html", tag("head", *head), tag("body", tag("main", *body)), lang="en") + "\n"


def _selection(run: Run) -> Markup | None:
    link = tag("p", tag("a", "The whole audit of the choice", href="selection/report.html"), ".")
    parts = [selection_section(run), link if (run.path / "selection" / "report.html").is_file() else None]
    return Markup("".join(part for part in parts if part)) or None


def _recipe(run: Run) -> str:
    return str(run.summary.get("recipe") or run.config.get("recipe") or run.path.name)


def _header(run: Run) -> Markup:
    status = str(run.summary.get("status") or "not finished")
    fidelity = str(run.config.get("fidelity") or "")
    badges = [tag("span", status, class_=f"badge {'good' if status == 'done' else 'bad'}")]
    if fidelity:
        badges.append(tag("span", fidelity, class_="badge", title=FIDELITY.get(fidelity)))
    return tag(
        "header",
        tag("p", "ftrun report", class_="kicker"),
        tag("h1", _recipe(run), *badges),
        paper_line(run),
        _chain(run),
        _facts(run),
    )


def paper_line(run: Run) -> Markup | None:
    """The paper behind a run's recipe."""
    paper = run.config.get("paper")
    if not isinstance(paper, Mapping) or not paper.get("title"):
        return None
    link = paper.get("url") or (f"https://arxiv.org/abs/{paper['arxiv']}" if paper.get("arxiv") else None)
    if not str(link).startswith(("https://", "http://")):
        link = None
    title = tag("a", str(paper["title"]), href=link, rel="noreferrer") if link else tag("cite", str(paper["title"]))
    rest = [str(paper[key]) for key in ("authors", "year") if paper.get(key)]
    if paper.get("arxiv"):
        rest.append(f"arXiv:{paper['arxiv']}")
    return tag("p", title, ". " if rest else "", ", ".join(rest), class_="paper")


def _chain(run: Run) -> Markup | None:
    """The chosen component of every slot."""
    parts = []
    for slot in SLOTS:
        block = run.config.get(slot)
        name = block.get("name") if isinstance(block, Mapping) else block
        if name and name != "none":
            parts.append(tag("span", tag("span", slot, class_="slot"), str(name), class_="link"))
    return tag("p", *parts, class_="chain") if parts else None


def _facts(run: Run) -> Markup | None:
    summary, config = run.summary, run.config
    facts: list[tuple[str, str]] = []

    def add(name: str, value: Any, text: str | None = None) -> None:
        if value not in (None, "", 0):
            facts.append((name, text or str(value)))

    add("model", path_text(config.get("model")))
    add("data", path_text(config.get("data")))
    add("budget", config.get("budget"))
    if isinstance(summary.get("wall_s"), int | float):
        add("time", summary["wall_s"], numbers.duration(summary["wall_s"]))
    for key in ("steps", "tokens", "selected_rows"):
        if isinstance(summary.get(key), int | float):
            add(key.replace("_", " "), summary[key], f"{summary[key]:,}")
    trainable, total = summary.get("trainable_parameters"), summary.get("total_parameters")
    if isinstance(trainable, int | float) and trainable:
        share = (
            f" of {numbers.quantity(total)} ({trainable / total:.2%})"
            if isinstance(total, int | float) and total
            else ""
        )
        add("trained", trainable, f"{numbers.quantity(trainable)}{share}")
    if isinstance(summary.get("peak_memory_bytes"), int | float):
        add("peak memory", summary["peak_memory_bytes"], numbers.size(summary["peak_memory_bytes"]))
    if isinstance(summary.get("final_loss"), int | float):
        add("final loss", summary["final_loss"], numbers.plain(summary["final_loss"]))
    if config.get("seed") is not None:
        facts.append(("seed", str(config["seed"])))
    items = [tag("div", tag("dt", name), tag("dd", breakable(text))) for name, text in facts]
    return tag("dl", *items, class_="facts") if items else None


def breakable(text: str) -> Markup:
    """Text that may be broken after the separators of paths and names."""
    return Markup(re.sub(r"([:/_])", r"\1<wbr>", escape(text)))


def path_text(section: Any) -> str:
    """The path that a section of the config names."""
    value = section.get("path") if isinstance(section, Mapping) else section
    return ", ".join(str(part) for part in value) if isinstance(value, list) else str(value or "")


def _failure(run: Run) -> Markup | None:
    status = run.summary.get("status")
    if status == "done":
        return None
    error = run.summary.get("error")
    message = str(error.get("message") or error.get("what") or "") if isinstance(error, Mapping) else str(error or "")
    parts = [
        tag(
            "h2",
            f"This run {'was ' + str(status) if status in ('interrupted', 'preempted') else 'failed' if status else 'did not finish'}",
        )
    ]
    if message:
        parts.append(tag("pre", message))
    if run.log:
        lines = "\n".join(run.log[-LAST_LINES:])
        parts.append(tag("details", tag("summary", "the end of ftrun.log"), tag("pre", lines), open=not message))
    return tag("section", *parts, class_="failure")


def _warnings(run: Run) -> Markup | None:
    items = [*run.warnings, *(f"not readable, left out here: {name}" for name in run.unreadable)]
    if not items:
        return None
    return tag("section", tag("h2", "Warnings"), tag("ul", *(tag("li", text) for text in items)), class_="warnings")


def _listed(items: Any) -> Markup | None:
    if not isinstance(items, list) or not items:
        return None
    return tag("ul", *(tag("li", str(item)) for item in items))


def _again(run: Run) -> Markup | None:
    parts = []
    command = run.lock.get("command")
    if command:
        words = (
            [command]
            if isinstance(command, str)
            else ["ftrun", *(shlex.quote(str(word)) for word in _arguments(command))]
        )
        parts.append(tag("pre", " ".join(words), class_="command"))
    if run.config_text:
        parts.append(tag("details", tag("summary", "resolved config"), tag("pre", run.config_text.rstrip())))
    return Markup("".join(parts)) if parts else None


def _arguments(command: list[Any]) -> list[Any]:
    """The words after the program's own name."""
    first = Path(str(command[0])).name if command else ""
    return command[1:] if first in ("ftrun", "__main__.py") else command


def _environment(run: Run) -> Markup | None:
    rows = [row for key, value in run.lock.items() if key != "command" for row in _leaves(key, value)]
    if not rows:
        return None
    body = [tag("tr", tag("th", name, scope="row"), tag("td", text)) for name, text in rows]
    return tag(
        "details",
        tag("summary", "versions, hardware, fingerprints"),
        tag("div", tag("table", tag("tbody", *body), class_="plain"), class_="scroll"),
    )


def _leaves(name: str, value: Any) -> list[tuple[str, str]]:
    """Nested values as lines ``versions torch``: text."""
    if isinstance(value, Mapping):
        return [row for key, item in value.items() for row in _leaves(f"{name} · {key}", item)]
    if isinstance(value, list):
        value = ", ".join(str(item) for item in value)
    return [] if value is None else [(name.replace("_", " "), str(value))]


def _footer(run: Run) -> Markup:
    versions = run.lock.get("versions")
    version = versions.get("ftrun") if isinstance(versions, Mapping) else None
    return tag(
        "footer", f"Made by ftrun{' ' + str(version) if version else ''} from the files in {run.path.name}/ alone."
    )
